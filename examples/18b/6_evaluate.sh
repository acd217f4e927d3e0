#!/usr/bin/env bash
# EVA-CLIP-18B on the paper's 33 sets (27 image, 4 video and 2 retrieval sets), both transforms, 1, 8 and 16 frames, at
# TP 2 x PP 4: 36 GB of bf16 weights are 4.5 GB a GPU. docs/evaluation_sets.md says where the sets come from. On every node:
#
#   DATA=/data/eval HEAD_NODE=host bash examples/18b/6_evaluate.sh [--any-size] [dotted.key=value …]
#
# DATA      the folder that holds the sets, on storage that all nodes see
# CLIP      what is evaluated: run folder of 4_video, or a checkpoint
# OUT       the folder of the results; started again it goes on where it stopped
# SUITE     paper, datacomp, video, quick or FILE.yaml
# NODES     nodes of 8 GPUs, one replica each
#
# HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh. No GPU has run it yet.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/launch.sh

: "${NODES:=1}" "${CLIP:=runs/18b/4_video}" "${OUT:=runs/18b/evaluation}" "${SUITE:=paper}"
need DATA
MODULE=tools.evaluate launch "$CLIP" --suite "$SUITE" --data "${DATA:-DATA}" --out "$OUT" --transform both \
  --frames 1 8 16 parallel.tensor=2 parallel.pipeline=4 "$@"
