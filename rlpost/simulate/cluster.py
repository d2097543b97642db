"""A cluster as data: who generates, who trains, how fast, how long answers are; and how a description is loaded.

`None` means "decided from the rest": rates follow from the model's size and the device, with the utilisations that
`rlpost check --plan` counts on. They are guesses until something was measured, which `--from-run` takes from a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rlpost.devices import DEVICES
from rlpost.errors import RunError
from rlpost.plugins import did_you_mean
from rlpost.yaml_tree import override, parse


@dataclass
class ModelSize:
    """What rates follow from where they are not given."""

    params: float = 7.6e9
    bytes_per_param: float = 2.0
    kv_bytes: float = 57344.0
    """Of the cache, a token: 2 x layers x key-value heads x head size x bytes. The default is Qwen2.5-7B's."""
    device: str = "h100"


@dataclass
class Replicas:
    """Generators, all alike."""

    tensor_parallel: int = 1
    """GPUs of one replica."""
    max_num_seqs: int = 256
    """Answers that a replica decodes at once; fewer where the cache holds fewer of mean length."""
    cache_tokens: float | None = None
    """Tokens that its cache holds; None: what is left of 90 % of the memory beside the weights."""
    step_s: float | None = None
    """A decode step of b answers takes `step_s + sequence_s * b` seconds."""
    sequence_s: float | None = None
    table: list[list[float]] | None = None
    """Instead: measured [answers, seconds of a decode step], linear between; beyond the last, its slope goes on."""
    prefill_rate: float | None = None
    """Prompt tokens a second of one replica, which decodes nothing meanwhile."""
    whole_groups: bool | None = None
    """All answers of a prompt on one replica, which reads it once; None: where there is a prompt for each replica."""


@dataclass
class Lengths:
    """Tokens of answers and prompts."""

    kind: Literal["lognormal", "pareto", "fixed", "quantiles"] = "lognormal"
    mean: float = 2000.0
    """Before the limit of `max_new_tokens`."""
    sigma: float = 1.0
    """Of the logarithm of a lognormal length."""
    tail: float = 1.5
    """Of a Pareto length: P(length > x) falls as x^-tail."""
    quantiles: list[list[float]] | None = None
    """[share, tokens] from share 0 to 1, linear between."""
    max_new_tokens: int = 16384
    prompt: int = 256
    alike: float = 0.3
    """Correlation of two answers to one prompt, in normal scores of their lengths."""


@dataclass
class Training:
    """The trainer."""

    rate: float | None = None
    """Tokens of prompts and answers a second of one GPU: everything that a step does with them."""
    kept_frac: float = 1.0
    """Share of the tokens that are trained: less than 1 where groups without spread are left out."""
    fixed_s: float = 2.0
    """Seconds of a step that do not depend on its tokens: optimizer, rewards that are waited for, logs."""


@dataclass
class Sync:
    """The trained weights on their way to all replicas, during which all of them and the trainer wait."""

    seconds: float | None = None
    """None: bytes of the weights / `gb_per_s` + `latency_s`."""
    gb_per_s: float = 20.0
    latency_s: float = 1.0


@dataclass
class Failures:
    """Replicas die and are started again; the trainer never dies here."""

    mtbf_h: float | None = None
    """Mean hours between failures of one GPU; None: never."""
    restart_s: float = 300.0
    """Until a replica that died has the weights and serves again."""


