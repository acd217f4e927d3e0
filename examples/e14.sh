#!/usr/bin/env bash
# EVA-02-CLIP-E/14 and E/14+ on image-text pairs, from scratch or going on from weights, on one node or eight.
# Settings with their sources: examples/e14.yaml. On every node:
#
#   SHARDS='…/{00000..09999}.tar' bash examples/e14.sh [dotted.key=value …]
#   NODES=8 HEAD_NODE=host SHARDS='…/{00000..09999}.tar' bash examples/e14.sh [dotted.key=value …]
#
# SHARDS         image-text shards
# VISION, TEXT   what the towers go on from: run folder, checkpoint or the authors' file; not set: from scratch
# RUN_DIR        what is written, on storage that all nodes share
# MODEL          e14, or e14-plus with the larger caption tower
#
# Expected on A100-40 (tools.plan, projected; not run on a GPU):
#   NODES=1                   batch 2,048, 341 samples/s, 35 GB a GPU, 33.3 days for 0.98 B samples
#   NODES=8                   batch 16,384, 2,735 samples/s, 29 GB a GPU, 4.2 days for 0.98 B samples
#   NODES=1 MODEL=e14-plus    batch 2,048, 327 samples/s, 38 GB a GPU, 34.8 days for 0.98 B samples
#   NODES=8 MODEL=e14-plus    batch 16,384, 2,618 samples/s, 31 GB a GPU, 4.3 days for 0.98 B samples
#
# NODES, HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh. On another number of nodes give the batch.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
. examples/launch.sh

: "${NODES:=1}"
case "$NODES" in
  1)
    job=(
      train.global_batch_size=2048 train.steps=480000 optim.lr_vision=5.0e-5 optim.lr_text=5.0e-5
      optim.lr_other=5.0e-5 parallel.pipeline=2 parallel.virtual=2 train.micro_batch_size=64
    )
    ;;
  8)
    job=(
      parallel.pipeline=2 parallel.virtual=2 train.micro_batch_size=64
    )
    ;;
  *) job=() ;;
esac
need SHARDS
knob SHARDS data.shards
knob VISION init.vision
knob TEXT init.text
knob RUN_DIR run_dir
knob MODEL model
launch examples/e14.yaml "${job[@]}" "$@"
