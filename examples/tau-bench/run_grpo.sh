#!/usr/bin/env bash
# Stage 3: GRPO with the shaped reward, from the SFT checkpoint. Edit the paths (absolute ones: a Ray job runs in
# another folder) and the arrays; flags given here go to train.py as its last ones (--lr 1e-5).
#   export GEMINI_API_KEY=... && bash examples/tau-bench/run_grpo.sh     slime, 2 GPUs; the customer is an LLM
#   CHECK=1 bash examples/tau-bench/run_grpo.sh                          only check the command; PRINT=1 prints it
#   DOMAIN=retail bash examples/tau-bench/run_grpo.sh                    or airline
#   HOST=local MODEL=smollm2-135M-Instruct HF_DIR=runs/SmolLM2-135M-Instruct CONFIG=examples/tau-bench/local.yaml \
#      bash examples/tau-bench/run_grpo.sh                               here, after run_sft.sh with the same HF_DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=${MODEL:-qwen3-4B-Instruct-2507}
HF_DIR=${HF_DIR:-/root/Qwen3-4B-Instruct-2507}
SFT_DIR=${SFT_DIR:-${HF_DIR}_sft_$DOMAIN}
RL_DIR=${RL_DIR:-${HF_DIR}_rl_$DOMAIN}
DATA_DIR=${DATA_DIR:-$(dirname "$HF_DIR")/tau2-$DOMAIN}
CONFIG=${CONFIG:-$EXAMPLE/slime.yaml} # prompt and customer
ROLLOUT_BATCH=${ROLLOUT_BATCH:-8}

model_args
whole_number ROLLOUT_BATCH "$ROLLOUT_BATCH" NUM_ROLLOUT "${NUM_ROLLOUT:-1}" SAVE_INTERVAL "${SAVE_INTERVAL:-1}" \
   EVAL_INTERVAL "${EVAL_INTERVAL:-1}" RESPONSE_LEN "${RESPONSE_LEN:-1}" CONTEXT_LEN "${CONTEXT_LEN:-1}"
need_driver
need_ray
need_model
need_start "$SFT_DIR" "$RL_DIR"

# The start is --ref-load, the newest SFT checkpoint (another one: --ref-ckpt-step N). An iteration folder as --load
# would be silently passed over, and --load SFT_DIR would continue SFT's optimizer and its place in the data.
CKPT_ARGS=(
   --hf-checkpoint "$HF_DIR"
   --ref-load "$SFT_DIR"
   --load "$RL_DIR"
   --save "$RL_DIR"
   --save-interval "${SAVE_INTERVAL:-20}"
   --save-hf "$RL_DIR/hf_{rollout_id}"
)

ROLLOUT_ARGS=(
   --prompt-data "$DATA_DIR/${DOMAIN}_train_tasks.jsonl"
   --input-key index
   --rollout-shuffle
   --num-rollout "${NUM_ROLLOUT:-74}"
   --rollout-batch-size "$ROLLOUT_BATCH"
   --n-samples-per-prompt 4
   --global-batch-size "$((ROLLOUT_BATCH * 4))" # all samples of a rollout: one optimizer step, on-policy
   --rollout-max-response-len "${RESPONSE_LEN:-4096}" # of the whole episode after the prompt; the teacher needs 1,520
   --rollout-max-context-len "${CONTEXT_LEN:-16384}"
   --rollout-temperature 0.7
   --custom-generate-function-path generate_with_tau.generate
   --custom-reward-post-process-path tau2_reward_shaping.tau2_reward_post_process
   --custom-rollout-log-function-path tau2_reward_shaping.log_rollout
   --custom-eval-rollout-log-function-path tau2_reward_shaping.log_eval_rollout
   --custom-config-path "$CONFIG"
)

# A validation curve (telecom) on tasks that are neither trained on nor near the test tasks; those are for run_eval.sh alone.
EVAL_ARGS=()
[ "$DOMAIN" != telecom ] || EVAL_ARGS=(
   --eval-interval "${EVAL_INTERVAL:-10}"
   --eval-prompt-data pool "$DATA_DIR/telecom_pool_tasks.jsonl@[0:40]"
   --eval-input-key index
   --n-samples-per-eval-prompt 1
   --eval-temperature 0.0
)

# No --use-kl-loss: the reference costs a forward pass and is not used by this recipe.
GRPO_ARGS=(
   --advantage-estimator grpo
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr "${LR:-1e-6}"
   --lr-decay-style cosine
   --lr-warmup-fraction 0.1
   --weight-decay 0.01
)

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
   --rollout-num-gpus "$NUM_GPUS"
   --num-gpus-per-node "$NUM_GPUS" # slime assumes 8 otherwise
   --colocate
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.7
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   # --use-wandb --wandb-project tau2-warmup     (WANDB_API_KEY in the environment)
   # --use-tensorboard --tb-project-name tau2-warmup
)

[ "${PRINT:-0}" = 1 ] || write_tasks
launch "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" "${PERF_ARGS[@]}" "${MISC_ARGS[@]}" "$@"
