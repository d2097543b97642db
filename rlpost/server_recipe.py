"""The section `generator.servers` of a recipe: where generator servers run, and how they get weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Servers:
    """vLLM servers that sample for a run, with `generator.kind=remote_vllm`.

    The run starts `replicas` of them itself, on the node of the main rank, unless `urls` names some that are there.
    """

    replicas: int = 1
    urls: list[str] = field(default_factory=list)
    """Servers that `rlpost serve` or somebody else has started, such as `http://node7:8100`; their key is in the
    environment as RLPOST_SERVER_KEY."""
    host: str = "127.0.0.1"
    """The address that a started server listens at; 0.0.0.0 where ranks of other nodes must reach it."""
    base_port: int | None = None
    """Of the first server, and one more for each after it; null: any that are free."""
    gpus: list[int] = field(default_factory=list)
    """The node's GPUs for servers, `tensor_parallel * data_parallel` for each in this order; empty: the last ones."""
    memory_frac: float = 0.9
    """Share of each of these GPUs that a server takes."""
    tensor_parallel: int = 1
    data_parallel: int = 1
    transfer: Literal["auto", "shm", "nccl", "ipc"] = "auto"
    """How weights travel: `shm` a file in memory, for servers on the trainer's node; `nccl` between GPUs; `ipc` where a
    server has the very GPU of a rank. auto: nccl with GPUs, else shm."""
    in_flight: Literal["recompute", "wait", "keep"] = "recompute"
    """What becomes of unfinished answers at a weight update. `recompute`: they stop, and go on from their tokens under
    the new weights; `keep`: the same inside the server; `wait`: the update waits until all of them have ended."""
    timeout_s: float = 60.0
    """A server that says nothing for so long is lost, and its unfinished answers are asked of others."""
    start_s: float = 600.0
    """How long to wait for a server to start, or for any to come back where all are lost."""
    restarts: int = 10
    """How often a server that ends is started again, in a row: one that ran for two minutes begins to count anew."""
