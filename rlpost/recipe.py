"""A run, as data: the tree of dataclasses behind a recipe YAML, and how it is loaded. `check.py` compares its fields.

A recipe says only what departs from the defaults here and from the vetted defaults of the named algorithm
(`algorithms.py`). `None` means "decided from the rest of the recipe"; `load` fills it in, so the resolved recipe that
is printed and saved with the run has no hidden choice left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlpost.algorithm_recipe import Algorithm
from rlpost.algorithms import ALGORITHMS, with_bundle
from rlpost.cluster_recipe import Failure, Preempt, Watchdog
from rlpost.errors import RecipeError
from rlpost.model_recipe import InitModel, Lora, Model
from rlpost.plugins import did_you_mean, make_importable
from rlpost.server_recipe import Servers
from rlpost.synth_recipe import Synth
from rlpost.task_recipe import Evaluation, Prompting, Tasks, TaskSource
from rlpost.yaml_tree import expand, override, parse

__all__ = ["InitModel", "Lora", "Model", "Prompting", "Recipe", "TaskSource", "load", "read", "read_tree", "to_yaml"]
CANARY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
CRITIC_LR_RATIO = 2.0
"""As in VAPO, arXiv:2504.05118: 1e-6 and 2e-6."""
_WORDS: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


@dataclass
class SamplingRecipe:
    """How rollouts are drawn in training."""

    group_size: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repeats: int | None = None
    """End an answer that goes round in circles: its last piece, of at most `repeat_tokens` tokens, has come so many
    times in a row. It counts as truncated. null: never."""
    repeat_tokens: int = 64


@dataclass
class ExploreBudget:
    """Where the waves of `explore` end, whatever the explorers ask for."""

    waves: int = 64
    """Of a step, beyond the first."""
    rollouts: int | None = None
    """Of a step, beyond the first wave, over all ranks; null: no bound."""


@dataclass
class GeneratorRecipe:
    """Who samples rollouts, and with how much memory."""

    kind: Literal["local_vllm", "remote_vllm", "hf"] = "local_vllm"
    """vLLM in the trainer's process, vLLM servers apart from it, or plain transformers."""
    memory_frac: float = 0.45
    """Share of each GPU that vLLM takes (GPU only)."""
    kv_cache_gib: float = 2.0
    """Size of the key-value cache in GiB (CPU only)."""
    max_num_seqs: int = 256
    """Sequences that are decoded at once."""
    seeding: Literal["call", "request"] = "call"
    """`call`: one seed a step and rank, fastest. `request`: one a rollout, so that rollouts do not depend on the
    number of ranks (up to rounding)."""
    max_staleness: int = 0
    """Steps that rollouts may be begun ahead of the step that trains them. With servers (`concurrent` generators) they
    are written while the trainer trains; others write them in turn. 0: each step is trained on its own policy's."""
    first_come: bool = False
    """Train the groups that are whole first, and none later than `max_staleness` allows, half of which is room for
    overtaking; else in the order in which they were begun, so that long answers are as fresh as short ones."""
    partial_tokens: int | None = None
    """Tokens of an answer that are written in one step; the rest follows in the next ones. null: all."""
    sleep_level: Literal[0, 1, 2] = 1
    """What vLLM gives back while training (GPU only): 0 nothing, 1 weights to the CPU and the cache, 2 both dropped."""
    enforce_eager: bool | None = None
    """No CUDA graphs; None: on a CPU."""
    canary_tolerance: float | None = None
    """Largest allowed mean |trainer - generator| log-prob of the canary, in nats; None: 1e-3 in float32, 0.2 in
    bfloat16, where rounding alone gives 0.08 through the 30 layers of SmolLM2-135M."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, or of a server."""
    servers: Servers = field(default_factory=Servers)
    """Of `remote_vllm`."""


@dataclass
class EngineRecipe:
    """DeepSpeed and the optimizer."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    lr: float = 1e-6
    lr_rollouts: int | None = None
    """Trained rollouts a step that `lr` was chosen for: it grows with the square root of what a step has over them."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    decay_frac: float = 1.0
    """The last part of the optimizer steps, over which `linear` and `cosine` fall to 0."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory and step there: ZeRO-Offload, arXiv:2101.06840."""
    offload_params: bool = False
    """Keep this rank's shard of the weights there too, also of critic and reference; zero_stage 3 only."""
    park: Literal["none", "optimizer", "all"] | None = None
    """What of the trainer waits in the host's memory while the generator is awake; None: `optimizer` where vLLM sleeps
    while training (on a GPU) and the optimizer is not offloaded anyway, else `none`."""
    sequence_parallel: int = 1
    """So many neighbouring ranks share each row and hold an equal part of its positions (Ulysses), for long rows."""
    sync_bucket_mib: int = 512
    """Weights that are gathered at once on their way to the generator."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Merged over the DeepSpeed configuration that is made from the fields above."""


