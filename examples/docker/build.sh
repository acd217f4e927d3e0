#!/usr/bin/env bash
# Builds the image of examples/docker/Dockerfile from this checkout: `bash examples/docker/build.sh [NAME]`.
# Not run here: there was no Docker daemon.
set -euo pipefail
cd "$(dirname "$0")/../.."
docker build --file examples/docker/Dockerfile --tag "${1:-eva-megatron}" .
