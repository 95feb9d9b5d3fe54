#!/usr/bin/env bash
# The whole pipeline on one plain machine: no GPU, no API key, no model hub.
#   bash examples/tau-bench/run_local.sh            20 minutes on 2 cores after the installation
#   QUICK=1 bash examples/tau-bench/run_local.sh    the same path with tiny counts, for a first look (not for its numbers)
# tau2's telecom tasks -> teacher traces -> SFT -> GRPO with the shaped reward -> evaluation of the model as it was and of
# both on the 40 test tasks, and of the last with ids drawn anew -> a table.
# RFT_ROUNDS=2 puts RFT between them: SFT on the model's own episodes, those it solved and those that the teacher mended.
# SFT_ROLLOUTS=140 gives the best model of these; it leaves GRPO next to nothing to add.
# KL=0.1 holds GRPO to the model that it starts from. MOOD=mixed SFT_ROLLOUTS=140 KL=0.1 GRPO_ROLLOUTS=9 trains on and with
# customers of all moods, terse ones and such as misread a setting. (Both were measured with GRPO_LR=1e-4.)
# Everything lands in $RUN_DIR; run it again after an interruption and it goes on where it was. A run with other settings
# (SEED=1 ...) wants another RUN_DIR.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$ROOT"

QUICK=${QUICK:-0}
if [ "$QUICK" = 1 ]; then
   RUN_DIR=${RUN_DIR:-runs/quick}
   SFT_ROLLOUTS=${SFT_ROLLOUTS:-4} RFT_ROLLOUTS=${RFT_ROLLOUTS:-2}
   GRPO_ROLLOUTS=${GRPO_ROLLOUTS:-1} GRPO_BATCH=${GRPO_BATCH:-1}
   EVAL_TASKS=${EVAL_TASKS:-4} TRIALS=${TRIALS:-1} CONTEXT=${CONTEXT:-1024}
else
   RUN_DIR=${RUN_DIR:-runs/local}
   SFT_ROLLOUTS=${SFT_ROLLOUTS:-70} RFT_ROLLOUTS=${RFT_ROLLOUTS:-40}
   GRPO_ROLLOUTS=${GRPO_ROLLOUTS:-6} GRPO_BATCH=${GRPO_BATCH:-6}
   EVAL_TASKS=${EVAL_TASKS:-40} TRIALS=${TRIALS:-4} CONTEXT=${CONTEXT:-1664} # the teacher's longest dialogue has 1571 tokens
fi
RFT_ROUNDS=${RFT_ROUNDS:-0} # of RFT, between SFT and GRPO
KL=${KL:-0} # coefficient of the KL term of GRPO
GRPO_LR=${GRPO_LR:-5e-5} # at 1e-4 a run loses by chance what another gains; at 1e-5 nothing changes in so few steps
MOOD=${MOOD:-plain} # of the customer in every stage: mixed, terse, ... (tau2_moods.py)
DATA_DIR=$RUN_DIR/data
MODEL_DIR=${MODEL_DIR:-runs/SmolLM2-135M-Instruct}
SFT_DIR=$RUN_DIR/sft
RFT_DIR=$RUN_DIR/rft
GRPO_DIR=$RUN_DIR/grpo
PORT=${PORT:-30000}
SEED=${SEED:-1234} # of the traces, the training, the rollouts and what is collected
for name in SFT_ROLLOUTS RFT_ROLLOUTS GRPO_ROLLOUTS GRPO_BATCH EVAL_TASKS TRIALS CONTEXT PORT; do
   [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] || { echo "error: $name=${!name}: give a whole number above 0" >&2 && exit 2; }
