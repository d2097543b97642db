"""`rlpost check --dry-run`: the worst micro-batch of a recipe through its real engine, critic and reference.

No generator, no tasks, nothing in `run_dir`. Weights that are not on this machine are not fetched: a model of the same
shape with random ones, in a temporary folder, costs as much.
"""

from __future__ import annotations

import random
import resource
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlpost.batch import make_batch, with_scores
from rlpost.clock import Clock
from rlpost.critic import Critic
from rlpost.devices import GIB, find_device
from rlpost.document import Document
from rlpost.engine import Engine, Reference
from rlpost.errors import RunError
from rlpost.metrics import Metrics
from rlpost.model_shape import model_config
from rlpost.model_source import context_length, model_folder, text_config
from rlpost.objective import Objective
from rlpost.packing import Packer, make_packer, row_tokens_of
from rlpost.peak import fullest, gauge_of
from rlpost.plan import Plan, make_plan, micro_seconds
from rlpost.plan_report import available
from rlpost.policy import DTYPES
from rlpost.recipe import Recipe
from rlpost.run import make_engines
from rlpost.types import Micro, Task
from rlpost.update import Trainable, update
from rlpost.world import World

Parts = tuple[Engine, Reference | None, Critic | None]
LOAD, SCORE, FORWARD, BACKWARD, STEP = "load", "score", "forward and loss", "backward", "optimizer step"
ROUNDS = 2
"""The first one makes the optimizer's moments and warms up; the last one is timed."""
SMALLER_STATE = (
    "engine.zero_stage=3 on more ranks, engine.offload_optimizer=true on a GPU, model.lora, or a smaller model.path"
)
SMALLER_BATCH = (
    "lower batch.micro_tokens from {micro_tokens}, model.logp_chunk from {logp_chunk} or model.context from {context}"
)
LESS_KEPT = f"{SMALLER_BATCH}, or set model.gradient_checkpointing=true (it is {{gradient_checkpointing}})"
REMEDY = {LOAD: SMALLER_STATE, SCORE: SMALLER_BATCH, FORWARD: LESS_KEPT, BACKWARD: LESS_KEPT, STEP: SMALLER_STATE}


@dataclass(frozen=True, slots=True)
class Trial:
    """What a dry run measured."""

    widths: list[int]
    """Positions of each row of the micro-batch."""
    lengths: list[int]
    """Tokens of each document."""
    trained: int
    """Tokens of the micro-batch that the loss is over."""
    seconds: dict[str, float]
    peak_gib: dict[str, float]
    """Of each part, on the rank where it is largest."""
    before_gib: float
    """In use before the weights were loaded."""
    of: str
    """What was measured as memory."""
    updates: int
    """Optimizer steps that were taken."""


class Watch:
    """Seconds and memory by part; memory that runs out becomes a message that names the keys to lower."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        on_gpu = world.device.type == "cuda"
        self.gauge = gauge_of(world.device)
        self.clock = Clock(torch.cuda.synchronize if on_gpu else None, gauge=self.gauge)
        self.recipe, self.world = recipe, world

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Charge the block to a part."""
        try:
            with self.clock(part):
                yield
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            raise RunError(self._message(part, error)) from error

    def memory(self) -> float:
        """In use now, in GiB: what came before does not count."""
        self.gauge()
        return self.gauge()

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap."""
        return {name[len("time/") : -len("_s")]: x for name, x in self.clock.lap().items() if name.startswith("time/")}

    def _message(self, part: str, error: Exception) -> str:
        remedy = REMEDY[part].format(**keys_of(self.recipe))
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return f"the worst micro-batch must fit the memory of {self.world.device} ({part} did not: {reason}): {remedy}"


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory could not be had, on a GPU or on a CPU."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in ("can't allocate memory", "not enough memory", "CUDA out of memory", "bad_alloc")
    )


def dry_run(recipe: Recipe, world: World) -> Trial:
    """Score a worst-case micro-batch, train on it, and take the optimizer step, twice; every rank calls it."""
    with scratch_folder(world) as scratch, bounded_memory(world):
        folder = start_folder(recipe, scratch, world)
        context, vocab = context_length(recipe.model, folder), int(text_config(folder)["vocab_size"])
        packer = make_packer(recipe, world, folder)
        documents = worst_documents(recipe, context, vocab) if packer.columns.rank == 0 else []
        watch = Watch(recipe, world)
        before_gib = watch.memory()
        with watch(LOAD):
            parts = make_engines(recipe, folder, world)
        seconds = watch.lap()
        for _ in range(ROUNDS):
            scored = with_all_scores(documents, packer, parts, watch)
            micros, trained = train_once(scored, packer, parts, watch)
            seconds |= watch.lap()
        peaks = fullest(world.all_gather_object(watch.clock.total_peak_gib))
    return Trial(
        widths=[micro.tokens_BT.shape[1] for micro in micros for _ in micro.tokens_BT],
        lengths=[document.length for document in documents],
        trained=trained // (world.size // packer.columns.size),
        seconds={part: seconds[part] for part in REMEDY},
        peak_gib={part: peaks[part] for part in REMEDY},
        before_gib=before_gib,
        of=watch.gauge.of,
        updates=parts[0].updates,
    )


@contextmanager
def scratch_folder(world: World) -> Iterator[Path]:
    """A folder of the main rank's, the same on every rank of this machine, that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rlpost-dry-run-") as own:
        yield Path(world.all_gather_object(own)[0])
        world.barrier()


