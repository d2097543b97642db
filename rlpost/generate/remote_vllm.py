"""vLLM servers apart from the trainer: each rank is a client of some, and gives them the weights that it trains.

Nothing here but `awake` makes a collective, so that rollouts may be asked for from another thread while the main thread
trains. A server that is entered by `awake` in the middle of its answers is updated in flight.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlpost.errors import RunError
from rlpost.generate.base import Canary, SyncReport, Whole
from rlpost.generate.vllm_features import probe
from rlpost.servers.dispatch import Call, Unit
from rlpost.servers.fleet import Admission, Fleet
from rlpost.servers.replica import Replica
from rlpost.types import Request, Rollout, Sampling
from rlpost.weights import WeightStream

if TYPE_CHECKING:
    from rlpost.engine import Engine
    from rlpost.recipe import Recipe
    from rlpost.render import Renderer
    from rlpost.servers.start import Started
    from rlpost.world import World


class RemoteVllm:
    """The servers of a run, as this rank uses them."""

    concurrent = True
    """Whether `generate` may be called from several threads, also while `awake` changes the weights."""

    def __init__(self, recipe: Recipe, renderer: Renderer, canary: Canary, world: World, started: Started) -> None:
        probe().need("weight_transfer", "rl_routes", "processed_logprobs", use="generator.kind=remote_vllm")
        self.recipe, self.renderer, self.canary, self.world = recipe.generator, renderer, canary, world
        self.bucket_bytes = recipe.engine.sync_bucket_mib << 20
        self.report = SyncReport()
        self.version: int | None = None
        self.started = started
        servers = recipe.generator.servers
        replicas = [Replica(url, started.key, timeout_s=servers.timeout_s) for url in started.urls]
        how: dict[str, Any] = {"start_s": servers.start_s, "in_flight": servers.in_flight}
        self.fleet = Fleet(replicas, rank=world.rank, size=world.size, **how)
        self.fleet.problem = started.problem
        self._transfer: Any = None
        self._trained: Any = None
        self._resent = 0
        self._counting = Lock()

    @property
    def prompt_block(self) -> int:
        """As the servers say."""
        return max(replica.block for replica in self.fleet.replicas)

    def generate(self, requests: Sequence[Request], sampling: Sampling, whole: Whole | None = None) -> list[Rollout]:
        """All rollouts of all requests, whichever servers write them."""
        if not requests:
            return []
        made: dict[int, list[Rollout]] = {}
        call = Call(self.fleet, requests, sampling, seeded=self.recipe.seeding == "request")
        units: dict[int, list[Unit]] = {}
        for unit in call.units:
            units.setdefault(unit.request, []).append(unit)

        def ended(place: int) -> None:
            made[place] = [self._rollout(requests[place], one) for one in units[place]]
            if whole is not None:
                whole(made[place])

        try:
            call.run(ended, self._version)
        finally:
            with self._counting:
                self._resent += call.resent
        return [rollout for place in range(len(requests)) for rollout in made[place]]

    def _version(self) -> int:
        return -1 if self.version is None else self.version

    def _rollout(self, request: Request, unit: Unit) -> Rollout:
        assert unit.finish is not None
        return request.rollout(
            unit.token_ids,
            unit.logp,
            finish_reason=unit.finish,
            version=tuple(unit.spans) or self._version(),
            text=self.renderer.decode(tuple(unit.token_ids)),
        )

    @contextmanager
    def awake(self, engine: Engine, version: int) -> Iterator[None]:
        """Give the servers the engine's weights and prove that they arrived; on exit they go on with what they have."""
        with engine.parking.making_room():
            if version != self.version:
                self._sync(engine, version)
            else:
                self._prove_again()
            self._log()
            yield

    def _sync(self, engine: Engine, version: int) -> None:
        if self.version is None:
            self.world.together(self.fleet.wait_for_start)
        transfer = self._transfer_of(engine)
        started = time.perf_counter()
        self.fleet.admission = None  # nobody is taken in with weights that are about to be replaced
        transfer.gather()
        trainer_T = self.canary.trainer_logp(engine)
        shut_at = time.perf_counter()
        self.world.together(lambda: self.fleet.on_owned(self.fleet.shut))
        self._hand_over(transfer, version)
        handed_over = time.perf_counter()
        self.world.together(lambda: self._open(trainer_T, version))
        self.version = version
        engine.parking.policy_was_sent()
        self.report.num_bytes, self.report.seconds = self._stream.num_bytes, handed_over - started
        self.report.figures["servers/update_s"] = time.perf_counter() - shut_at

    def _transfer_of(self, engine: Engine) -> Any:
        if self._transfer is None or self._trained is not engine.deepspeed.module:
            from rlpost.generate.transfer import transfer_of

            if self._transfer is not None:
                self._transfer.end()
            self._trained = engine.deepspeed.module
            self._stream = WeightStream(self._trained, bucket_bytes=self.bucket_bytes)
            self._transfer = transfer_of(self.recipe.servers.transfer, self._stream, self.started.run, self.world)
        return self._transfer

    def _hand_over(self, transfer: Any, version: int) -> None:
        if transfer.one_by_one:
            self.world.together(lambda: self.fleet.on_owned(lambda one: transfer.load(one, version)))
            return
        mine = [(one.url, one.boot, one.workers) for one in self.fleet.owned if one.alive]
        every = {url: (boot, workers) for rank in self.world.all_gather_object(mine) for url, boot, workers in rank}
        taking = [one for one in self.fleet.replicas if one.url in every]
        for one in taking:
            one.boot, one.workers = every[one.url]
        self.world.together(lambda: transfer.send(taking))
        self.world.together(lambda: self.fleet.on_owned(lambda one: one.name_weights(version)))

    def _open(self, trainer_T: Tensor, version: int) -> None:
        """Let each server score the canary, and open those that do it as the trainer does."""
        worst = SyncReport(canary_mean=-1.0)

        def prove(replica: Replica) -> None:
            found = SyncReport()
            try:
                self.canary.compare(trainer_T, replica.score(self.canary.token_ids), found)
            except RunError as error:
                raise RunError(f"{error} (server {replica.url})") from error
            if found.canary_mean > worst.canary_mean:
                worst.canary_mean, worst.canary_max = found.canary_mean, found.canary_max

        def proved(replica: Replica) -> None:
            prove(replica)
            replica.open(version)

        self._prove = prove
        self.fleet.on_owned(proved)
        if worst.canary_mean >= 0:
            self.report.canary_mean, self.report.canary_max = worst.canary_mean, worst.canary_max
        load = self._transfer.load if self._transfer.one_by_one else None
        again = None if load is None else (lambda replica: load(replica, version))
        self.fleet.admission = Admission(version, again, prove)

    def _prove_again(self) -> None:
        """The same weights: the canary once more, and no prompt of another use is remembered."""
        self.world.together(lambda: self.fleet.on_owned(self._prove))
        self.report.figures.pop("servers/update_s", None)

    def _log(self) -> None:
        with self._counting:
            resent, self._resent = self._resent, 0
        alive = sum(one.alive for one in self.fleet.owned)
        self.report.figures |= {"servers/alive": alive, "servers/resent": resent}

    def close(self) -> None:
        """Let go of the servers; those that this run has started end."""
        self.fleet.end()
        if self._transfer is not None:
            self._transfer.end()
        self.started.end()