done
for name in SEED RFT_ROUNDS; do
   [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || { echo "error: $name=${!name}: give a whole number" >&2 && exit 2; }
done
for name in KL GRPO_LR; do
   [[ ${!name} =~ ^[0-9]*\.?[0-9]+(e-?[0-9]+)?$ ]] || { echo "error: $name=${!name}: give a number such as 0.1" >&2 && exit 2; }
done
moods="plain terse rambling misreads eager asks_back persona mixed" # CHOICES of tau2_moods.py
[[ " $moods " == *" $MOOD "* ]] || { echo "error: MOOD=$MOOD: choose one of: ${moods// /, }" >&2 && exit 2; }
[[ $QUICK =~ ^[01]$ ]] || { echo "error: QUICK=$QUICK: give 1, or 0 for the full run" >&2 && exit 2; }
made_with="SEED=$SEED MOOD=$MOOD KL=$KL SFT_ROLLOUTS=$SFT_ROLLOUTS RFT_ROUNDS=$RFT_ROUNDS RFT_ROLLOUTS=$RFT_ROLLOUTS"
made_with+=" GRPO_ROLLOUTS=$GRPO_ROLLOUTS GRPO_BATCH=$GRPO_BATCH EVAL_TASKS=$EVAL_TASKS CONTEXT=$CONTEXT GRPO_LR=$GRPO_LR TRIALS=$TRIALS"
before=$(cat "$RUN_DIR/made_with" 2>/dev/null || echo "$made_with")
if [ "$before" != "$made_with" ] && [ "${BASH_SOURCE[0]}" = "$0" ]; then # its files would stand as this run's
   read -ra were <<<"$before" && read -ra are <<<"$made_with"
   differ=()
   for index in "${!are[@]}"; do
      old=${were[index]:-nothing}
      [ "$old" = "${are[index]}" ] || differ+=("$old, now ${are[index]};")
   done
   echo "error: $RUN_DIR holds a run with ${differ[*]} choose another RUN_DIR" >&2 && exit 2
fi
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
   { mkdir -p "$RUN_DIR" && [ -w "$RUN_DIR" ]; } 2>/dev/null ||
      { echo "error: RUN_DIR=$RUN_DIR: no folder that can be made and written here; choose another" >&2 && exit 2; }
fi
STAGES=(base sft grpo) LAST_DIR=$SFT_DIR LOGS=("$SFT_DIR/metrics.jsonl")
[ "$RFT_ROUNDS" = 0 ] || STAGES=(base sft rft grpo)

bash scripts/setup_env.sh
PYTHON=${TAU2_VENV:-.venv}/bin/python

export PYTHONPATH=$ROOT/examples/tau-bench:$ROOT${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Huge pages for the allocator: one training step was measured 20 % faster with them.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:glibc.malloc.top_pad=268435456}

source scripts/models/smollm2-135M-Instruct.sh

# Only the upper third of the layers is trained: the rest needs no backward pass.
TRAIN_ARGS=(
   --only-train-params-name-list 'decoder\.layers\.2[0-9]\.' 'decoder\.final_layernorm'
   --use-dynamic-batch-size
   --max-tokens-per-gpu 4096 # a micro-batch keeps 0.4 MB a token for its backward pass; shared prefixes count once
   --optimizer adam
   --weight-decay 0.01
   --clip-grad 1.0
   --seed "$SEED"
)

SFT_ARGS=(
   --input-key prompt
   --tool-key tools
   --rollout-function-path slime.rollout.sft_rollout.generate_rollout
   --loss-mask-type qwen3
   --rollout-batch-size 2 # twice the steps of 4 for the same dialogues: measured better by far
   --n-samples-per-prompt 1
   --global-batch-size 2
   --loss-type sft_loss
   --calculate-per-token-loss
   --disable-compute-advantages-and-returns
   --debug-train-only
   --lr-decay-style cosine
   --lr-warmup-fraction 0.1
   --save-interval 20
)
TEACHER_ARGS=(
   --hf-checkpoint "$MODEL_DIR"
   --prompt-data "$DATA_DIR/teacher_traces.jsonl"
   --num-rollout "$SFT_ROLLOUTS"
   --lr 1e-3
   --load "$SFT_DIR"
   --save "$SFT_DIR"
   --save-hf "$SFT_DIR/hf"
)
RFT_ARGS=( # and what each round starts from, reads and writes
   --num-rollout "$RFT_ROLLOUTS"
   --lr 5e-4
)

# A group that is solved throughout has no advantage: others in place of it, or all groups and KL, which keeps what it shows.
GROUP_ARGS=(
   --over-sampling-batch-size "$((GRPO_BATCH * 2))"
   --dynamic-sampling-filter-path tau2_reward_shaping.check_shaped_reward_spread_with_fallback
)
[[ $KL =~ ^[0.]*$ ]] || GROUP_ARGS=(--use-kl-loss --kl-loss-coef "$KL" --kl-loss-type low_var_kl)
GRPO_ARGS=(
   --prompt-data "$DATA_DIR/telecom_train_mix_tasks.jsonl" # kinds of tasks in turns, so no --rollout-shuffle
   --input-key index
   --rollout-seed "$SEED"
   --num-rollout "$GRPO_ROLLOUTS"
   --rollout-batch-size "$GRPO_BATCH"
   "${GROUP_ARGS[@]}"
   --n-samples-per-prompt 4
   --global-batch-size "$((GRPO_BATCH * 4))" # one optimizer step a rollout: each sees every kind of task
   --sglang-max-running-requests 24 # half of a rollout at a time, for the memory of keys and values
   --rollout-max-response-len 4096
   --rollout-max-context-len "$CONTEXT"
   --log-probs-max-tokens-per-gpu 8192 # nothing is kept for a backward pass there
   --rollout-temperature 0.7 # at 1.0 a third of a 135M model's episodes lose their thread
   --custom-generate-function-path generate_with_tau.generate
   --custom-reward-post-process-path tau2_reward_shaping.tau2_reward_post_process
   --custom-rollout-log-function-path tau2_reward_shaping.log_rollout
   --custom-config-path examples/tau-bench/local.yaml # or RUN_DIR's, with the mood
   --advantage-estimator grpo
   --eps-clip 0.2
   --eps-clip-high 0.28
   --use-rollout-logprobs # the engine shares the model with the trainer: its log-probs are the same but for rounding
   --lr "$GRPO_LR" # SFT's has fallen to 0
   --lr-decay-style constant
   --load "$GRPO_DIR"
   --save "$GRPO_DIR"
   --save-interval 3
   --save-hf "$GRPO_DIR/hf"
)

CUSTOMER_ARGS=(--user-args "{\"mood\": \"$MOOD\"}")
EPISODE_ARGS=(
   --domain telecom
   --prompt short
   --max-turn-tokens 96
   --max-context-len "$CONTEXT"
   --max-concurrency 40
   --sglang-port "$PORT"
)
EVAL_ARGS=(
   --task-split test
   --num-tasks "$EVAL_TASKS"
)
# One greedy episode of each task is too few to tell stages apart: whole issue types hang on one common turn.
TRIAL_ARGS=(--num-trials "$TRIALS" --temperature 0.7)
[ "$TRIALS" != 1 ] || TRIAL_ARGS=()
COLLECT_ARGS=(
   --task-split train
   --temperature 0.7
)

# Shares of the kinds of tasks in what is trained on; without, the model forgets what its episodes seldom show. A task counts
# for the first that it has: a locked SIM or an ended contract ends in a hand-over, so the unpaid bills are those that
# can be paid, three of 74 tasks.
SFT_MIX=lock_sim_card_pin=1,contract_end_suspension=1,overdue_bill_suspension=2,service_issue=1,mms_issue=5,mobile_data_issue=4
GRPO_MIX=mms_issue=1,mobile_data_issue=1,service_issue=1 # its prompts take turns by issue type
TRACES_ARGS=( # dialogues of the teacher
   --local_dir "$DATA_DIR"
   --prompt short
   "${CUSTOMER_ARGS[@]}"
   --style checklist
   --redraw-ids 0.5 # half with other names, numbers and ids, which are to be copied, not remembered
   --mix "$SFT_MIX"
   --tasks "$DATA_DIR/telecom_train_tasks.jsonl" "$DATA_DIR/telecom_pool_tasks.jsonl"
)
OWN_ARGS=( # the model's own, solved or mended
   --local_dir "$DATA_DIR"
   --per-task 2
   --mend 2
   --style checklist
   --mix "$SFT_MIX"
   --seed "$SEED"
   --num-traces "$((RFT_ROLLOUTS * 2))"
)

say() { printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

wait_for() { # wait_for PID: to its end, with its exit code; a TERM to this shell alone ends both
   local code=0 ended=0
   trap "ended=1; kill $1 2>/dev/null || true" TERM
   trap : INT # the terminal sends it to both: the command says what it leaves, and its code ends this shell
   while
      code=0
      wait "$1" || code=$?
      kill -0 "$1" 2>/dev/null # a signal ended the waiting, not the command
   do :; done
   trap - TERM INT
   [ "$ended" = 0 ] || exit 143
   return "$code"
}

timed() { # timed STEP COMMAND...: run it and add its seconds to the step's
   local step=$1 start=$SECONDS
   shift
   (trap - INT && exec "$@") & # a command in the background ignores INT unless told otherwise
   wait_for $!
   printf '%s\t%s\n' "$step" $((SECONDS - start)) >>"$RUN_DIR/minutes.tsv"
}

evaluate() { # evaluate STAGE CHECKPOINT [FLAGS]
   say "evaluation of $1"
   timed "eval_$1" "$PYTHON" examples/tau-bench/evaluate_tau2.py --checkpoint "$2" --output-path "$RUN_DIR/eval_$1.json" \
      "${EPISODE_ARGS[@]}" "${CUSTOMER_ARGS[@]}" "${EVAL_ARGS[@]}" "${TRIAL_ARGS[@]}" "${@:3}"
}

settings() { # settings FILE [YAML LINE]: local.yaml, the mood and the line
   mkdir -p "$(dirname "$1")"
   { cat examples/tau-bench/local.yaml && printf '%s\n' "tau2_user_args: {mood: $MOOD}" "${@:2}"; } >"$1"
}

make_tasks() {
   timed tasks "$PYTHON" examples/tau-bench/tau2_mock.py --local_dir "$DATA_DIR" --splits train test pool
   timed tasks "$PYTHON" examples/tau-bench/tau2_mock.py --local_dir "$DATA_DIR" --splits train --mix "$GRPO_MIX" --num-rows 72 \
      --seed "$SEED"
}

collect() { # collect CHECKPOINT OUTPUT [FLAGS]: episodes of every train task
   timed rft "$PYTHON" examples/tau-bench/evaluate_tau2.py --checkpoint "$1" --output-path "$2" \
      "${EPISODE_ARGS[@]}" "${CUSTOMER_ARGS[@]}" "${COLLECT_ARGS[@]}" "${@:3}"
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # sourced for the arrays and functions above (benchmarks/levers.sh)

say "SmolLM2-135M-Instruct as an HF folder"
timed base "$PYTHON" -m slime_local.smollm2 --out "$MODEL_DIR"

say "1. tasks to JSONL"
make_tasks
evaluate base "$MODEL_DIR"
echo "$made_with" >"$RUN_DIR/made_with" # not before: a start that was refused may be corrected; the evaluation knows its own

say "2. SFT on teacher traces"
timed sft "$PYTHON" examples/tau-bench/teacher_traces.py "${TRACES_ARGS[@]}" --seed "$SEED" --num-traces "$((SFT_ROLLOUTS * 2))"
timed sft "$PYTHON" train.py --host local "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${SFT_ARGS[@]}" "${TEACHER_ARGS[@]}"
evaluate sft "$SFT_DIR/hf"

for ((round = 1; round <= RFT_ROUNDS; round++)); do
   say "2. SFT on the model's own episodes, solved or mended (RFT, round $round)"
   # Each task twice: in the first round with its own ids, then once with new ones, which are to be copied, not remembered.
   collected=("$RUN_DIR/collected_$round.json") rows=$DATA_DIR/rollout_traces_$round.jsonl
   if [ "$round" = 1 ]; then
      collect "$LAST_DIR/hf" "${collected[0]}" --num-trials 2 --seed "$((SEED + round))"
   else
      collected+=("$RUN_DIR/collected_${round}_redrawn.json")
      collect "$LAST_DIR/hf" "${collected[0]}" --seed "$((SEED + round))"
      collect "$LAST_DIR/hf" "${collected[1]}" --seed "$((SEED + round))" --redraw-ids
   fi
   timed rft "$PYTHON" examples/tau-bench/teacher_traces.py "${OWN_ARGS[@]}" --from-rollouts "${collected[@]}" --output "$rows"
   timed rft "$PYTHON" train.py --host local "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${SFT_ARGS[@]}" "${RFT_ARGS[@]}" \
      --hf-checkpoint "$LAST_DIR/hf" --prompt-data "$rows" --load "$RFT_DIR$round" --save "$RFT_DIR$round" \
      --save-hf "$RFT_DIR$round/hf"
   LAST_DIR=$RFT_DIR$round
   LOGS+=("$LAST_DIR/metrics.jsonl")
done
if [ "$RFT_ROUNDS" != 0 ]; then
   evaluate rft "$LAST_DIR/hf"
fi

say "3. GRPO with the shaped reward"
if [ "$MOOD" != plain ]; then
   settings "$RUN_DIR/settings.yaml"
   GRPO_ARGS+=(--custom-config-path "$RUN_DIR/settings.yaml")
fi
timed grpo "$PYTHON" train.py --host local "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${GRPO_ARGS[@]}" --hf-checkpoint "$LAST_DIR/hf" \
   --ref-load "$LAST_DIR/hf"
evaluate grpo "$GRPO_DIR/hf"
evaluate redrawn "$GRPO_DIR/hf" --redraw-ids

say "4. the table, what it shows, and the report"
"$PYTHON" examples/tau-bench/summarize.py --run-dir "$RUN_DIR"
evals=("${STAGES[@]/#/$RUN_DIR/eval_}")
evals=("${evals[@]/%/.json}")
"$PYTHON" examples/tau-bench/evaluate_tau2.py compare "${evals[@]:1}"
"$PYTHON" examples/tau-bench/evaluate_tau2.py report "${evals[@]}" --metrics-log "${LOGS[@]}" "$GRPO_DIR/metrics.jsonl" \
   --output "$RUN_DIR/report.html"
