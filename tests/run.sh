#!/usr/bin/env bash
# The tests on a fresh machine: makes .venv if no environment is active, installs what is missing, runs pytest.
#
#   bash tests/run.sh                    everything that a CPU can run in minutes, a worker a core
#   bash tests/run.sh -m "slow or not slow"    the slow ones as well
#   bash tests/run.sh -m slow                  those alone (CONTRIBUTING, when)
#   bash tests/run.sh -n 0 -m "not slow"       one test after the other
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/common.sh
. examples/setup.sh
ensure_environment test
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
python -m pytest "$@"
