#!/usr/bin/env bash
# EVA-CLIP-18B, stages 2, 3 and 4 in one job: three phases under one learning rate schedule. Settings with their sources
# and the layout: examples/18b/2_3_4_phases.yaml, where the shards of the later phases have to be put in. On every node:
#
#   SHARDS='…/{00000..99999}.tar' TEXT=….pt HEAD_NODE=host bash examples/18b/2_3_4_phases.sh [dotted.key=value …]
#
# SHARDS, TEXT, VISION, RUN_DIR, NODES: as in examples/18b/2_clip.sh; SHARDS are those of the first phase.
# HEAD_NODE, PORT, JOB_ID, GPUS_PER_NODE, DRY_RUN: examples/launch.sh.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/launch.sh

: "${NODES:=45}"
need SHARDS TEXT
knob SHARDS data.shards
knob TEXT init.text
knob VISION init.vision
knob RUN_DIR run_dir
launch examples/18b/2_3_4_phases.yaml "$@"
