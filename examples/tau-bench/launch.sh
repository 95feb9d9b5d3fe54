# What run_sft.sh, run_grpo.sh and run_eval.sh share: where things lie, and how train.py is started with their arrays.
#   HOST=slime   (default) `ray job submit` to $RAY_ADDRESS; Ray is started here when nothing answers there
#   HOST=local   this machine, no Ray: slime_local
#   PRINT=1      print the command, one argument a line, and stop
#   CHECK=1      run_sft.sh, run_grpo.sh: write tasks and traces where there are none, check the command
#                (train.py --check-only, which asks the customer's model once) and stop
#   DOMAIN=...   telecom (default), retail or airline: names the files of tasks and traces, and the folders' defaults
fail() { # one line, exit code 2
   echo "error: $*" >&2
   exit 2
}

whole_number() { # whole_number NAME VALUE...: fails unless VALUE is a whole number above 0
   while [ $# -gt 1 ]; do
      [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1=$2: give a whole number above 0"
      shift 2
   done
}

EXAMPLE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$EXAMPLE/../.." && pwd) # this repository, or the slime checkout that the folder was copied into
HOST=${HOST:-slime}
DOMAIN=${DOMAIN:-telecom}
NUM_GPUS=${NUM_GPUS:-2}
RAY_ADDRESS=${RAY_ADDRESS:-http://127.0.0.1:8265}
MEGATRON_DIR=${MEGATRON_DIR:-/root/Megatron-LM}
VENV=${TAU2_VENV:-$ROOT/.venv}
if [ "$HOST" = local ] && [ -x "$VENV/bin/python" ]; then PYTHON=${PYTHON:-$VENV/bin/python}; fi
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$EXAMPLE:$ROOT${PYTHONPATH:+:$PYTHONPATH}
[ "$HOST" = local ] || [ "$HOST" = slime ] || fail "HOST=$HOST: choose slime or local"
command -v "$PYTHON" >/dev/null || fail "no $PYTHON on PATH: set PYTHON to Python 3.11 or newer"
[[ $DOMAIN =~ ^(telecom|retail|airline)$ ]] || fail "DOMAIN=$DOMAIN: choose telecom, retail or airline"
whole_number NUM_GPUS "$NUM_GPUS"

model_args() { # MODEL_ARGS of $MODEL
   [ -f "$ROOT/scripts/models/$MODEL.sh" ] ||
      fail "MODEL=$MODEL: there is no scripts/models/$MODEL.sh; there are: $(cd "$ROOT/scripts/models" && echo *.sh | sed 's/\.sh//g')"
   source "$ROOT/scripts/models/$MODEL.sh"
}

submits() { # whether `launch` will submit a job
   [ "$HOST" = slime ] && [ "${PRINT:-0}" != 1 ] && [ "${CHECK:-0}" != 1 ]
}

need_driver() { # slime's own train.py knows neither --host nor --check-only, ignores what it does not know, and trains
   submits || [ "${PRINT:-0}" = 1 ] || [ -d "$ROOT/slime_local" ] ||
      fail "CHECK=1 and HOST=local need the train.py of this repository, and $ROOT/train.py is another: run the script there"
}

need_ray() { # fails where `launch` would, before anything is written
   ! submits || command -v ray >/dev/null ||
      fail "HOST=slime: no ray on PATH: run it in slime's image, or HOST=local"
}

need_model() { # here the folder is looked at before tasks and traces are written beside it
   [ "$HOST" != local ] || [ "${PRINT:-0}" = 1 ] || [ -d "$HF_DIR" ] ||
      fail "no model folder at $HF_DIR (from $PWD): set HF_DIR; python -m slime_local.smollm2 --out FOLDER makes a small one"
}

need_start() { # need_start FOLDER LOAD: before anything is written; slime would look for it only when the engines are up
   if [ "$HOST" = local ]; then
      [ "${PRINT:-0}" != 1 ] || return 0
   else # the folders are maybe those of another machine
      submits && [[ $RAY_ADDRESS == http://127.0.0.1:* ]] || return 0
   fi
   [ -e "$1" ] || [ -e "$2" ] ||
      fail "$1 is not there: run run_sft.sh first, or set SFT_DIR to the checkpoint that GRPO starts from"
}

launch() { # launch ARG...: train.py with these arguments, in place of this shell: a TERM that ends one ends the other
   if [ "${PRINT:-0}" = 1 ]; then
      printf '%s\n' "python3 train.py" "$@"
   elif [ "${CHECK:-0}" = 1 ]; then
      exec "$PYTHON" "$ROOT/train.py" --host "$HOST" --check-only "$@"
   elif [ "$HOST" = local ]; then
      exec "$PYTHON" "$ROOT/train.py" --host local "$@"
   else
      start_ray
      ray job submit --address "$RAY_ADDRESS" --runtime-env-json "$(runtime_env)" -- python3 "$ROOT/train.py" "$@"
   fi
}

write_tasks() { # the tasks, into $DATA_DIR, unless they are there; telecom alone has a pool
   local splits=(train test)
   [ "$DOMAIN" != telecom ] || splits+=(pool)
   [ -e "$DATA_DIR/${DOMAIN}_${splits[-1]}_tasks.jsonl" ] ||
      "$PYTHON" "$EXAMPLE/tau2_mock.py" --local_dir "$DATA_DIR" --domain "$DOMAIN" --splits "${splits[@]}"
}

# Workers inherit the environment of the shell that starts Ray: export API keys there. They are not part of the
# runtime environment below, which everyone who can see the job can read.
start_ray() {
   export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # newer versions of Ray ask for one; older ones know nothing of it
   [ "$RAY_AUTH_MODE" != token ] || ray get-auth-token --generate >/dev/null 2>&1 || true
   "$PYTHON" - "$RAY_ADDRESS" <<'PY' ||
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/api/version", timeout=5)
except urllib.error.HTTPError:
    pass  # it answers
except OSError:
    sys.exit(1)
PY
      ray start --head --num-gpus "$NUM_GPUS" --disable-usage-stats --dashboard-host 127.0.0.1 --dashboard-port "${RAY_ADDRESS##*:}"
}

runtime_env() {
   MEGATRON_DIR=$MEGATRON_DIR "$PYTHON" - <<'PY'
import json, os
env = {"PYTHONPATH": f"{os.environ['MEGATRON_DIR']}:{os.environ['PYTHONPATH']}", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
env |= {name: os.environ[name] for name in ("TAU2_DATA_DIR", "HF_HUB_OFFLINE") if name in os.environ}
print(json.dumps({"env_vars": env}))
PY
}
