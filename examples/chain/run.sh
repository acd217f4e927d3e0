#!/usr/bin/env bash
# The paper's chain from weak to strong in miniature: a small CLIP teaches a bigger image tower (masked-feature
# distillation), which becomes the image tower of a bigger CLIP, which goes on without patch dropout, on clips and at a
# higher resolution. Beside it the same CLIP without the distilled start, on equally many samples. Four CPU ranks.
#
#   bash examples/chain/run.sh                  about 10 minutes on 2 cores
#   bash examples/chain/run.sh --short          a few steps of each stage, to see that everything works
#   bash examples/chain/run.sh --seeds 0,1,2    the comparison at three seeds
#   bash examples/chain/run.sh --longer         also a CLIP from scratch with as many more steps as the student has
#   bash examples/chain/run.sh --out FOLDER     writes there instead of runs/chain
#   bash examples/chain/run.sh --resume         keeps what an earlier start has finished there
#
# Stages: teacher.yaml, student.yaml, clip.yaml in this folder. Pictures and clips: OpenMoji (openmoji.org), CC BY-SA 4.0.
# Result: a table, runs/chain/result.json and runs/chain/report.html. What it shows: docs/results/weak_to_strong.md.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/common.sh
. examples/setup.sh
if is_dry; then
  echo "$0: DRY_RUN: the chain chooses its commands as it goes; --short runs a few steps of each stage" >&2
  exit 2
fi
ensure_environment emoji video
exec python -m examples.chain.chain "$@"
