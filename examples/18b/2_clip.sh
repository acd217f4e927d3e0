#!/usr/bin/env bash
# EVA-CLIP-18B, contrastive stage at 224 px (settings and layout: examples/18b/2_clip.yaml). Start it on every node:
#
#   SHARDS='…/{00000..99999}.tar' VISION=… TEXT=… HEAD_NODE=host bash examples/18b/2_clip.sh [dotted.key=value …]
#
# SHARDS      tar shards of the image-text pairs
# VISION      checkpoint whose image tower is the start (the MIM stage's result)
# TEXT        checkpoint whose caption tower is the start
# HEAD_NODE   host name of the first node;  PORT  its free port
# NODES       nodes of 8 GPUs; 45 in the paper. 8 x NODES = 24 x DP, and DP x 16 must divide the global batch
# RUN_DIR     where everything is written, on storage that all nodes share
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${SHARDS:?set SHARDS to the tar shards}" "${VISION:?set VISION to a checkpoint}" "${TEXT:?set TEXT to a checkpoint}"
: "${HEAD_NODE:?set HEAD_NODE to the host name of the first node}"

exec torchrun --nnodes "${NODES:-45}" --nproc-per-node 8 --rdzv-backend c10d --rdzv-id "${JOB_ID:-eva-clip-18b}" \
  --rdzv-endpoint "$HEAD_NODE:${PORT:-29500}" -m engine.train examples/18b/2_clip.yaml \
  "run_dir=${RUN_DIR:-runs/18b-clip}" "data.shards=$SHARDS" "init.vision=$VISION" "init.text=$TEXT" "$@"
