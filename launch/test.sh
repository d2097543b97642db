#!/usr/bin/env bash
# launch/test.sh [pytest arguments]: sets up, then runs the tests; for example `launch/test.sh -k losses`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH" # ninja and torchrun are found there

exec python -m pytest "$@"
