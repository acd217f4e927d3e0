#!/usr/bin/env bash
# Uni3D in miniature: a point transformer is distilled into the space of a small CLIP, and then names coloured shapes
# in combinations that neither it nor the CLIP has seen, by the text embeddings alone. Two CPU ranks.
#
#   bash examples/uni3d/run.sh           the whole run, about 2 minutes on 2 cores
#   bash examples/uni3d/run.sh --short   a few steps of each part, to see that everything works
#
# Shapes, their pictures and captions are made by shapes.py; the features pass through files as Uni3D's public code reads
# them (docs/uni3d.md). Result: a line, and runs/uni3d/result.json.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/common.sh
. examples/setup.sh
is_dry || ensure_environment eval

steps=() instances=4 distil=200
case "${1:-}" in
  "") ;;
  --short) steps=(train.steps=4 optim.warmup_steps=2 checkpoint.every_steps=4) instances=1 distil=4 ;;
  *) echo "usage: bash examples/uni3d/run.sh [--short]" >&2; exit 2 ;;
esac

run=runs/uni3d
ranks=(torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2)
start rm -rf "$run"
start python -m examples.uni3d.shapes "$run" --instances "$instances"
start "${ranks[@]}" -m engine.train examples/uni3d/clip.yaml "${steps[@]}"
start "${ranks[@]}" -m tools.embed --checkpoint "$run/clip" --shards "$run/shards/train" --out "$run/views.npz"
start "${ranks[@]}" -m tools.embed --checkpoint "$run/clip" --shards "$run/shards/names.tar" --out "$run/names.npz"
start python -m examples.uni3d.layout "$run" --views "$run/views.npz" --texts "$run/names.npz"
start python -m examples.uni3d.distil "$run" --steps "$distil"
