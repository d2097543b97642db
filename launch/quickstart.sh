#!/usr/bin/env bash
# launch/quickstart.sh [key=value ...]: sets up, makes a small base model, and post-trains it with GRPO.
# The run goes to runs/quickstart, or to the first free of runs/quickstart-2, -3, ...; name=... chooses another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH" # ninja and torchrun are found there

name=quickstart
for ((n = 2; ; n++)); do
  [[ -e runs/$name ]] || break
  name=quickstart-$n
done

exec rlpost train recipes/quickstart.yaml "name=$name" "$@" # of two names the last one counts
