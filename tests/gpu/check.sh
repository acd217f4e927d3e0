#!/usr/bin/env bash
# What a first GPU is asked, in at most eight minutes: right first, then fast. One H200-class GPU, Python 3.12 and torch 2.11 as
# images have them, no network. Needs .whl/ (bash tests/gpu/wheels.sh, on a machine with a network, travels with the checkout).
#
#   bash tests/gpu/check.sh            a GPU
#   bash tests/gpu/check.sh --cpu      the same parts at toy size, in a minute: is the script itself sound?
#
# Leaves $OUT (runs/gpu-check): a JSON file a part, written number by number; summary.json; h200-measured.yaml, which
# `python -m tools.plan --gpu FILE` reads. A part that fails or runs out of time does not keep the next from its turn; what
# has not begun after eight minutes is skipped, and said.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
. examples/common.sh
out=${OUT:-runs/gpu-check}
mode=() patience=1
case "${1:-}" in
  "") ;;
  --cpu) mode=(--cpu) patience=10 ;;  # a loaded machine is no fault of the script
  *) echo "usage: bash tests/gpu/check.sh [--cpu]" >&2; exit 2 ;;
esac
mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.yaml "$out"/*.log "$out"/*.partial

if [ ${#mode[@]} -gt 0 ]; then
  . examples/setup.sh
  ensure_environment test || exit 1
  export CUDA_VISIBLE_DEVICES=""
else
  # The image's torch stays; what is missing comes from .whl/, without requirements, into an environment of its own.
  # shellcheck disable=SC1091
  python3 -m venv --system-site-packages build/gpu-check && . build/gpu-check/bin/activate || exit 1
  python - <<'PY' > "$out/missing.txt"
import importlib.util
names = {"megatron": "megatron-core", "yaml": "pyyaml", "safetensors": "safetensors", "ftfy": "ftfy",
         "wcwidth": "wcwidth", "tokenizers": "tokenizers", "rich": "rich", "markdown_it": "markdown-it-py", "mdurl": "mdurl",
         "pygments": "pygments", "pytest": "pytest", "pluggy": "pluggy", "iniconfig": "iniconfig", "PIL": "pillow",
         "packaging": "packaging", "numpy": "numpy", "matplotlib": "matplotlib", "contourpy": "contourpy", "cycler": "cycler",
         "fontTools": "fonttools", "kiwisolver": "kiwisolver", "pyparsing": "pyparsing", "dateutil": "python-dateutil",
         "six": "six"}
print("\n".join(wheel for module, wheel in names.items() if importlib.util.find_spec(module) is None))
PY
  if [ -s "$out/missing.txt" ]; then
    if ! python -m pip install --quiet --no-index --find-links .whl --no-deps --requirement "$out/missing.txt"; then
      echo "this image lacks $(paste -sd ' ' "$out/missing.txt"): run tests/gpu/wheels.sh where there is a network" >&2
      exit 1
    fi
  fi
  export OMP_NUM_THREADS=4
fi

# Everything so far in summary.json; prints the seconds. A part that was killed has left its numbers, and status "running".
summarise() {
  python - "$out" <<'PY'
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
times = [json.loads(line) for line in (out / "times.jsonl").read_text().splitlines()]
parts = {f.stem: json.loads(f.read_text()) for f in sorted(out.glob("*.json")) if f.stem not in ("doctor-report", "summary")}
(out / "summary.json").write_text(json.dumps({"times": times, "parts": parts}, indent=1) + "\n")
print(sum(t["seconds"] for t in times))
PY
}

failed=() skipped=()
# Everything together; EVA_CHECK_SECONDS is for trying the limit out.
over=$((SECONDS + ${EVA_CHECK_SECONDS:-$((480 * patience))}))
# part NAME LIMIT_S COMMAND…: under a limit, and that of the whole; its words in NAME.log, its time in times.jsonl
part() {
  local name=$1 limit=$(($2 * patience)) start=$SECONDS status=0
  shift 2
  if [ "$SECONDS" -ge "$over" ]; then
    printf '%-12s skipped: the time of the whole check is over\n' "$name"
    printf '{"part": "%s", "seconds": 0, "status": "skipped"}\n' "$name" >> "$out/times.jsonl"
    skipped+=("$name")
    return
  fi
  if [ $((over - SECONDS)) -lt "$limit" ]; then limit=$((over - SECONDS)); fi
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  printf '%-12s %4d s  status %d  %s\n' "$name" $((SECONDS - start)) "$status" "$(tail -n 1 "$out/$name.log" | cut -c1-120)"
  printf '{"part": "%s", "seconds": %d, "status": %d}\n' "$name" $((SECONDS - start)) "$status" >> "$out/times.jsonl"
  [ "$status" -eq 0 ] || failed+=("$name")
  summarise > /dev/null
}
: > "$out/times.jsonl"
gpu_only() { [ ${#mode[@]} -eq 0 ]; }
module=(python -m tests.gpu.check --out "$out" "${mode[@]}")

part doctor 60 python -m tools.doctor --out "$out/doctor-report.json"
if gpu_only; then part device 60 python -m pytest -q -m gpu tests/engine/test_device.py; fi
part golden 60 "${module[@]}" golden
part curve-cpu 90 env CUDA_VISIBLE_DEVICES= "${module[@]}" curve-cpu quickstart-cpu
part curve 90 "${module[@]}" curve quickstart
part blocks 150 "${module[@]}" gemm blocks
part rest 90 "${module[@]}" fp8 loss lamb copies tokenizer
if gpu_only; then
  python -c "import nvidia.dali" 2> /dev/null && part dali 60 python -m pytest -q -m gpu tests/data/test_dali.py
fi
# Two ranks on one GPU: NCCL may refuse that ("Duplicate GPU"), which is an answer and no failure of ours.
part nccl 60 torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 --no-python \
  bash -c 'LOCAL_RANK=0 exec python -m tools.doctor'
if grep -qs "Duplicate GPU" "$out/nccl.log"; then failed=("${failed[@]/nccl/}"); fi
over=$((SECONDS + 30 * patience))  # of what was measured, in any case
part profile 30 "${module[@]}" profile

echo "$(summarise) s; $out/summary.json"
read -ra failed <<< "${failed[*]:-}"
if [ ${#skipped[@]} -gt 0 ]; then echo "not run, the time was over: ${skipped[*]}" >&2; fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; see $out/PART.log and $out/PART.json" >&2
  exit 1
fi
