#!/usr/bin/env bash
# nvidia-resiliency-ext on a glibc before 2.39 (Debian 12: 2.36), Python 3.12.
# Guess: pip gives the newest release. Behaviour: the wheels of 0.5.0 to 0.7.0 are manylinux_2_39, so pip takes 0.4.1 without
# a word, while megatron-core's extra `dev` asks for ==0.6.0.
# shellcheck source=findings/packages.sh
. "$(dirname "$0")/packages.sh"
fetch() {  # platforms…; the file that pip chooses
  local platforms=()
  for platform in "$@"; do platforms+=(--platform "$platform"); done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 "${platforms[@]}" \
    --dest "$work/$1" "nvidia-resiliency-ext<=0.7.0" 2> /dev/null
  basename "$work/$1"/*.whl
}
old=()
for minor in 36 35 34 31 28 27 24 17; do old+=("manylinux_2_${minor}_x86_64"); done
expect "glibc 2.36" "nvidia_resiliency_ext-0.4.1" "$(fetch "${old[@]}")"
expect "glibc 2.39" "nvidia_resiliency_ext-0.7.0" "$(fetch manylinux_2_39_x86_64 "${old[@]}")"
