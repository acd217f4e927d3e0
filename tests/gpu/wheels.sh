#!/usr/bin/env bash
# Gathers into .whl/ what tests/gpu/check.sh may miss on a machine with a GPU, Python 3.12, torch and no network: at most 64 MB.
#
#   bash tests/gpu/wheels.sh           for Python 3.12
#   bash tests/gpu/wheels.sh 3.11      for another one
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/common.sh
mkdir -p .whl
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${1:-3.12}" --dest .whl \
  megatron-core==0.19.2 numpy pyyaml safetensors ftfy wcwidth tokenizers rich markdown-it-py mdurl pygments \
  pytest pluggy iniconfig packaging pillow matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six
size_mb=$(du -sm .whl | cut -f1)
echo "$(find .whl -name '*.whl' | wc -l) wheels, $size_mb MB in .whl/"
if [ "$size_mb" -gt 64 ]; then
  echo "more than 64 MB: take old versions out of .whl/" >&2
  exit 1
fi
