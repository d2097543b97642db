#!/usr/bin/env bash
# launch/node.sh RECIPE [key=value ...]: all GPUs of this machine, going on from the newest checkpoint where there is one.
# SIGTERM or SIGUSR1 makes the run save and leave with exit code 75; the same line goes on from there.
#   RANKS   ranks (default: a GPU each; without a GPU, one)
set -euo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$home/.venv/bin:$PATH"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true

exec python -m rlpost.torchrun --standalone --nproc-per-node "${RANKS:-$((gpus > 0 ? gpus : 1))}" \
  -m rlpost train "$1" resume=auto "${@:2}"
