#!/usr/bin/env bash
# Writes requirements/local.lock: every package of the local environment except torch and what torch alone needs, with the
# hashes of its files, for Linux on x86_64 and Python 3.11 to 3.13. Run it after a change of requirements/*.txt.
#   UV=uv bash scripts/lock.sh [constraints.txt]      with constraints (pip freeze), indirect versions stay as they are
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
uv=${UV:-uv}
command -v "$uv" >/dev/null || { echo "error: no $uv: pip install uv, or set UV" >&2 && exit 2; }

flags=(--quiet --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links
   --python-version 3.11 --python-platform x86_64-manylinux_2_28)
cd "$root/requirements"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo torch >"$work/torch.in"
constraints=${1:+--constraints=$1}
"$uv" pip compile "${flags[@]}" local.txt dev.txt ${constraints:+"$constraints"} --output-file "$work/all"
torch_only=()
for name in $(sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' "$work/all"); do
   case $name in torch | triton | setuptools | cuda-* | nvidia-*) torch_only+=(--no-emit-package "$name") ;; esac
done
"$uv" pip compile "${flags[@]}" local.txt dev.txt ${constraints:+"$constraints"} "${torch_only[@]}" --output-file "$work/most"
"$uv" pip compile "${flags[@]}" --no-deps no-deps.txt --output-file "$work/rest"
{
   echo "# Made by scripts/lock.sh: do not edit. requirements/*.txt say what is wanted; this says which files."
   cat "$work/most" "$work/rest"
} >"$work/lock"
mv "$work/lock" local.lock