@dataclass
class BatchRecipe:
    """How rollouts become rows."""

    micro_tokens: int = 8192
    """Positions in one forward pass of one rank."""
    row_tokens: int | None = None
    """Positions of one row, in which several documents are packed; a longer one has a row for itself. None:
    `micro_tokens` with flash attention, else 64 to 512, as costs least: plain attention pays for a row's square."""
    share_prompts: bool = True
    """Keep one copy of a prompt in a row for all its answers there, where that costs less; not with flash attention."""


@dataclass
class Sft:
    """Supervised training on `solution`: `rlpost sft`, and the base model of a recipe that has no trained one."""

    tasks: TaskSource = field(default_factory=TaskSource)
    steps: int = 500
    batch_size: int = 64
    """Documents an optimizer step, over all ranks."""
    lr: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    decay_frac: float = 1.0
    """The last part of the steps, over which `linear` and `cosine` fall to 0."""
    weight_decay: float = 0.0
    max_seconds: float | None = None
    """Stop after so much time, for comparisons at equal compute; the schedule still counts steps."""
    target_loss: float | None = None
    """Stop where the mean loss of the last 20 steps is so low, for comparisons of bases that fit their data equally."""


@dataclass
class Logging:
    """Where figures go, beside `metrics.jsonl`."""

    tensorboard: bool = True
    wandb: str | None = None
    """A W&B project; None: not used."""
    samples_per_step: int = 4
    """Rollouts of a step written to `samples.jsonl`, best and worst first; 0: none."""
    noise_every: int = 10
    """Steps between measurements of the gradient noise scale; 0: none."""


@dataclass
class Recipe:
    """One run."""

    name: str | None = None
    """The run's folder below `run_dir`; None: the recipe file's name."""
    run_dir: str = "runs"
    seed: int = 0
    steps: int = 100
    prompts_per_step: int = 32
    """Over all ranks."""
    model: Model = field(default_factory=Model)
    tasks: Tasks = field(default_factory=Tasks)
    curriculum: dict[str, Any] = field(default_factory=lambda: {"use": "uniform"})
    """`use`: a name in `curricula/` or a dotted path; the rest are its parameters. Left out: the algorithm's."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Each with `use` (a name in `rewards/` or a dotted path), `weight` (default 1.0), the reward's parameters, and
    `on_error`, `timeout_s` (of `failure` where left out) and `isolate` (whether it runs in a process apart)."""
    group_rewards: list[dict[str, Any]] = field(default_factory=list)
    """The same for functions of a whole group, asked once it is complete and its rollouts have their `rewards`. What
    they give is trained on; what counts as solved, and evaluation, know only `rewards`."""
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    rollout: dict[str, Any] | None = None
    """What leads every answer over several calls of the generator: `use` (a name in `rlpost/turns/` or a dotted path)
    and its parameters; null: one call makes an answer."""
    explore: list[dict[str, Any]] = field(default_factory=list)
    """Explorers, asked in this order for further rollouts: each with `use` (a name in `rlpost/explore/` or a dotted
    path) and its parameters. Left out: the algorithm's."""
    explore_budget: ExploreBudget = field(default_factory=ExploreBudget)
    algorithm: Algorithm = field(default_factory=Algorithm)
    generator: GeneratorRecipe = field(default_factory=GeneratorRecipe)
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    sft: Sft | None = None
    """Present: a base model is trained first, once, and kept in `run_dir`."""
    synth: Synth | None = None
    """Present: difficult problems can be made, with `rlpost synth`."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    logging: Logging = field(default_factory=Logging)
    save_every: int = 50
    """Steps between checkpoints; 0: only at the end."""
    save_in_background: bool = True
    """Go on with training while a copy of the state, in the host's memory, is written."""
    keep_checkpoints: int = 2
    """The newest so many stay."""
    keep_every: int = 0
    """Checkpoints of every so many steps stay as well; 0: none for that."""
    keep_best: str | None = None
    """A metric such as `eval/pass@1`: the checkpoint at its highest value stays as well, or with a minus in front of
    the name that at its lowest. A checkpoint counts where the metric was logged since the one before it."""
    preempt: Preempt = field(default_factory=Preempt)
    failure: Failure = field(default_factory=Failure)
    watchdog: Watchdog = field(default_factory=Watchdog)
    resume: str = "never"
    """`never`, `auto` (from the newest whole checkpoint, or the start where there is none), or a checkpoint's path."""
    resume_changed: bool = False
    """Go on also where the recipe differs from the checkpoint's in what changes the numbers."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file and `key=value` overrides, every default filled in; plug-ins beside it can be named."""
    recipe, problems = read(path, overrides)
    if problems:
        raise RecipeError(problems)
    return recipe


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """The recipe as far as it makes sense, and every line of it that does not."""
    path = Path(path)
    make_importable(path.parent)
    return read_tree(parse(path), overrides, name=path.stem)