@dataclass
class Cluster:
    """One description.

    >>> Cluster(gpus=16, generator_gpus=8).num_replicas
    8
    """

    gpus: int = 64
    """All of them."""
    placement: Literal["separate", "colocated"] = "separate"
    """`separate`: some generate, the others train. `colocated`: all generate, then all train."""
    generator_gpus: int | None = None
    """Of a separate placement; None: half."""
    steps: int = 40
    prompts_per_step: int = 128
    group_size: int = 16
    max_staleness: int = 1
    """k: a token is trained at most k optimizer steps after the weights that wrote it. 0: generate, then train."""
    ahead: int | None = None
    """Steps whose prompts are given out beyond the one that is waited for; None: k, the most that the bound allows."""
    first_come: bool = False
    """Train the groups that are whole first; otherwise in the order in which they were given out. With late=wait it
    needs ahead < k: where all is given out that the bound allows, what is due in a step is all that it can train."""
    late: Literal["wait", "drop"] = "wait"
    """With first_come, what becomes of groups that would be too stale in the next step: they are waited for, or
    thrown away and replaced."""
    in_flight: Literal["recompute", "keep", "wait"] = "recompute"
    """What becomes of unfinished answers at new weights: read again and continued; continued on the cache that they
    have; or the update waits for them."""
    partial_tokens: int | None = None
    """Of max_staleness=0: tokens of an answer that are written in one step. The rest follows in the next ones, whose
    prompts are fewer by the groups that go on; a step trains those that are whole, which may be any number."""
    seed: int = 0
    model: ModelSize = field(default_factory=ModelSize)
    replicas: Replicas = field(default_factory=Replicas)
    lengths: Lengths = field(default_factory=Lengths)
    train: Training = field(default_factory=Training)
    sync: Sync = field(default_factory=Sync)
    failures: Failures = field(default_factory=Failures)

    @property
    def generating(self) -> int:
        """GPUs that generate."""
        if self.placement == "colocated":
            return self.gpus
        size = self.replicas.tensor_parallel
        return self.gpus // 2 // size * size if self.generator_gpus is None else self.generator_gpus

    @property
    def training(self) -> int:
        """GPUs that train."""
        return self.gpus if self.placement == "colocated" else self.gpus - self.generating

    @property
    def num_replicas(self) -> int:
        """Generators."""
        return self.generating // self.replicas.tensor_parallel

    @property
    def rollouts(self) -> int:
        """Of a step."""
        return self.prompts_per_step * self.group_size

    @property
    def waves_ahead(self) -> int:
        """Steps given out beyond the one that is waited for."""
        return self.max_staleness if self.ahead is None else self.ahead


def load(path: Path | None, overrides: Sequence[str] = (), *, under: Mapping[str, Any] | None = None) -> Cluster:
    """The description of a YAML file and `key=value`, over what `under` says; every problem of it at once."""
    tree: dict[str, Any] = merged(dict(under or {}), {} if path is None else parse(path))
    problems = [problem for text in overrides for problem in override(tree, text)]
    cluster = filled(Cluster, tree, "", problems)
    problems += check(cluster) if not problems else []
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) != 1)} in the description of the cluster"
        raise RunError("\n".join([f"{count}:", *(f"  - {problem}" for problem in problems)]))
    return cluster


def merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees, the second over the first.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    found = dict(under)
    for key, value in over.items():
        known = found.get(key)
        found[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return found


def filled(schema: Any, tree: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """A dataclass of these values; what does not fit is told, and left at its default."""
    hints, given = get_type_hints(schema), {}
    for key, value in tree.items():
        name = f"{where}{key}"
        if key not in hints:
            known = did_you_mean(key, hints) or f" (the keys here are {', '.join(hints)})"
            problems.append(f"{name}: no such key{known}")
        elif is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                given[key] = filled(hints[key], value, f"{name}.", problems)
            else:
                problems.append(f"{name} must be a mapping of keys to values (got {value!r})")
        elif fits(value, hints[key]):
            given[key] = value
        else:
            problems.append(f"{name} must be {described(hints[key])} (got {value!r})")
    return schema(**given)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type.

    >>> fits(1, float), fits(True, int), fits([[1, 0.5]], list[list[float]] | None)
    (True, False, True)
    """
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(one, get_args(hint)[0]) for one in value)
    if get_args(hint):
        return any(fits(value, one) for one in get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def described(hint: Any) -> str:
    """A type in words.

    >>> described(int | None)
    'an integer or null'
    """
    if get_origin(hint) is Literal:
        return " or ".join(repr(one) for one in get_args(hint))
    if get_origin(hint) is list:
        return "a list of pairs such as [1, 0.01]"
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    return " or ".join(words.get(one, "a list of pairs such as [1, 0.01]") for one in get_args(hint) or (hint,))


_BOUNDS = {
    ">= 1": "gpus steps prompts_per_step group_size partial_tokens model.params replicas.tensor_parallel "
    "replicas.max_num_seqs lengths.max_new_tokens lengths.mean",
    ">= 0": "max_staleness ahead seed lengths.prompt lengths.sigma train.fixed_s sync.seconds sync.latency_s "
    "failures.restart_s replicas.step_s replicas.sequence_s",
    "> 0": "model.bytes_per_param model.kv_bytes replicas.cache_tokens replicas.prefill_rate train.rate "
    "sync.gb_per_s failures.mtbf_h",
    "> 1": "lengths.tail",
}
"""What must hold, and for which keys, where they are given."""


def check(cluster: Cluster) -> list[str]:
    """What a simulation needs, as the problems of a description."""
    problems = []
    for rule, keys in _BOUNDS.items():
        sign, bound = rule.split()
        for key in keys.split():
            value = value_of(cluster, key)
            if value is not None and not (value >= float(bound) if sign == ">=" else value > float(bound)):
                problems.append(f"{key} must be {rule} (got {value:g})")
    return problems or [*_check_placement(cluster), *_check_rates(cluster), *_check_order(cluster)]


def value_of(cluster: Cluster, key: str) -> Any:
    """What stands at a key.

    >>> value_of(Cluster(), "lengths.prompt")
    256
    """
    found: Any = cluster
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _check_placement(cluster: Cluster) -> list[str]:
    size, problems = cluster.replicas.tensor_parallel, []
    if cluster.placement == "colocated" and cluster.generator_gpus not in (None, cluster.gpus):
        problems.append(
            f"generator_gpus must be left out for placement=colocated, as all generate (got {cluster.generator_gpus})"
        )
    elif cluster.generating % size or not cluster.generating:
        key = "gpus" if cluster.placement == "colocated" else "generator_gpus"
        problems.append(
            f"{key} must be a multiple of replicas.tensor_parallel={size} and hold a replica (got {cluster.generating})"
        )
    elif cluster.training < 1:
        problems.append(
            f"generator_gpus must leave a GPU of gpus={cluster.gpus} to the trainer (got {cluster.generating}); "
            "lower it, or placement=colocated"
        )
    return problems


def _check_rates(cluster: Cluster) -> list[str]:
    replicas, lengths, problems = cluster.replicas, cluster.lengths, []
    if (replicas.step_s is None) != (replicas.sequence_s is None):
        problems.append("replicas.step_s and replicas.sequence_s must be given together (got one of them)")
    elif replicas.step_s == 0 == replicas.sequence_s:
        problems.append("replicas.step_s or replicas.sequence_s must be > 0 (got 0 and 0)")
    if replicas.table is not None and not rises(replicas.table, strictly=1):
        problems.append(
            "replicas.table must be pairs of rising answers and seconds > 0, such as [[1, 0.01], [64, 0.02]] "
            f"(got {replicas.table})"
        )
    if lengths.kind == "quantiles" and not spans(lengths.quantiles):
        problems.append(
            "lengths.quantiles must be pairs of share and tokens that rise from share 0 to share 1, such as "
            f"[[0, 10], [0.5, 100], [1, 900]] (got {lengths.quantiles})"
        )
    if not 0 < cluster.train.kept_frac <= 1:
        problems.append(f"train.kept_frac must be above 0 and at most 1 (got {cluster.train.kept_frac:g})")
    if not 0 <= lengths.alike <= 1:
        problems.append(f"lengths.alike must be from 0 to 1 (got {lengths.alike:g})")
    if cluster.model.device not in DEVICES:
        problems.append(f"model.device must be one of {', '.join(DEVICES)} (got {cluster.model.device!r})")
    return problems


def rises(pairs: list[list[float]], *, strictly: int) -> bool:
    """Whether pairs rise: strictly in their first number, and all are > 0 from the place `strictly` on."""
    whole = bool(pairs) and all(len(pair) == 2 for pair in pairs)
    if not whole or any(pair[strictly] <= 0 for pair in pairs):
        return False
    return all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(pairs))


def spans(pairs: list[list[float]] | None) -> bool:
    """Whether pairs are quantiles from 0 to 1."""
    return pairs is not None and len(pairs) > 1 and rises(pairs, strictly=1) and (pairs[0][0], pairs[-1][0]) == (0, 1)


def _check_order(cluster: Cluster) -> list[str]:
    k, problems = cluster.max_staleness, []
    if cluster.waves_ahead > k:
        problems.append(
            f"ahead must be <= max_staleness={k} (got {cluster.ahead}): what is given out earlier would be too stale"
        )
    if cluster.late == "drop" and not cluster.first_come:
        problems.append("late=drop needs first_come=true: in the order of submission no group is ever too stale")
    if cluster.partial_tokens is not None and k:
        problems.append(f"partial_tokens needs max_staleness=0 (got {k}): leave one of them out")
    return problems


def changed(cluster: Cluster, **values: Any) -> Cluster:
    """The same description but for some of its fields.

    >>> changed(Cluster(), gpus=8).gpus
    8
    """
    own = {one.name: getattr(cluster, one.name) for one in fields(cluster)}
    return Cluster(**(own | values))
