#!/usr/bin/env bash
# launch/setup.sh: makes .venv from the lock for this machine; returns at once when it is up to date.
#   RLPOST_DEVICE=cpu|gpu     overrides the choice (gpu where `nvidia-smi -L` lists one)
#   RLPOST_PYTHON=python3.12  overrides the interpreter of a new .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
BREAK_TRANSFORMERS_ON_CPU=(torchvision torchaudio torchcodec)
MADE_FOR=.venv/.made-for   # device and folder: another one needs a new environment
INSTALLED=.venv/.installed # hash of what was installed; written last, so that half an installation has none

say() { echo "set-up: $*"; }
die() { say "$@" >&2 && exit 1; }

choose_device() {
  case "${RLPOST_DEVICE:-auto}" in
    cpu | gpu) echo "$RLPOST_DEVICE" ;;
    auto) if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo gpu; else echo cpu; fi ;;
    *) die "RLPOST_DEVICE must be cpu or gpu (got $RLPOST_DEVICE)" ;;
  esac
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

choose_python() {
  local python candidates=${RLPOST_PYTHON:-python3 python3.11 python3.12 python3.13}
  for python in $candidates; do
    if is_supported "$python"; then
      "$python" -c 'import os, sys; print(os.path.realpath(sys.executable))' # also from inside an activated .venv
      return
    fi
  done
  die "Python 3.11, 3.12 or 3.13 must be installed (tried: $candidates); RLPOST_PYTHON names one elsewhere"
}

make_venv() {
  rm -f "$INSTALLED"
  if is_supported .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 &&
    [[ ! -e $MADE_FOR || $(<"$MADE_FOR") == "$made_for" ]]; then
    say "bringing .venv up to date for a ${device^^}"
  else
    local python
    python=$(choose_python)
    say "making .venv for a ${device^^} with $python"
    "$python" -m venv --clear .venv
  fi
  echo "$made_for" >"$MADE_FOR"
}

pip_install() { .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input --no-deps "$@"; }

# The +cpu build is served by pip's own configuration or by PyTorch's index, never by the public one: no CUDA packages.
install_torch_cpu() {
  local torch
  torch=$(grep '^torch==' "$lock")
  say "$torch"
  if ! pip_install "$torch" 2>/dev/null; then
    say "not found where pip is configured to look; taking it from $TORCH_CPU_INDEX"
    pip_install --extra-index-url "$TORCH_CPU_INDEX" "$torch"
  fi
}

install() {
  if [[ $device == cpu ]]; then
    .venv/bin/python -m pip uninstall -qq -y "${BREAK_TRANSFORMERS_ON_CPU[@]}"
    install_torch_cpu
  fi
  say "the $(grep -c '==' "$lock") packages of $lock (a few minutes the first time)"
  pip_install -r "$lock"
  pip_install --no-build-isolation -e .
  say "checking that torch and transformers load"
  .venv/bin/python -c 'import torch; from transformers import LlamaForCausalLM'
}

explain_failure() {
  [[ -e $INSTALLED ]] || say "did not finish, for the reason above; the same command goes on from here"
}

# Two set-ups at once wait for each other.
exec 9<launch/setup.sh
if command -v flock >/dev/null; then flock 9; fi

device=$(choose_device)
lock=launch/requirements-$device.txt
made_for="$device $PWD"
wanted=$(cat "$lock" pyproject.toml launch/setup.sh | sha256sum)
if [[ -x .venv/bin/python && -e $MADE_FOR && -e $INSTALLED ]] &&
  [[ $(<"$MADE_FOR") == "$made_for" && $(<"$INSTALLED") == "$wanted" ]]; then
  exit 0
fi

trap explain_failure EXIT
make_venv
install
echo "$wanted" >"$INSTALLED"
say "done in ${SECONDS} s"
