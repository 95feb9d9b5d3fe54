#!/usr/bin/env bash
# Stage 4: evaluation of a checkpoint on the test tasks of $DOMAIN (telecom and retail 40, airline 20).
#   export GEMINI_API_KEY=... && CHECKPOINT=/root/..._rl_telecom/hf_73 bash examples/tau-bench/run_eval.sh
#   CHECKPOINT=/root/..._rl_telecom/iter_0000073 bash examples/tau-bench/run_eval.sh     converts it first
#   CHECKPOINT=runs/local/sft/hf CUSTOMER=scripted PROMPT=short HOST=local bash examples/tau-bench/run_eval.sh
# With no server on $PORT one is started: sglang.launch_server on a GPU machine that has it, else slime_local's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

[ "${CHECK:-0}" != 1 ] || fail "CHECK=1 belongs to run_sft.sh and run_grpo.sh: an evaluation checks its flags before it begins"
[ -n "${CHECKPOINT:-}" ] || fail "set CHECKPOINT to the folder to evaluate: an HF folder (--save-hf), or an iteration folder of slime"
HF_DIR=${HF_DIR:-/root/Qwen3-4B-Instruct-2507} # where the converter takes config and tokenizer from
SLIME_DIR=${SLIME_DIR:-/root/slime}
OUTPUT=${OUTPUT:-$(basename "$(dirname "$CHECKPOINT")")_$(basename "$CHECKPOINT").json}
CUSTOMER=${CUSTOMER:-llm}
PROMPT=${PROMPT:-official}

whole_number NUM_TRIALS "${NUM_TRIALS:-1}" PORT "${PORT:-30000}"
[ "${PRINT:-0}" = 1 ] || case $(basename "$CHECKPOINT") in iter_*)
   [ -e "${CHECKPOINT}_hf/config.json" ] || [ -f "$SLIME_DIR/tools/convert_torch_dist_to_hf.py" ] ||
      fail "$CHECKPOINT is an iteration folder, and SLIME_DIR=$SLIME_DIR holds no slime to convert it: set SLIME_DIR, or evaluate an HF folder"
   [ -e "${CHECKPOINT}_hf/config.json" ] || { # whole or not at all: --force goes over what an interruption left
      PYTHONPATH=$MEGATRON_DIR:$SLIME_DIR "$PYTHON" "$SLIME_DIR/tools/convert_torch_dist_to_hf.py" --force \
         --input-dir "$CHECKPOINT" --output-dir "${CHECKPOINT}_hf.part" --origin-hf-dir "$HF_DIR"
      rm -rf "${CHECKPOINT}_hf" && mv "${CHECKPOINT}_hf.part" "${CHECKPOINT}_hf"
   }
   CHECKPOINT=${CHECKPOINT}_hf
esac

EVAL_ARGS=(
   --domain "$DOMAIN"
   --task-split test
   --user "$CUSTOMER"
   --prompt "$PROMPT"
   --num-trials "${NUM_TRIALS:-1}"
   --temperature "${TEMPERATURE:-0.0}"
   --sglang-port "${PORT:-30000}"
)

COMMAND=("$EXAMPLE/evaluate_tau2.py" --checkpoint "$CHECKPOINT" --output-path "$OUTPUT" "${EVAL_ARGS[@]}" "$@")
if [ "${PRINT:-0}" = 1 ]; then
   printf '%s\n' "$PYTHON" "${COMMAND[@]}"
else
   exec "$PYTHON" "${COMMAND[@]}" # in place of this shell: a TERM that ends one ends the other
fi
