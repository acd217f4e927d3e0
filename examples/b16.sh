#!/usr/bin/env bash
# EVA-02-CLIP-B/16 on image-text pairs, from scratch or going on from weights, on one node or eight.
# Settings with their sources: examples/b16.yaml. On every node:
#
#   SHARDS='…/{00000..09999}.tar' bash examples/b16.sh [dotted.key=value …]
#   NODES=8 HEAD_NODE=host SHARDS='…/{00000..09999}.tar' bash examples/b16.sh [dotted.key=value …]
#
# SHARDS         image-text shards
# VISION, TEXT   what the towers go on from: run folder, checkpoint or the authors' file; not set: from scratch
# RUN_DIR        what is written, on storage that all nodes share
#
# Expected on A100-40 (tools.plan, projected; not run on a GPU):
#   NODES=1                   batch 4,096, 6,400 samples/s, 5 GB a GPU, 0.7 days for 0.41 B samples
#   NODES=8                   batch 32,768, 51,200 samples/s, 5 GB a GPU, 0.1 days for 0.41 B samples
#
# NODES, HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh. On another number of nodes give the batch.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
. examples/launch.sh

: "${NODES:=1}"
case "$NODES" in
  1) job=() ;;
  8)
    job=(
      train.global_batch_size=32768 train.steps=12500 optim.lr_vision=5.0e-4 optim.lr_text=5.0e-4
      optim.lr_other=5.0e-4
    )
    ;;
  *) job=() ;;
esac
need SHARDS
knob SHARDS data.shards
knob VISION init.vision
knob TEXT init.text
knob RUN_DIR run_dir
launch examples/b16.yaml "${job[@]}" "$@"
