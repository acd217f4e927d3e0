#!/usr/bin/env bash
# EVA-CLIP-8B, stage 2 of 3: contrastive training at 224 px with 50 % patch dropout. Settings with their sources and the
# layout: examples/8b/2_clip.yaml. On every node:
#
#   SHARDS='…/{00000..99999}.tar' TEXT=….pt HEAD_NODE=host bash examples/8b/2_clip.sh [dotted.key=value …]
#
# SHARDS    image-text shards: Merged-2B, 1.6 B samples of LAION-2B and 0.4 B of COYO-700M
# TEXT      EVA-02-CLIP-E/14+ in the authors' layout: the start of the caption tower
# VISION    the start of the image tower: run folder of 1_mim, a checkpoint, or the authors' EVA_8B file
# RUN_DIR   what the stage writes, on storage that all nodes share
# NODES     48 nodes of 8 GPUs in the paper. DP = 2 x NODES, micro-batches a replica: a multiple of 4
#
# HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/launch.sh

: "${NODES:=48}"
need SHARDS TEXT
knob SHARDS data.shards
knob TEXT init.text
knob VISION init.vision
knob RUN_DIR run_dir
launch examples/8b/2_clip.yaml "$@"
