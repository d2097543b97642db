"""How fast the parts of a described cluster are, and how long its answers: what was given, else guessed.

Suffixes: `P` prompts of a wave, `G` answers of a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlpost.devices import DEVICES, GIB
from rlpost.plan import BANDWIDTH_UTILISATION, DECODE_STEP_S, TOKEN_S, UTILISATION
from rlpost.simulate.cluster import Cluster, Lengths

MEMORY_FRAC = 0.9
"""Of a generator's GPU, which vLLM takes."""
_SHARES = 4096
"""At which a distribution is looked at for its moments."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Everything that the simulation asks of a cluster's speed.

    >>> rates(Cluster()).slots
    256
    """

    slots: int
    """Answers that a replica decodes at once."""
    decode_s: tuple[float, ...]
    """Seconds of a decode step, by how many answers it has, from 0 to `slots`."""
    prefill_rate: float
    """Tokens a second of a replica."""
    train_rate: float
    """Tokens a second of all GPUs that train."""
    sync_s: float
    whole_groups: bool


def rates(cluster: Cluster) -> Rates:
    """What was given, and for the rest the guess from model and device."""
    model, replicas, device = cluster.model, cluster.replicas, DEVICES[cluster.model.device]
    flops = device.rate["bfloat16"] * UTILISATION
    weights = model.params * model.bytes_per_param
    slots = num_slots(cluster)
    prefill = replicas.prefill_rate or replicas.tensor_parallel * flops / (2 * model.params)
    train = cluster.train.rate or flops / (6 * model.params)
    sync = cluster.sync.seconds
    if sync is None:
        sync = weights / (cluster.sync.gb_per_s * 1e9) + cluster.sync.latency_s
    whole = replicas.whole_groups
    return Rates(
        slots=slots,
        decode_s=(0.0, *(decode_seconds(cluster, num) for num in range(1, slots + 1))),
        prefill_rate=prefill,
        train_rate=train * cluster.training,
        sync_s=sync,
        whole_groups=cluster.prompts_per_step >= cluster.num_replicas if whole is None else whole,
    )


def decode_seconds(cluster: Cluster, num: int) -> float:
    """Of a step of `num` answers.

    Guessed: the larger of reading (weights, and the cache of every answer) and arithmetic, and vLLM's own work.
    """
    replicas, model = cluster.replicas, cluster.model
    if replicas.table is not None:
        return interpolated(replicas.table, num)
    if replicas.step_s is not None and replicas.sequence_s is not None:
        return replicas.step_s + replicas.sequence_s * num
    device, size = DEVICES[model.device], replicas.tensor_parallel
    cached = num * (cluster.lengths.prompt + written_at_once(cluster.lengths)) * model.kv_bytes
    reading = (model.params * model.bytes_per_param + cached) / (size * device.bandwidth * BANDWIDTH_UTILISATION)
    computing = 2 * model.params * num / (size * device.rate["bfloat16"] * UTILISATION)
    return max(reading, computing) + DECODE_STEP_S + TOKEN_S * num


def interpolated(table: list[list[float]], num: int) -> float:
    """Linear between the points of a table, and beyond them.

    >>> interpolated([[1, 1.0], [3, 2.0]], 2), interpolated([[1, 1.0], [3, 2.0]], 5), interpolated([[4, 0.5]], 9)
    (1.5, 3.0, 0.5)
    """
    if len(table) == 1 or num <= table[0][0]:
        return table[0][1]
    place = next((i for i, (x, _) in enumerate(table) if x >= num), len(table) - 1)
    (x_0, y_0), (x_1, y_1) = table[place - 1], table[place]
    return y_0 + (y_1 - y_0) * (num - x_0) / (x_1 - x_0)


def num_slots(cluster: Cluster) -> int:
    """Answers that a replica decodes at once: its limit, or what the cache holds where answers are as long as is usual.

    vLLM takes answers in while there is room and puts some back when it ends; that is not modelled.
    """
    model, replicas = cluster.model, cluster.replicas
    held = replicas.cache_tokens
    if held is None:
        memory = MEMORY_FRAC * DEVICES[model.device].memory_gib * GIB * replicas.tensor_parallel
        held = (memory - model.params * model.bytes_per_param) / model.kv_bytes
    return max(1, min(replicas.max_num_seqs, int(held / (cluster.lengths.prompt + written_at_once(cluster.lengths)))))


def written_at_once(lengths: Lengths) -> float:
    """Tokens that an answer has on average while it is being written: E[n^2] / 2 E[n], as long ones run longer.

    >>> written_at_once(Lengths(kind="fixed", mean=100))
    50.0
    """
    shares = (np.arange(_SHARES) + 0.5) / _SHARES
    n = at_shares(lengths, shares).astype(np.float64)
    return float((n * n).sum() / (2 * n.sum()))


def at_shares(lengths: Lengths, share: NDArray[np.float64]) -> NDArray[np.int64]:
    """The lengths that these shares of all answers are no longer than."""
    if lengths.kind == "fixed":
        found = np.full(share.shape, lengths.mean)
    elif lengths.kind == "pareto":  # P(n > x) = (least / x)^tail
        least = lengths.mean * (lengths.tail - 1) / lengths.tail
        found = least * (1 - share) ** (-1 / lengths.tail)
    elif lengths.kind == "quantiles":
        x, y = np.array(lengths.quantiles).T
        found = np.interp(share, x, y)
    else:
        from scipy.special import ndtri

        found = np.exp(math.log(lengths.mean) - lengths.sigma**2 / 2 + lengths.sigma * ndtri(share))
    return np.clip(np.rint(found), 1, lengths.max_new_tokens).astype(np.int64)


def draw(lengths: Lengths, num: int, group_size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Lengths [P, G] of a wave: those of one prompt share a normal score, so that two correlate by `alike`."""
    from scipy.special import ndtr

    shared_P1, own_PG = rng.standard_normal((num, 1)), rng.standard_normal((num, group_size))
    score_PG = math.sqrt(lengths.alike) * shared_P1 + math.sqrt(1 - lengths.alike) * own_PG
    return at_shares(lengths, np.clip(ndtr(score_PG), 1e-12, 1 - 1e-12))
