"""What `generator.servers` and the rest of a recipe must be to each other."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from rlpost.recipe import Recipe
from rlpost.server_recipe import Servers

OURS = (
    "api_key",
    "host",
    "load_format",
    "middleware",
    "model",
    "port",
    "weight_transfer_config",
    "worker_extension_cls",
)
"""Arguments of a server that belong to rlpost."""
GPUS = Path("/proc/driver/nvidia/gpus")


def server_problems(recipe: Recipe, world_size: int) -> list[str]:
    """Every problem that shows without asking a server."""
    servers, kind = recipe.generator.servers, recipe.generator.kind
    if kind != "remote_vllm":
        if servers == Servers():
            return []
        return [f"generator.servers is for generator.kind=remote_vllm (got {kind}): set the kind, or leave it out"]
    problems = [*_urls(servers), *_gpus(servers, world_size)]
    if recipe.engine.park not in (None, "none"):
        problems.append(
            f"engine.park must be none for generator.kind=remote_vllm (got {recipe.engine.park}): servers need no "
            "room on the trainer's devices; leave it out"
        )
    problems += [
        f"generator.options.{name} must not be given for generator.kind=remote_vllm: rlpost decides it; see "
        "generator.servers"
        for name in OURS
        if name in recipe.generator.options
    ]
    if servers.base_port is not None and not 0 < servers.base_port <= 65536 - servers.replicas:
        problems.append(
            f"generator.servers.base_port and the {servers.replicas} after it must be ports (got {servers.base_port})"
        )
    return problems


def _urls(servers: Servers) -> list[str]:
    problems = []
    for url in servers.urls:
        try:
            parts = urlsplit(url)
            fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:
            fits = False
        if not fits or parts.path.strip("/") or parts.query or parts.username:
            problems.append(
                f"generator.servers.urls must be like http://HOST:PORT, without a path or a key (number "
                f"{servers.urls.index(url)} is not)"
            )
        elif servers.transfer == "shm" and not _is_here(str(parts.hostname)):
            problems.append(
                f"generator.servers.transfer=shm needs servers on the trainer's node (got {url}): use "
                "nccl, or start them here"
            )
    if len(set(servers.urls)) < len(servers.urls):
        problems.append("generator.servers.urls must name each server once")
    return problems


def _is_here(host: str) -> bool:
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


def _gpus(servers: Servers, world_size: int) -> list[str]:
    needed = servers.replicas * servers.tensor_parallel * servers.data_parallel
    if servers.gpus and servers.urls:
        return ["generator.servers.gpus is for servers that the run starts (got urls too): leave one out"]
    if servers.gpus and (len(servers.gpus) != needed or len(set(servers.gpus)) < needed):
        return [
            f"generator.servers.gpus must name replicas * tensor_parallel * data_parallel = {needed} different "
            f"GPUs (got {servers.gpus})"
        ]
    there = len(list(GPUS.iterdir())) if GPUS.is_dir() else 0
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    if there and not servers.urls and not servers.gpus and needed + ranks > there:
        return [
            f"generator.servers.replicas needs {needed} GPUs beside those of {ranks} ranks (this node has {there}): "
            "lower it, start fewer ranks, or name GPUs to share in generator.servers.gpus"
        ]
    return []