def read_tree(tree: dict[str, Any], overrides: Sequence[str] = (), *, name: str) -> tuple[Recipe, list[str]]:
    """The same of keys and values; `name` is the run's where they do not say it."""
    make_importable(Path.cwd())
    tree = expand(tree)
    problems: list[str] = []
    for text in sorted(overrides, key=lambda text: not text.startswith("algorithm.name=")):
        problems += override(tree, text)
        _name_explorers(tree)  # so that a later override finds the explorer that it changes
    _name_algorithm(tree)
    _list_sources(tree)
    config: DictConfig = OmegaConf.structured(Recipe)
    _merge(config, Recipe, tree, "", problems)
    for key in sorted(OmegaConf.missing_keys(config)):
        problems.append(f"{key} must be given")
        OmegaConf.update(config, key, "")
    recipe = OmegaConf.to_object(config)
    assert isinstance(recipe, Recipe)
    return _fill(recipe, name), problems


def _list_sources(tree: dict[str, Any]) -> None:
    """A list of training sources: the first stays, the others stand beside it."""
    tasks = tree.get("tasks")
    if isinstance(tasks, dict) and isinstance(tasks.get("train"), list) and tasks["train"]:
        first, *others = ({"path": one} if isinstance(one, str) else one for one in tasks["train"])
        tasks |= {"train": first, "more": [*others, *(tasks.get("more") or [])]}


def _name_explorers(tree: dict[str, Any]) -> None:
    """Fill in the explorers that the named algorithm stands for, where the recipe lists none."""
    section = tree.get("algorithm")
    name = section.get("name", Algorithm.name) if isinstance(section, dict) else section or Algorithm.name
    bundle = ALGORITHMS.get(str(name))
    if "explore" not in tree and bundle is not None and bundle.explore:
        tree["explore"] = deepcopy(list(bundle.explore))


def _name_algorithm(tree: dict[str, Any]) -> None:
    """Fill in what the named algorithm stands for, below what the recipe says."""
    _name_explorers(tree)
    section = {} if tree.get("algorithm") is None else tree["algorithm"]
    if not isinstance(section, dict):
        return
    tree["algorithm"] = with_bundle(section)
    bundle = ALGORITHMS.get(str(section.get("name", Algorithm.name)))
    curriculum = {} if tree.get("curriculum") is None else tree["curriculum"]
    if bundle is not None and isinstance(curriculum, dict):
        tree["curriculum"] = {"use": bundle.curriculum, **curriculum}


def to_yaml(recipe: Recipe) -> str:
    """Every field of a recipe, as YAML that loads to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def _merge(config: DictConfig, schema: type, values: Mapping[Any, Any], prefix: str, problems: list[str]) -> None:
    """Set each leaf by itself, so that one wrong value hides no other."""
    hints = get_type_hints(schema)
    for key, value in values.items():
        where = f"{prefix}{key}"
        if key not in hints:
            known = did_you_mean(key, hints) or f" (the keys here are {', '.join(hints)})"
            problems.append(f"{where}: no such key{known}")
            continue
        element = next((kind for kind in get_args(hints[key]) if is_dataclass(kind)), None)
        if element is not None and get_origin(hints[key]) is list and isinstance(value, list):
            config[key] = [_merged(element, item, f"{where}.{i}", problems) for i, item in enumerate(value)]
            continue
        section = next((kind for kind in (hints[key], *get_args(hints[key])) if is_dataclass(kind)), None)
        if section is not None and isinstance(value, dict):
            if config[key] is None:
                config[key] = section
            _merge(config[key], section, value, f"{where}.", problems)  # type: ignore[arg-type]
            continue
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException:
            problems.append(f"{where} must be {_description(hints[key])} (got {value!r})")


def _merged(schema: Any, values: Any, where: str, problems: list[str]) -> DictConfig:
    """One section of a list of sections."""
    config: DictConfig = OmegaConf.structured(schema)
    if isinstance(values, Mapping):
        _merge(config, schema, values, f"{where}.", problems)
    else:
        problems.append(f"{where} must be a mapping of keys to values (got {values!r})")
    return config


def _description(hint: Any) -> str:
    """What a type means to the author of a recipe."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("null" if kind is NoneType else _description(kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        return f"a list, each {_description(get_args(hint)[0])}"
    return _WORDS.get(hint, "a mapping of keys to values")


def _fill(recipe: Recipe, stem: str) -> Recipe:
    """The recipe with what is decided from the rest of it."""
    recipe.name = recipe.name or stem
    algorithm, critic = recipe.algorithm, recipe.algorithm.critic
    if algorithm.aggregation_tokens is None:
        algorithm.aggregation_tokens = recipe.sampling.max_new_tokens
    if critic.lr is None:
        critic.lr = CRITIC_LR_RATIO * recipe.engine.lr
    if critic.pretrain_steps is None:
        critic.pretrain_steps = min(50, recipe.steps // 4)
    if recipe.evaluation.max_new_tokens is None:
        recipe.evaluation.max_new_tokens = recipe.sampling.max_new_tokens
    if recipe.generator.canary_tolerance is None:
        recipe.generator.canary_tolerance = CANARY_TOLERANCE[recipe.model.dtype]
    return recipe
