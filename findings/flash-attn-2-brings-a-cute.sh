#!/usr/bin/env bash
# flash-attn 2.8.3.post2.
# Guess: where `flash_attn.cute` is found, flash-attn 4 is installed. Behaviour: flash-attn 2 brings an early one along, whose
# flash_attn_varlen_func takes no max_seqlen_q and has no backward. Both packages write the same files, so of two that are
# installed the later wins. (Its sources are read: nothing is compiled.)
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
install torch==2.13.0 numpy==2.4.6 psutil==7.2.2 setuptools==80.9.0 wheel==0.45.1 packaging==25.0
FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE PYTHONPATH="$PACKAGES" "$python" -m pip download --quiet --no-deps \
  --no-binary=:all: --no-build-isolation --dest "$work/sources" flash-attn==2.8.3.post2 2> "$work/pip.log" \
  || { cat "$work/pip.log" >&2; exit 1; }
seen=$("$python" - "$work"/sources/*.tar.gz <<'PY'
import ast
import sys
import tarfile

with tarfile.open(sys.argv[1]) as sources:
    root = sources.getnames()[0].split("/")[0]
    interface = ast.parse(sources.extractfile(f"{root}/flash_attn/cute/interface.py").read())
    package = f"{root}/flash_attn/cute/__init__.py" in sources.getnames()
varlen = next(node for node in interface.body if getattr(node, "name", "") == "flash_attn_varlen_func")
names = [argument.arg for argument in varlen.args.args]
function = next(node for node in interface.body if getattr(node, "name", "") == "FlashAttnVarlenFunc")
backward = next(node for node in function.body if getattr(node, "name", "") == "backward")
raises = any(isinstance(node, ast.Raise) for node in backward.body)
print(f"a package: {package}, takes max_seqlen_q: {'max_seqlen_q' in names}, its backward only raises: {raises}")
PY
)
expect "flash_attn/cute" "a package: True, takes max_seqlen_q: False, its backward only raises: True" "$seen"
