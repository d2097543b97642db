"""How a vLLM server is started for a recipe: its command line and its environment."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.recipe import Recipe

GATE = "rlpost.generate.server_gate.Gate"
DICE = "rlpost.generate.server_gate.Dice"
CPU_BLOCK = 32
"""As in `generate/local_vllm.py`."""
BACKENDS = {"shm": "rlpost_shm", "nccl": "nccl", "ipc": "ipc"}
"""Of vLLM's `--weight-transfer-config`."""


def make_spec(recipe: Recipe, model: Path, context: int, folder: Path, *, gpus: int) -> dict[str, Any]:
    """What the supervisor is told; `gpus`: of this node, 0 for a CPU."""
    _need_plugin()
    servers = recipe.generator.servers
    each = servers.tensor_parallel * servers.data_parallel
    chosen = servers.gpus or list(range(gpus))[max(gpus - each * servers.replicas, 0) :]
    if gpus and (len(chosen) < each * servers.replicas or max(chosen) >= gpus):
        raise RunError(
            f"generator.servers.replicas needs {each} GPUs of this node a server (got {servers.replicas} on GPUs "
            f"{chosen} of {gpus}): lower it, or name others in generator.servers.gpus"
        )
    ports = free_ports(servers.replicas, servers.host, servers.base_port)
    name = socket.gethostname() if servers.host == "0.0.0.0" else servers.host
    told = []
    for i, port in enumerate(ports):
        mine = chosen[i * each : (i + 1) * each] if gpus else []
        told.append(
            {
                "url": f"http://{name}:{port}",
                "command": command(recipe, model, context, port, on_cpu=not gpus),
                "environment": environment(mine, ipc=servers.transfer == "ipc"),
            }
        )
    return {"folder": str(folder), "restarts": servers.restarts, "servers": told}


def command(recipe: Recipe, model: Path, context: int, port: int, *, on_cpu: bool) -> list[str]:
    """The command line of one server: with dummy weights, so that nothing but the trainer's can be sampled from."""
    generator, servers = recipe.generator, recipe.generator.servers
    kind = ("shm" if on_cpu else "nccl") if servers.transfer == "auto" else servers.transfer
    asked: dict[str, Any] = {
        "model": str(model),
        "host": servers.host,
        "port": port,
        "dtype": recipe.model.dtype,
        "hf_overrides": {"head_dtype": recipe.model.head_dtype} if recipe.model.head_dtype else None,
        "load_format": "dummy",
        "max_model_len": context,
        "max_num_seqs": generator.max_num_seqs,
        "enable_chunked_prefill": False if on_cpu and generator.seeding == "request" else None,
        "kv_cache_memory_bytes": int(generator.kv_cache_gib * 2**30) if on_cpu else None,
        "block_size": CPU_BLOCK if on_cpu else None,
        "gpu_memory_utilization": servers.memory_frac,
        "enforce_eager": True if generator.enforce_eager or (on_cpu and generator.enforce_eager is None) else None,
        "logprobs_mode": "processed_logprobs",
        "seed": recipe.seed,
        "disable_log_stats": True,
        "trust_remote_code": True if recipe.model.trust_remote_code else None,
        "distributed_executor_backend": "uni" if on_cpu and servers.tensor_parallel == 1 else None,
        "tensor_parallel_size": servers.tensor_parallel,
        "data_parallel_size": servers.data_parallel,
        "api_server_count": 1,
        "generation_config": "vllm",
        "weight_transfer_config": {"backend": BACKENDS[kind]},
        "worker_extension_cls": DICE,
        "middleware": GATE,
        "uvicorn_log_level": "warning",
    }
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_flags(asked | generator.options)]


def _flags(asked: Mapping[str, Any]) -> Iterator[str]:
    for name, value in asked.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        else:
            yield from (flag, json.dumps(value) if isinstance(value, dict) else str(value))


def environment(gpus: list[int], *, ipc: bool) -> dict[str, str]:
    """What a server needs beside what its supervisor has; the key is not in it, and comes with the rest."""
    found = {"VLLM_SERVER_DEV_MODE": "1", "RLPOST_SUPERVISED": "1", "VLLM_NO_USAGE_STATS": "1"}
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    else:
        found |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        found = {key: os.environ.get(key, value) for key, value in found.items()}
        found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM wants one process more, whose start takes as long
    if ipc:
        found["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return found


def free_ports(count: int, host: str, base: int | None) -> list[int]:
    """Ports for so many servers."""
    if base is not None:
        return [base + i for i in range(count)]
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _need_plugin() -> None:
    """A server could not be given weights without the plug-in, which only an installation brings."""
    if not entry_points(group="vllm.general_plugins", name="rlpost"):
        raise RunError(
            "generator.kind=remote_vllm needs rlpost installed with its vLLM plug-in (no such entry point is there): "
            "run launch/setup.sh, or pip install --no-deps --no-build-isolation -e . in the repository"
        )
