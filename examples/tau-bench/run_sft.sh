#!/usr/bin/env bash
# Stage 2: SFT on teacher traces. Edit the paths (absolute ones: a Ray job runs in
# another folder) and the arrays; flags given here go to train.py as its last ones (--lr 1e-5).
#   bash examples/tau-bench/run_sft.sh                slime, 2 GPUs
#   CHECK=1 bash examples/tau-bench/run_sft.sh        only check the command; PRINT=1 prints it
#   python -m slime_local.smollm2 --out runs/SmolLM2-135M-Instruct      on this machine, with a small model:
#   HOST=local MODEL=smollm2-135M-Instruct HF_DIR=runs/SmolLM2-135M-Instruct PROMPT=short bash examples/tau-bench/run_sft.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=${MODEL:-qwen3-4B-Instruct-2507}
HF_DIR=${HF_DIR:-/root/Qwen3-4B-Instruct-2507} # the model as downloaded; what is made lies beside it
TORCH_DIST_DIR=${TORCH_DIST_DIR:-${HF_DIR}_torch_dist} # and converted for Megatron
SFT_DIR=${SFT_DIR:-${HF_DIR}_sft_$DOMAIN}
DATA_DIR=${DATA_DIR:-$(dirname "$HF_DIR")/tau2-$DOMAIN}
PROMPT=${PROMPT:-official}
if [ "$DOMAIN" = telecom ]; then TRACES=${TRACES:-$DATA_DIR/teacher_traces.jsonl}; fi
TRACES=${TRACES:-$DATA_DIR/${DOMAIN}_teacher_traces.jsonl}

model_args
whole_number NUM_ROLLOUT "${NUM_ROLLOUT:-1}" SAVE_INTERVAL "${SAVE_INTERVAL:-1}"
need_driver
need_ray
need_model

# --save needs --save-interval: Megatron's parser ends without it. --load is this run's own folder, so that the same
# command continues an interrupted run; while it is empty, the weights come from --ref-load.
CKPT_ARGS=(
   --hf-checkpoint "$HF_DIR"
   --load "$SFT_DIR"
   --save "$SFT_DIR"
   --save-interval "${SAVE_INTERVAL:-25}"
   --save-hf "$SFT_DIR/hf_{rollout_id}" # an iteration folder has no tokenizer and no HF config: evaluate this one
)
[ "$HOST" = local ] || CKPT_ARGS+=(--ref-load "$TORCH_DIST_DIR")

# Without these flags slime trains a policy loss on reward 0, which is no training at all.
SFT_ARGS=(
   --rollout-function-path slime.rollout.sft_rollout.generate_rollout
   --loss-type sft_loss
   --calculate-per-token-loss
   --disable-compute-advantages-and-returns
   --debug-train-only
   --loss-mask-type qwen3 # the default, qwen, renders consecutive tool messages differently from the chat template
   --prompt-data "$TRACES"
   --input-key prompt
   --tool-key tools
   --rollout-shuffle
   --num-rollout "${NUM_ROLLOUT:-49}"
   --rollout-batch-size 8
   --n-samples-per-prompt 1
   --global-batch-size 8
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr "${LR:-2e-5}"
   --lr-decay-style cosine
   --lr-warmup-fraction 0.1
   --weight-decay 0.01
)

# With the official prompt (7,200 tokens) a teacher dialogue has 8,700 at most: packed by token count, recomputed backward.
PERF_ARGS=(
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 12288
   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1
)

MISC_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node "$NUM_GPUS"
   --num-gpus-per-node "$NUM_GPUS" # slime assumes 8 otherwise; there is no engine, so nothing to --colocate with
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   # --use-wandb --wandb-project tau2-warmup     (WANDB_API_KEY in the environment)
   # --use-tensorboard --tb-project-name tau2-warmup
)

TRACES_ARGS=(--local_dir "$DATA_DIR" --domain "$DOMAIN" --prompt "$PROMPT" --output "${TRACES%@\[*}") # slime takes FILE@[M:N]
if [ "${PRINT:-0}" = 1 ]; then
   : # nothing is written, nor looked at
elif [ -e "${TRACES%@\[*}" ]; then # made by an earlier command, maybe with other settings
   [[ $TRACES != *.jsonl* ]] || "$PYTHON" "$EXAMPLE/teacher_traces.py" "${TRACES_ARGS[@]}" --check
else
   [ "$DOMAIN" = telecom ] ||
      fail "DOMAIN=$DOMAIN has no scripted teacher: write $TRACES first, with teacher_traces.py --domain $DOMAIN --from-hub or --teacher-llm"
   write_tasks
   "$PYTHON" "$EXAMPLE/teacher_traces.py" "${TRACES_ARGS[@]}"
fi
launch "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${SFT_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${PERF_ARGS[@]}" "${MISC_ARGS[@]}" "$@"
