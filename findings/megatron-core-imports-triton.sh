#!/usr/bin/env bash
# megatron-core 0.18.2 and 0.19.2 (PyPI), torch 2.13.0 without Triton.
# Guess: `import megatron.core` works wherever its requirements (torch, numpy, packaging) are installed.
# Behaviour: since 0.18 it also imports Triton, for one module of its experts, and Triton is not among the requirements; torch
# brings it along in CUDA builds only. 0.16.1 and 0.17.1 import.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6 packaging==26.4
for version in 0.17.1 0.18.2 0.19.2; do
  unpack "megatron-core==$version" "$version"
  echo "$version requires: $(grep '^Requires-Dist' "$work/$version"/*.dist-info/METADATA | grep -v extra | tr '\n' ' ')"
  seen=$(PYTHONPATH="$work/$version:$PACKAGES" "$python" -W ignore -c "import megatron.core; print('imported')" 2>&1 | tail -1 || true)
  case $version in
    0.17.1) expect "$version" "imported" "$seen" ;;
    *) expect "$version" "No module named 'triton'" "$seen" ;;
  esac
done
