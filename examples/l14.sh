#!/usr/bin/env bash
# EVA-02-CLIP-L/14 on image-text pairs, from scratch or going on from weights, on one node or eight.
# Settings with their sources: examples/l14.yaml. On every node:
#
#   SHARDS='…/{00000..09999}.tar' bash examples/l14.sh [dotted.key=value …]
#   NODES=8 HEAD_NODE=host SHARDS='…/{00000..09999}.tar' bash examples/l14.sh [dotted.key=value …]
#
# SHARDS         image-text shards
# VISION, TEXT   what the towers go on from: run folder, checkpoint or the authors' file; not set: from scratch
# RUN_DIR        what is written, on storage that all nodes share
#
# Expected on A100-40 (tools.plan, projected; not run on a GPU):
#   NODES=1                   batch 2,048, 4,322 samples/s, 27 GB a GPU, 4.4 days for 1.64 B samples
#   NODES=8                   batch 16,384, 34,407 samples/s, 26 GB a GPU, 0.6 days for 1.64 B samples
#
# NODES, HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh. On another number of nodes give the batch.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
. examples/launch.sh

: "${NODES:=1}"
case "$NODES" in
  1)
    job=(
      train.global_batch_size=2048 train.steps=800000 optim.lr_vision=1.0e-4 optim.lr_text=1.0e-4
      optim.lr_other=1.0e-4 train.micro_batch_size=32 train.keep_activations=7 train.text_micro_batch_size=128
    )
    ;;
  8)
    job=(
      train.micro_batch_size=32 train.keep_activations=7 train.text_micro_batch_size=128
    )
    ;;
  *) job=() ;;
esac
need SHARDS
knob SHARDS data.shards
knob VISION init.vision
knob TEXT init.text
knob RUN_DIR run_dir
launch examples/l14.yaml "${job[@]}" "$@"
