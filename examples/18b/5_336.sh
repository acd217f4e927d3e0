#!/usr/bin/env bash
# EVA-CLIP-18B, stage 5 of 5: EVA-CLIP-18B+ at 336 px. Settings with their sources and the layout:
# examples/18b/5_336.yaml. On every node:
#
#   SHARDS='…' HEAD_NODE=host bash examples/18b/5_336.sh [dotted.key=value …]
#
# SHARDS    image-text shards of Merged-2B
# CLIP      the start of both towers at 224 px: run folder of 4_video, or a checkpoint
# RUN_DIR   what the stage writes, on storage that all nodes share
# NODES     45 nodes of 8 GPUs as in the earlier stages. DP = NODES, micro-batches a replica: a multiple of 8
#
# HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/launch.sh

: "${NODES:=45}"
need SHARDS
knob SHARDS data.shards
knob CLIP init.vision
knob CLIP init.text
knob RUN_DIR run_dir
launch examples/18b/5_336.yaml "$@"