@contextmanager
def bounded_memory(world: World) -> Iterator[None]:
    """On a CPU, let allocations beyond what is free fail, where the system would end the process without a word."""
    if world.device.type == "cuda":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = _kib("/proc/self/status", "VmData") << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + free_bytes() // world.size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def free_bytes() -> int:
    """Memory of this machine that could be had now."""
    return _kib("/proc/meminfo", "MemAvailable") << 10


def _kib(file: str, field: str) -> int:
    [line] = [line for line in Path(file).read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1])


def start_folder(recipe: Recipe, scratch: Path, world: World) -> Path:
    """The recipe's model where its weights are on this machine, else one of its shape in `scratch`."""
    path = recipe.model.path or ""
    if recipe.model.init is not None or path.endswith(".gguf"):
        return model_folder(replace(recipe, run_dir=str(scratch)), world)
    local = Path(path).expanduser()
    here = local if local.is_dir() else _in_cache(path)
    if here is not None and any(here.glob("*.safetensors")):
        return here
    folder = scratch / "random"
    if world.is_main:
        _write_random(recipe, folder)
    world.barrier()
    return folder


def _in_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _write_random(recipe: Recipe, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config, trusted = model_config(recipe), recipe.model.trust_remote_code
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        how = {"dtype": DTYPES[recipe.model.dtype], "trust_remote_code": trusted}
        AutoModelForCausalLM.from_config(config, **how).save_pretrained(folder)


def worst_documents(recipe: Recipe, context: int, vocab: int) -> list[Document]:
    """Documents that fill the rows of one micro-batch, as long as they may be, every token but the first trained."""
    width = max(row_tokens_of(recipe), context)
    whole, rest = divmod(width, context)
    lengths = ([context] * whole + [rest] * (rest > 1)) * max(1, recipe.batch.micro_tokens // width)
    dice = random.Random(recipe.seed)
    documents = []
    for i, length in enumerate(lengths):
        prompt_id, *token_ids = (dice.randrange(vocab) for _ in range(length))
        sign = 1.0 - 2.0 * (i % 2)  # a group with spread
        advantage = torch.linspace(0.5, 1.0, len(token_ids)) * sign
        nothing = (0.0,) * len(token_ids)
        documents.append(Document((prompt_id,), tuple(token_ids), nothing, advantage, correct=sign > 0))
    return documents


def with_all_scores(documents: Sequence[Document], packer: Packer, parts: Parts, watch: Watch) -> list[Document]:
    """The documents with every score that the recipe can ask for; the policy's stand for the generator's as well."""
    engine, reference, critic = parts

    def scores(micro: Micro) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with watch(SCORE):
            found["prox_logp"], found["entropy"] = engine.token_logp(micro)
            if reference is not None:
                found["ref_logp"] = reference.token_logp(micro)
            if critic is not None:
                found["value"] = critic.values(micro)
                found["return"] = found["value"] + 1.0
        return found

    scored = with_scores(documents, packer, watch.world, scores)
    return [replace(one, behavior_logp=tuple(one.scores["prox_logp"].tolist())) for one in scored]


def train_once(
    documents: Sequence[Document], packer: Packer, parts: Parts, watch: Watch
) -> tuple[tuple[Micro, ...], int]:
    """One optimizer step of policy and critic: its micro-batches, and its trained tokens over all ranks."""
    (engine, _, critic), world, algorithm = parts, watch.world, watch.recipe.algorithm
    objective, metrics, version = Objective(algorithm, world), Metrics(world), engine.updates
    objective.begin(documents)
    batch = make_batch(documents, packer, world, algorithm.aggregation, algorithm.aggregation_tokens or 1)

    def policy_loss(micro: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        with watch(FORWARD):
            logp_BT, entropy_BT = engine.token_logp(micro)
            return objective.policy_loss(micro, logp_BT, entropy_BT, version=version, measured=True)

    def value_loss(micro: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        assert critic is not None
        with watch(FORWARD):
            return objective.value_loss(micro, critic.values(micro))

    update(Watched(engine, watch), batch, policy_loss, metrics)
    if critic is not None:
        update(Watched(critic, watch), batch, value_loss, metrics)
    return batch.micros, batch.step_tokens


@dataclass(frozen=True)
class Watched:
    """An engine whose parts of an update are charged to the watch."""

    engine: Trainable
    watch: Watch

    def backward(self, loss: Tensor) -> None:
        """As the engine's."""
        with self.watch(BACKWARD):
            self.engine.backward(loss)

    def step(self) -> float:
        """As the engine's."""
        with self.watch(STEP):
            return self.engine.step()


def plan_of(recipe: Recipe, tasks: Sequence[Task], world: World) -> Plan | None:
    """The plan for this machine; None where a model of this kind, or this device, cannot be planned."""
    try:
        device = find_device(None, recipe.model.dtype, ranks=world.size)
        plan = make_plan(recipe, device, tasks, ranks=world.size)
    except RunError:
        return None
    return plan if plan.device.is_gpu == (world.device.type == "cuda") else None


def report(trial: Trial, plan: Plan | None) -> str:
    """What was measured beside what the plan says, and whether it leaves room for the generator."""
    longest, peak_gib = max(trial.lengths), max(trial.peak_gib.values())
    rows = f"{len(trial.widths)} x {max(trial.widths)} positions, documents of up to {longest}"
    planned = {} if plan is None else micro_seconds(plan, trial.widths, trial.lengths)
    lines = [
        f"dry run: {rows}, {trial.trained} trained tokens",
        f"GiB: {trial.of},",
        f"above the {trial.before_gib:.2f} before the weights were loaded",
        "",
        f"{'part':<32}{'s':>12}{'s, plan':>12}{'peak GiB':>12}{'GiB, plan':>12}",
    ]
    for part, spent in trial.seconds.items():
        lines.append(_row(part, spent, planned.get(part), trial.peak_gib[part] - trial.before_gib, None))
    train = trial.seconds[FORWARD] + trial.seconds[BACKWARD]
    held = None if plan is None else training_bytes(plan, longest) / GIB
    lines.append(
        _row("forward and backward; all memory", train, planned.get("train"), peak_gib - trial.before_gib, held)
    )
    return "\n".join([*lines, *([] if plan is None else [_verdict(plan, peak_gib)])]) + "\n"


def _row(name: str, *figures: float | None) -> str:
    texts = [
        "-" if figure is None else form.format(figure)
        for figure, form in zip(figures, ("{:.3g}", "{:.3g}", "{:.2f}", "{:.2f}"), strict=True)
    ]
    return f"{name:<32}" + "".join(f"{text:>12}" for text in texts)


def training_bytes(plan: Plan, length: int) -> int:
    """What the plan counts on while training with documents of a length, but for the generator."""
    longest = replace(plan, prompt=max(1, length - plan.longest))
    return sum(held for part, (_, held) in longest.memory.items() if part != "generator")


def _verdict(plan: Plan, peak_gib: float) -> str:
    generator, room = plan.memory["generator"][1] / GIB, available(plan) / GIB
    whole = peak_gib + generator
    fits = "fits" if whole <= room else "DOES NOT FIT: " + LESS_KEPT.format(**keys_of(plan.recipe))
    return f"with {generator:.2f} GiB of the generator {whole:.2f} of {room:.2f} that may be used: {fits}"


def keys_of(recipe: Recipe) -> dict[str, Any]:
    """The keys that messages name, as they are now."""
    model = recipe.model
    return {
        "micro_tokens": recipe.batch.micro_tokens,
        "logp_chunk": model.logp_chunk,
        "context": model.context or "what the model was made for",
        "gradient_checkpointing": str(model.gradient_checkpointing).lower(),
    }
