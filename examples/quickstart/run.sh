#!/usr/bin/env bash
# Quickstart: a pipelined, tensor-parallel EVA-CLIP learns from real pictures on four CPU ranks, and is tested on
# gesture x skin tone combinations that it never saw.
#
#   bash examples/quickstart/run.sh           the whole run, about 10 minutes on 2 shared cores
#   bash examples/quickstart/run.sh --short   30 steps, to see that everything works
#   bash examples/quickstart/run.sh --short --no-suite   the same up to the scores of what was held out
#   bash examples/quickstart/run.sh train.steps=100      with settings of one's own, not beside --short
#   DRY_RUN=1 bash examples/quickstart/run.sh  prints the commands and starts nothing
#   RUN_DIR=FOLDER bash examples/quickstart/run.sh  in place of runs/quickstart
#
# Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0. Result: runs/quickstart/{result.json,report.html,report.png}.
# Last, a suite of one real set, scans of handwritten digits (scikit-learn): runs/quickstart/digits/index.html.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/common.sh
. examples/setup.sh

overrides=()
suite=1
for option in "$@"; do
  case "$option" in
    --short) overrides+=(train.steps=30 optim.warmup_steps=10 log.every_steps=5) ;;
    --no-suite) suite="" ;;
    [a-z]*=*) overrides+=("$option") ;;
    *) echo "usage: bash examples/quickstart/run.sh [--short | KEY=VALUE...] [--no-suite]" >&2; exit 2 ;;
  esac
done
is_dry || ensure_environment emoji eval

run=${RUN_DIR:-runs/quickstart}
if [ "$run" != runs/quickstart ]; then overrides+=("data.shards=$run/shards/train" "run_dir=$run"); fi
ranks=(torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 4)
start python -m tools.prepare_emoji --out "$run/shards"
start rm -rf "$run/checkpoints" "$run/metrics.jsonl"
start "${ranks[@]}" -m engine.train examples/quickstart/train.yaml "${overrides[@]}"
start "${ranks[@]}" -m tools.evaluate "$run" "$run/shards/heldout" \
  --out "$run/result.json" --predictions "$run/predictions.json"
[ -n "$suite" ] || exit 0
start python examples/quickstart/digits.py "$run/sets"
start "${ranks[@]}" -m tools.evaluate "$run" --suite "$run/sets/suite.yaml" --data "$run/sets" \
  --out "$run/digits" --transform both --probe linear knn
start python -m tools.report "$run" --png "$run/report.png"
