#!/usr/bin/env bash
# The newest megatron-core of the range under the tests that lean on it most, and ten steps of the quickstart.
#
#   bash tests/stack_leg.sh            0.19.2
#   bash tests/stack_leg.sh 0.17.1     another one
#
# Its wheels want Python 3.12 and hold one compiled file that only GPT's data sets use: its Python is unpacked and put in
# front of what is installed, so that this runs on the interpreter and the torch at hand, 2 MB of download.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/common.sh
. examples/setup.sh
ensure_environment test

version=${1:-0.19.2}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest "$folder" "megatron-core==$version"
python -m zipfile -e "$folder"/megatron_core-*.whl "$folder/unpacked"
export PYTHONPATH="$folder/unpacked:$PWD${PYTHONPATH:+:$PYTHONPATH}"
python - "$version" <<'PY'
import sys
from models.versions import megatron_core_version
found = megatron_core_version()
sys.exit(0 if found == sys.argv[1] else f"megatron-core {found} would be imported, not {sys.argv[1]}")
PY
TEST_WORKERS=2 python -m pytest -q -m "not slow" tests/engine/test_device.py tests/models/test_golden.py \
  tests/models/test_golden_parallel.py tests/models/test_backends.py tests/models/test_mim_parallel.py \
  tests/checkpoint/test_saving.py tests/engine/test_kept_outputs.py

# Up to the scores: what follows there asks megatron-core for nothing further. Pictures that the quickstart drew are taken.
if [ -f runs/quickstart/shards/stats.json ]; then
  mkdir "$folder/quickstart"
  cp -r runs/quickstart/shards "$folder/quickstart/shards"
fi
RUN_DIR=$folder/quickstart bash examples/quickstart/run.sh --no-suite train.steps=10 optim.warmup_steps=3
