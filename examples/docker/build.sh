#!/usr/bin/env bash
# Builds the image of examples/docker/Dockerfile from this checkout.
#
#   bash examples/docker/build.sh              the image eva-megatron
#   bash examples/docker/build.sh NAME:TAG     under a name of your own
#
# Not run here: there was no Docker daemon.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/../.."
. examples/common.sh
start docker build --file examples/docker/Dockerfile --tag "${1:-eva-megatron}" .
