#!/usr/bin/env bash
# instant-clip-tokenizer 0.1.1, Python 3.13.
# Guess: a Rust extension of CLIP's tokenizer installs on the Python of today. Behaviour: its wheels are for CPython 3.11 and
# 3.12 one by one (no abi3) and 0.1.1 has no source archive, so on 3.13 pip falls back to the sources of 0.1.0 and wants Rust.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
for version in 3.12 3.13; do
  seen=$("$python" -m pip download --no-deps --only-binary=:all: --python-version "$version" --dest "$work/$version" \
    instant-clip-tokenizer==0.1.1 2>&1 | grep -E "^Saved|^Successfully|No matching" | tail -1 || true)
  case $version in
    3.12) expect "$version" "Successfully downloaded" "$seen" ;;
    *) expect "$version" "No matching distribution found" "$seen" ;;
  esac
done
