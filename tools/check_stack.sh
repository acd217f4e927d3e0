#!/usr/bin/env bash
# The table "what runs with what" of docs/results/install.md, cell by cell: Python × torch × megatron-core.
#
#   bash tools/check_stack.sh                              the cells of the active environment's Python and torch
#   bash tools/check_stack.sh 3.13:2.14.1:0.19.2 …         these cells; another Python or torch gets an environment of its own
#   FULL=1 bash tools/check_stack.sh …                     the whole suite but for the slow tests, in place of the subset
#   KEEP=FOLDER bash tools/check_stack.sh …                environments are made in, and taken from, FOLDER/PYTHON-TORCH
#
# A cell is Python:torch:megatron-core. Prints one row a cell and leaves the output of its tests in runs/stack/CELL.log. From
# PyPI torch is a CUDA build of 3 GB unless pip is pointed at builds for CPUs. Ends with status 1 if a cell failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
. examples/common.sh
. examples/setup.sh
ensure_environment test || exit 1
logs=runs/stack
mkdir -p "$logs"
if [ -n "${KEEP:-}" ]; then
  mkdir -p "$KEEP" && folder=$(cd "$KEEP" && pwd) || exit 1
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi

# Devices; the authors' numbers on one rank and on several; checkpoints; training, saving, converting and scoring in turn.
subset=(tests/engine/test_device.py tests/models/test_golden.py tests/models/test_golden_parallel.py
  tests/checkpoint/test_saving.py tests/tools/test_pairs.py)
if [ -n "${FULL:-}" ]; then subset=(tests); fi
here=$(python -c 'import sys, torch; print(f"{sys.version_info[0]}.{sys.version_info[1]}:" + torch.__version__.split("+")[0])')
cells=("$@")
if [ $# -eq 0 ]; then cells=("$here:0.16.1" "$here:0.17.1" "$here:0.18.2" "$here:0.19.2"); fi

# interpreter PYTHON TORCH: prints the Python to use, in a fresh environment where the active one has other versions
interpreter() {
  if [ "$1:$2" = "$here" ]; then command -v python; return; fi
  local made=$folder/$1-$2
  if [ ! -x "$made/bin/python" ]; then
    "python$1" -m venv "$made" && "$made/bin/pip" install --quiet "torch==$2" setuptools >&2 || return 1
  fi
  "$made/bin/pip" install --quiet --editable ".[test]" >&2 && echo "$made/bin/python"
}

# unpacked PYTHON VERSION: prints a folder with that megatron-core's Python; 0.17 and later have wheels for 3.12 and later
unpacked() {
  local for_python=3.12
  if [ "$2" = 0.16.1 ]; then for_python=3.11; fi
  if [ ! -d "$folder/mcore-$2" ]; then
    "$1" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$for_python" --dest "$folder/wheel-$2" \
      "megatron-core==$2" >&2 && "$1" -m zipfile -e "$folder/wheel-$2"/*.whl "$folder/mcore-$2" || return 1
  fi
  echo "$folder/mcore-$2"
}

failed=0
echo "| Python | torch | megatron-core | tests | seconds |"
echo "| --- | --- | --- | --- | --- |"
for cell in "${cells[@]}"; do
  IFS=: read -r python torch megatron <<< "$cell"
  log=$logs/$python-$torch-$megatron.log
  start=$SECONDS
  if run=$(interpreter "$python" "$torch" 2> "$log") && files=$(unpacked "$run" "$megatron" 2>> "$log"); then
    PYTHONPATH="$files:$PWD" "$run" -m pytest -q -p no:cacheprovider -m "not slow" "${subset[@]}" >> "$log" 2>&1 || failed=1
  else
    failed=1
  fi
  build=$("$run" -c 'import torch; print(torch.__version__)' 2> /dev/null || echo "$torch")
  echo "| $python | $build | $megatron | $(tail -n 1 "$log" | sed 's/ in .*//; s/=//g') | $((SECONDS - start)) |"
done
exit "$failed"
