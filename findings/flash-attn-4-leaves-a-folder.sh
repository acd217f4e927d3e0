#!/usr/bin/env bash
# flash-attn-4 4.0.0b36, alone, without flash-attn 2.
# Guess: where `import flash_attn` works and importlib finds it, flash-attn 2 is installed. Behaviour: version 4 installs
# flash_attn/cute and no flash_attn/__init__.py, so flash_attn is an empty namespace without flash_attn_varlen_func.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
unpack flash-attn-4==4.0.0b36 fa4
look='
from importlib.util import find_spec
spec = find_spec("flash_attn")
import flash_attn
print(spec is not None, flash_attn.__file__, hasattr(flash_attn, "flash_attn_varlen_func"))'
expect "found, file, has its function" "True None False" "$(PYTHONPATH=$work/fa4 "$python" -c "$look")"
