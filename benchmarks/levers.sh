#!/usr/bin/env bash
# What each lever does, beside the same run without it: SFT once, then an arm for each lever with run_local.sh's arrays,
# alike but for it; every arm plays the 40 test tasks, sampled.
#   SEED=1 bash benchmarks/levers.sh                     every arm; about 8 minutes each on 2 cores
#   SEED=1 bash benchmarks/levers.sh grpo shuffled       these arms
# SFT:  sft wordings slips           one round of RFT from sft:  rft keep_mistakes teacher, and the rft arm under
# each mood of the customer, greedy:  rft moods
# GRPO from sft:  grpo own_ids shuffled handovers unfiltered curriculum two_steps full_rate groups_of_8 no_std tis kl
# penalty taught; with customers of all moods, beside sft under the same:  mixed
# Results: $RUN_DIR/ARM/eval.json, with names, numbers and ids drawn anew eval_new.json where that is the question. Run
# it again after an interruption and it goes on where it was.
set -euo pipefail

ALL=(sft rft keep_mistakes teacher wordings slips moods
   grpo own_ids shuffled handovers unfiltered curriculum two_steps full_rate groups_of_8 no_std tis kl penalty taught mixed)
[ $# -gt 0 ] || set -- "${ALL[@]}"
ARMS=("$@")
for arm in "${ARMS[@]}"; do
   [[ " ${ALL[*]} " == *" $arm "* ]] || { echo "error: no arm is called $arm: choose of ${ALL[*]}" >&2 && exit 2; }
done
SEED=${SEED:-1}
RUN_DIR=${RUN_DIR:-runs/levers$SEED}
SFT_ROLLOUTS=${SFT_ROLLOUTS:-60} # not more: what a lever does is seen where there is something to gain
TRIALS=${TRIALS:-2} # of each test task
source "$(dirname "${BASH_SOURCE[0]}")/../examples/tau-bench/run_local.sh"

sample() { # sample ARM RESULT [FLAGS]: episodes of the arm's checkpoint on the test tasks, with the same seeds for each arm
   timed "eval_$1" "$PYTHON" examples/tau-bench/evaluate_tau2.py --checkpoint "$RUN_DIR/$1/hf" --output-path "$RUN_DIR/$1/$2" \
      "${EPISODE_ARGS[@]}" "${CUSTOMER_ARGS[@]}" "${EVAL_ARGS[@]}" --num-trials "$TRIALS" --temperature 0.7 --seed 7 "${@:3}"
}

train() { # train ARM [FLAGS]
   timed "$1" "$PYTHON" train.py --host local "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${@:2}" \
      --load "$RUN_DIR/$1" --save "$RUN_DIR/$1" --save-hf "$RUN_DIR/$1/hf"
}

teach() { # teach ARM NUMBER [FLAGS]: dialogues of the teacher
   timed "$1" "$PYTHON" examples/tau-bench/teacher_traces.py "${TRACES_ARGS[@]}" --num-traces "$2" --output "$DATA_DIR/$1.jsonl" "${@:3}"
}

sft() { # sft ARM [FLAGS of the teacher]
   teach "$1" "$((SFT_ROLLOUTS * 2))" --seed "$SEED" "${@:2}"
   train "$1" "${SFT_ARGS[@]}" "${TEACHER_ARGS[@]}" --prompt-data "$DATA_DIR/$1.jsonl"
}

rft_arm() { # rft_arm ARM [FLAGS]: a round of RFT from sft
   collect "$SFT_DIR/hf" "$RUN_DIR/collected.json" --num-trials 2 --seed "$((SEED + 1))"
   timed "$1" "$PYTHON" examples/tau-bench/teacher_traces.py "${OWN_ARGS[@]}" --from-rollouts "$RUN_DIR/collected.json" \
      --output "$DATA_DIR/$1.jsonl" "${@:2}"
   train "$1" "${SFT_ARGS[@]}" "${RFT_ARGS[@]}" --hf-checkpoint "$SFT_DIR/hf" --prompt-data "$DATA_DIR/$1.jsonl"
   sample "$1" eval.json
}

teacher_arm() { # as many steps as a round of RFT, on fresh dialogues of the teacher
   teach teacher "$((RFT_ROLLOUTS * 2))" --seed "$((SEED + 1000))"
   train teacher "${SFT_ARGS[@]}" "${RFT_ARGS[@]}" --hf-checkpoint "$SFT_DIR/hf" --prompt-data "$DATA_DIR/teacher.jsonl"
   sample teacher eval.json
}

grpo_arm() { # grpo_arm ARM "YAML LINE" [FLAGS]: GRPO from sft
   settings "$RUN_DIR/$1/settings.yaml" "$2"
   train "$1" "${GRPO_ARGS[@]}" --hf-checkpoint "$SFT_DIR/hf" --custom-config-path "$RUN_DIR/$1/settings.yaml" \
      --save-debug-rollout-data "$RUN_DIR/$1/rollouts/{rollout_id}.pt" "${@:3}" # for benchmarks/partial_credit.py
   sample "$1" eval.json
}

without() { # without FLAG VALUES: GRPO_ARGS less a flag and its values
   local kept=() left=0
   for arg in "${GRPO_ARGS[@]}"; do
      if [ "$arg" = "$1" ]; then
         left=$2
      elif [ "$left" -gt 0 ]; then
         left=$((left - 1))
      else
         kept+=("$arg")
      fi
   done
   GRPO_ARGS=("${kept[@]}")
}

all_groups() { # GRPO trains on what it draws, with a spread of rewards or without
   without --dynamic-sampling-filter-path 1
   without --over-sampling-batch-size 1
}

run_arm() {
   case $1 in
      sft) sample sft eval.json ;;
      wordings)
         sft wordings --wordings 4
         sample wordings eval.json
         ;;
      slips)
         sft slips --slip 0.3
         sample slips eval.json
         ;;
      rft) rft_arm rft ;;
      keep_mistakes) rft_arm keep_mistakes --keep-mistakes ;;
      teacher) teacher_arm ;;
      grpo)
         grpo_arm grpo ""
         sample grpo eval_new.json --redraw-ids
         ;;
      own_ids)
         grpo_arm own_ids "tau2_redraw_ids: false"
         sample own_ids eval_new.json --redraw-ids
         ;;
      shuffled) grpo_arm shuffled "" --prompt-data "$DATA_DIR/telecom_train_tasks.jsonl" --rollout-shuffle ;;
      handovers) # the locked SIM, which ends in a hand-over, is a kind of prompts of its own
         timed handovers "$PYTHON" examples/tau-bench/tau2_mock.py --local_dir "$RUN_DIR/handovers" --splits train \
            --mix "lock_sim_card_pin=1,$GRPO_MIX" --num-rows 72 --seed "$SEED"
         grpo_arm handovers "" --prompt-data "$RUN_DIR/handovers/telecom_train_mix_tasks.jsonl"
         ;;
      full_rate) grpo_arm full_rate "" --lr 1e-4 ;;
      unfiltered)
         all_groups
         grpo_arm unfiltered ""
         ;;
      curriculum)
         collect "$SFT_DIR/hf" "$RUN_DIR/collected.json" --num-trials 2 --seed "$((SEED + 1))"
         grpo_arm curriculum "tau2_curriculum_start: [$RUN_DIR/collected.json]" \
            --data-source-path tau2_curriculum.CurriculumDataSource \
            --rollout-all-samples-process-path tau2_reward_shaping.process_all_samples
         ;;
      two_steps) grpo_arm two_steps "" --global-batch-size "$((GRPO_BATCH * 2))" ;;
      groups_of_8) grpo_arm groups_of_8 "" --n-samples-per-prompt 8 --rollout-batch-size "$(((GRPO_BATCH + 1) / 2))" \
         --over-sampling-batch-size "$GRPO_BATCH" ;;
      no_std) grpo_arm no_std "" --disable-grpo-std-normalization ;;
      tis)
         without --use-rollout-logprobs 0
         grpo_arm tis "" --use-tis --tis-clip 2.0 --tis-clip-low 0
         ;;
      kl) # on all groups: those that are solved throughout have no advantage, and are what is forgotten
         all_groups
         grpo_arm kl "" --use-kl-loss --kl-loss-coef 0.1 --kl-loss-type low_var_kl --ref-load "$SFT_DIR/hf"
         ;;
      taught) # each of the teacher's tokens weighs the same: by the trainer's log-probs
         without --use-rollout-logprobs 0
         grpo_arm taught $'tau2_teacher_samples: 1\ntau2_teacher_style: checklist'
         ;;
      penalty) grpo_arm penalty "tau2_customer_tool_penalty: 0.1" ;;
      mixed)
         MOOD=mixed CUSTOMER_ARGS=(--user-args '{"mood": "mixed"}')
         grpo_arm mixed ""
         sample sft eval_mixed.json
         timed mixed "$PYTHON" examples/tau-bench/evaluate_tau2.py compare "$SFT_DIR/eval_mixed.json" "$RUN_DIR/mixed/eval.json"
         ;;
      moods)
         timed moods "$PYTHON" examples/tau-bench/sensitivity.py --checkpoint "$RUN_DIR/rft/hf" --output-dir "$RUN_DIR/moods" \
            "${EPISODE_ARGS[@]}" "${EVAL_ARGS[@]}"
         ;;
   esac
}

control() { # the arm that is the same but for the lever
   case $1 in
      keep_mistakes | teacher) echo rft ;;
      own_ids | shuffled | handovers | unfiltered | curriculum) echo grpo ;;
      two_steps | full_rate | groups_of_8 | no_std | tis | kl | penalty | taught) echo grpo ;;
      mixed) echo mixed ;; # compared in its own arm
      *) echo sft ;;
   esac
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # sourced by the test of its commands

mkdir -p "$RUN_DIR"
"$PYTHON" -m slime_local.smollm2 --out "$MODEL_DIR"
make_tasks
sft sft
for arm in "${ARMS[@]}"; do
   say "$arm"
   (trap - INT && run_arm "$arm") &
   wait_for $!
done
for arm in "${ARMS[@]}"; do
   for result in eval.json eval_new.json; do
      beside=$RUN_DIR/$(control "$arm")/$result
      if [ -e "$RUN_DIR/$arm/$result" ] && [ -e "$beside" ] && [ "$(control "$arm")" != "$arm" ]; then
         say "$arm beside $(control "$arm"), $result"
         "$PYTHON" examples/tau-bench/evaluate_tau2.py compare "$beside" "$RUN_DIR/$arm/$result"
      fi
   done
done
