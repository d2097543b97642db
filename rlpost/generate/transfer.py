"""How the policy's weights get to generator servers: vLLM's own transfer engines, fed by the trainer's stream."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory

from rlpost.errors import RunError
from rlpost.generate import shm_engine
from rlpost.generate.weight_source import PolicySource
from rlpost.servers.replica import Lost, Replica

if TYPE_CHECKING:
    from rlpost.weights import WeightStream
    from rlpost.world import World

Kind = Literal["shm", "nccl", "ipc"]
BACKENDS: dict[str, str] = {"shm": shm_engine.BACKEND, "nccl": "nccl", "ipc": "ipc"}
"""Of vLLM's `--weight-transfer-config`."""


class Servers(HTTPVLLMWeightSyncClient):
    """vLLM's client of the weight routes, for several servers at once, with this project's key and time limits."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        super().__init__("", 0)
        self.replicas = list(replicas)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each server's workers stand behind those of the servers before it."""
        offset = int(init_info.get("rank_offset", 0))
        bodies = []
        for replica in self.replicas:
            own = init_info | ({"rank_offset": offset} if "rank_offset" in init_info else {})
            bodies.append({"init_info": own})
            offset += replica.workers
        self._each("init_weight_transfer_engine", bodies)

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        self._each(path, [json] * len(self.replicas))

    def _each(self, path: str, bodies: Sequence[dict[str, Any] | None]) -> None:
        """All at once: NCCL waits until all of them are there."""
        if len(self.replicas) == 1:
            self.replicas[0].post(f"/{path}", bodies[0])
            return
        with ThreadPoolExecutor(max(len(self.replicas), 1)) as pool:
            for done in [
                pool.submit(one.post, f"/{path}", body) for one, body in zip(self.replicas, bodies, strict=True)
            ]:
                done.result()


class Shm:
    """Through a file in memory: written by one rank of a node, loaded by each server when its owner says so."""

    one_by_one = True

    def __init__(self, stream: WeightStream, run: str, world: World) -> None:
        shm_engine.register()
        init = shm_engine.ShmTrainerInit(run=run, writes=world.local_rank == 0, rank=world.rank)
        source = PolicySource(stream)
        self.world = world
        self.engine: Any = WeightTransferTrainerFactory.trainer_init(init, client=Servers([]), source=source)
        self.update: dict[str, Any] = {}

    def gather(self) -> None:
        """Write the weights; every rank learns what servers of its node must be told."""
        mine = self.world.together(self._publish)
        every = self.world.all_gather_object((socket.gethostname(), mine))
        self.update = next(update for host, update in every if host == socket.gethostname() and update is not None)

    def _publish(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] | None = self.engine.publish()
        except OSError as error:
            raise RunError(
                f"generator.servers.transfer=shm needs room for all weights in /dev/shm ({error}): make it larger "
                "(in a container --shm-size), or use another transfer"
            ) from error
        return found

    def send(self, replicas: Sequence[Replica]) -> None:
        """Nothing: servers load one by one."""

    def load(self, replica: Replica, version: int) -> None:
        """Let a server of this node load what was written last."""
        client = Servers([replica])
        client.start_weight_update()
        client.update_weights(self.update)
        client.finish_weight_update(str(version))

    def end(self) -> None:
        """Remove the file."""
        self.engine.shutdown()


class Gpus:
    """vLLM's NCCL or IPC engine: from the main rank to all servers together, at an update only. Not tried yet."""

    one_by_one = False

    def __init__(self, kind: Kind, stream: WeightStream, world: World) -> None:
        self.kind, self.source, self.world = kind, PolicySource(stream), world
        self.engine: Any = None
        self._joined: list[tuple[str, str | None]] = []

    def gather(self) -> None:
        """Nothing: weights are gathered on their way."""

    def send(self, replicas: Sequence[Replica]) -> None:
        """Give all servers that are alive the weights, on every rank; they join anew where they are not the same."""
        asked = sorted((one.url, one.boot) for one in replicas)
        if self.engine is None or asked != self._joined:
            self.end()
            self.engine, self._joined = self._join(replicas), asked
        try:
            self.engine.send_weights()
        except Lost as error:
            raise RunError(
                f"generator.servers.transfer={self.kind}: every server must take part in a weight update ({error}): "
                "go on from the last checkpoint with resume=auto"
            ) from error

    def _join(self, replicas: Sequence[Replica]) -> Any:
        client = Servers(replicas)
        if self.kind == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            init: Any = IPCTrainerInitInfo(packed=True, rank=self.world.rank)
        else:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            with socket.socket() as probe:
                probe.bind(("", 0))
                port = int(probe.getsockname()[1])
            workers = sum(one.workers for one in replicas)
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            init = NCCLTrainerInitInfo(address, port, 1 + workers, rank=self.world.rank)
        return WeightTransferTrainerFactory.trainer_init(init, client=client, source=self.source)

    def load(self, replica: Replica, version: int) -> None:
        """One server alone cannot be given weights."""
        raise Lost(f"{replica.url} waits for the next update")

    def end(self) -> None:
        """Leave the servers' group."""
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


def transfer_of(asked: str, stream: WeightStream, run: str, world: World) -> Shm | Gpus:
    """The transfer that the recipe asks for; auto: NCCL where there are GPUs."""
    kind = ("nccl" if world.device.type == "cuda" else "shm") if asked == "auto" else asked
    if kind == "shm":
        return Shm(stream, run, world)
    return Gpus("nccl" if kind == "nccl" else "ipc", stream, world)
