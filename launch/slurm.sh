#!/usr/bin/env bash
#SBATCH --job-name=rlpost
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch [--nodes=N ...] launch/slurm.sh RECIPE [key=value ...]: from the folder of this repository, one node or several.
# 300 s before the time limit, or when it is pre-empted, the run saves and leaves; the job is queued again and goes on.
#   RLPOST_HOME       this repository, where the job is submitted from another folder
#   RLPOST_ENV        a file of KEY=value lines for the environment (default: launch/cluster.env, where it is)
#   RANKS_PER_NODE    ranks of a node (default: its GPUs)
#   SERVER_NODES      the last so many nodes run generator servers, the others train (default: 0)
#   SERVERS_PER_NODE  servers on each of these (default: 1); generator.servers.* says how large one is
#   RLPOST_RESTARTS   how often the job may be queued again (default: 100)
set -euo pipefail

PREEMPTED=75 # rlpost's exit code when it was asked to leave and wants to be started again
home=${RLPOST_HOME:-$SLURM_SUBMIT_DIR}
env_file=${RLPOST_ENV:-$home/launch/cluster.env}
if [[ -f $env_file ]]; then
  set -a # every line is exported; nothing of it is printed
  # shellcheck source=/dev/null
  source "$env_file"
  set +a
elif [[ -n ${RLPOST_ENV:-} ]]; then
  echo "launch/slurm.sh: RLPOST_ENV must be a file (got $RLPOST_ENV)" >&2
  exit 2
fi
export PATH="$home/.venv/bin:$PATH"
export RLPOST_GRACE_S=${RLPOST_GRACE_S:-270} # of the 300 s of --signal
export RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SERVER_NODES=${SERVER_NODES:-0} SERVERS_PER_NODE=${SERVERS_PER_NODE:-1}
export TRAIN_NODES=$((SLURM_JOB_NUM_NODES - SERVER_NODES))
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# srun hands SIGUSR1 on to its tasks. SIGTERM would make it kill them, so this shell turns that into the other.
step=
trap '[[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true' USR1 TERM

servers=
if ((SERVER_NODES > 0)); then
  if ((TRAIN_NODES < 1)); then
    echo "launch/slurm.sh: SERVER_NODES must leave a node to train (got $SERVER_NODES of $SLURM_JOB_NUM_NODES)" >&2
    exit 2
  fi
  export SERVER_PORT=$((40000 + SLURM_JOB_ID % 20000))
  RLPOST_SERVER_KEY=${RLPOST_SERVER_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}
  export RLPOST_SERVER_KEY # handed on in the environment alone
  urls=
  for ((i = 0; i < SERVER_NODES * SERVERS_PER_NODE; i++)); do
    urls+="${urls:+, }http://${hosts[TRAIN_NODES + i / SERVERS_PER_NODE]}:$((SERVER_PORT + i))"
  done
  # shellcheck disable=SC2016 # expanded on each node
  on_each_server='exec python -m rlpost serve "$@" "generator.servers.replicas=$SERVERS_PER_NODE" \
    generator.servers.host=0.0.0.0 "generator.servers.base_port=$((SERVER_PORT + SLURM_PROCID * SERVERS_PER_NODE))"'
  srun --nodes="$SERVER_NODES" --relative="$TRAIN_NODES" --ntasks-per-node=1 bash -c "$on_each_server" rlpost "$@" &
  servers=$!
  set -- "$@" generator.kind=remote_vllm "generator.servers.urls=[$urls]"
fi

# shellcheck disable=SC2016 # expanded on each node
on_each_node='exec python -m rlpost.torchrun --nnodes "$TRAIN_NODES" --node-rank "$SLURM_NODEID" \
  --nproc-per-node "$RANKS_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
  -m rlpost train "$1" resume=auto "${@:2}"'
# A node that fails ends the others a minute later, which leaves them time to end by themselves.
srun --nodes="$TRAIN_NODES" --relative=0 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 bash -c "$on_each_node" rlpost "$@" &
step=$!

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait`, not the step
  wait "$step" || true
done
code=0
wait "$step" || code=$?

if [[ -n $servers ]]; then
  kill -USR1 "$servers" 2>/dev/null || true # they end when the run does, however it ended
  wait "$servers" || true
fi

if ((code == PREEMPTED)) && ((${SLURM_RESTART_COUNT:-0} < ${RLPOST_RESTARTS:-100})); then
  echo "launch/slurm.sh: the run was asked to leave; job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
