#!/usr/bin/env bash
# EVA-CLIP-8B, stage 1 of 3: EVA-8B learns the patch features of a frozen EVA-02-CLIP-E/14+. Settings with their
# sources and the layout: examples/8b/1_mim.yaml. On every node:
#
#   SHARDS='…/{00000..99999}.tar' TEACHER=….pt HEAD_NODE=host bash examples/8b/1_mim.sh [dotted.key=value …]
#
# SHARDS    image shards (captions are not read)
# TEACHER   EVA-02-CLIP-E/14+ in the authors' layout
# RUN_DIR   what the stage writes, on storage that all nodes share
# NODES     48 nodes of 8 GPUs as in the CLIP stage. 8 x NODES = 8 x DP, micro-batches a replica: a multiple of 8
#
# HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/launch.sh

: "${NODES:=48}"
need SHARDS TEACHER
knob SHARDS data.shards
knob TEACHER mim.teacher
knob RUN_DIR run_dir
launch examples/8b/1_mim.yaml "$@"
