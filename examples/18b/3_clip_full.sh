#!/usr/bin/env bash
# EVA-CLIP-18B, stage 3 of 5: contrastive training at 224 px without patch dropout, with LAION-COCO. Settings with their
# sources and the layout: examples/18b/3_clip_full.yaml. On every node:
#
#   SHARDS='…' LAION_COCO='…' HEAD_NODE=host bash examples/18b/3_clip_full.sh [dotted.key=value …]
#
# SHARDS       image-text shards of Merged-2B
# LAION_COCO   image-text shards of LAION-COCO
# CLIP         the start of both towers: run folder of 2_clip, or a checkpoint
# RUN_DIR      what the stage writes, on storage that all nodes share
# NODES        45 nodes of 8 GPUs in the paper. DP = NODES, micro-batches a replica: a multiple of 8
#
# HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/launch.sh

: "${NODES:=45}"
need SHARDS LAION_COCO
sources="{name: merged_2b, weight: 600, shards: $(yaml_text "${SHARDS:-PATH_TO_MERGED_2B}")}"
sources+=", {name: laion_coco, weight: 20, shards: $(yaml_text "${LAION_COCO:-PATH_TO_LAION_COCO}")}"
knob CLIP init.vision
knob CLIP init.text
knob RUN_DIR run_dir
launch examples/18b/3_clip_full.yaml "data.sources=[$sources]" "$@"
