#!/usr/bin/env bash
# Sets up .venv and runs the tests: the fast ones, or what the arguments say (they go to pytest).
#   bash tests/run.sh                        bash tests/run.sh -m slow                 bash tests/run.sh tests/test_mock.py -x
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash scripts/setup_env.sh
export HF_HUB_OFFLINE=1
# Tiny models: a second thread only waits, and several processes would share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH="$root/examples/tau-bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${TAU2_VENV:-.venv}/bin/python" -m pytest "$@"
