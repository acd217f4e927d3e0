#!/usr/bin/env bash
# EVA-CLIP-8B, stage 3 of 3: EVA-CLIP-8B+ at 448 px. Settings with their sources and the layout:
# examples/8b/3_448.yaml. On every node:
#
#   SHARDS='…' HEAD_NODE=host bash examples/8b/3_448.sh [dotted.key=value …]
#
# SHARDS    image-text shards of Merged-2B
# CLIP      the start of both towers at 224 px: run folder of 2_clip, or a checkpoint
# RUN_DIR   what the stage writes, on storage that all nodes share
# NODES     48 nodes of 8 GPUs as in the earlier stages. DP = 2 x NODES, micro-batches a replica: a multiple of 4
#
# HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/launch.sh

: "${NODES:=48}"
need SHARDS
knob SHARDS data.shards
knob CLIP init.vision
knob CLIP init.text
knob RUN_DIR run_dir
launch examples/8b/3_448.yaml "$@"
