#!/usr/bin/env bash
# launch/kubernetes.sh RECIPE [key=value ...]: what each pod of kubernetes.yaml runs; torchrun's rendezvous finds the others.
#   NODES           pods, or MIN:MAX
#   RANKS_PER_NODE  ranks of a pod, one a GPU
#   RUN_ID          the same in all pods of a run
#   HEAD            host of the rendezvous: the first pod
#   POD_IP          this pod's address, by which the others reach it
set -euo pipefail

: "${NODES:?}" "${RANKS_PER_NODE:?}" "${RUN_ID:?}" "${HEAD:?}" "${POD_IP:?}"
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$home/.venv/bin:$PATH"

exec python -m rlpost.torchrun --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --rdzv-backend c10d \
  --rdzv-id "$RUN_ID" --rdzv-endpoint "$HEAD:${RENDEZVOUS_PORT:-29400}" --local-addr "$POD_IP" \
  -m rlpost train "$1" resume=auto "${@:2}"
