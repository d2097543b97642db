"""What the fields of a recipe must be to each other, all of it at once, before a GPU is touched."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlpost.check_algorithm import RESET_TRIGGERS, algorithm_problems
from rlpost.check_explore import explore_problems
from rlpost.check_parallel import parallel_problems
from rlpost.check_pipeline import pipeline_problems
from rlpost.check_secrets import secret_problems
from rlpost.check_servers import server_problems
from rlpost.check_synth import synth_problems
from rlpost.check_tasks import evaluation_problems, task_problems
from rlpost.errors import RecipeError
from rlpost.metrics import metric_info
from rlpost.plugins import bind
from rlpost.recipe import Recipe, Sft, read
from rlpost.reward_recipe import reward_problems
from rlpost.rollout_recipe import rollout_problems
from rlpost.sources import source_problems

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention for CPUs was written for (0.32, `cpu_attn.py`)."""
CURRICULUM_METHODS = ("select", "observe", "state_dict", "load_state_dict", "metrics")

_BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "> 0",
        lambda x: 0 < x < math.inf,
        "steps prompts_per_step keep_checkpoints model.context model.logp_chunk model.init.hidden_size "
        "model.init.intermediate_size model.init.num_layers model.init.num_heads model.init.num_kv_heads "
        "model.lora.rank model.lora.alpha "
        "sampling.group_size sampling.max_new_tokens sampling.temperature algorithm.aggregation_tokens "
        "algorithm.kl.target algorithm.kl.horizon algorithm.groups.max_waves algorithm.interruption.answer_tokens "
        "algorithm.mismatch.offpolicy_limit algorithm.critic.lr algorithm.critic.value_clip algorithm.minibatches "
        "algorithm.epochs generator.kv_cache_gib generator.max_num_seqs generator.canary_tolerance engine.lr "
        "engine.eps engine.sequence_parallel engine.sync_bucket_mib batch.micro_tokens batch.row_tokens sft.steps "
        "sft.batch_size sft.lr sft.max_seconds sft.target_loss evaluation.n evaluation.until "
        "evaluation.max_new_tokens "
        "generator.servers.replicas generator.servers.tensor_parallel generator.servers.data_parallel "
        "generator.servers.timeout_s generator.servers.start_s "
        "preempt.after_s preempt.budget_s failure.reward_s failure.reward_memory_gib "
        "failure.reward_workers failure.gradients watchdog.report_s watchdog.stop_s",
    ),
    (
        ">= 0",
        lambda x: 0 <= x < math.inf,
        "seed save_every keep_every generator.max_staleness "
        "algorithm.kl.coef algorithm.kl.reset.every algorithm.kl.reset.kl_spike "
        "algorithm.kl.reset.patience algorithm.kl.reset.min_gap algorithm.entropy.coef algorithm.entropy.target "
        "algorithm.entropy.delta algorithm.entropy.low algorithm.entropy.high algorithm.imitation_coef "
        "algorithm.critic.pretrain_steps engine.weight_decay engine.warmup_steps engine.grad_clip sft.warmup_steps "
        "generator.servers.restarts "
        "sft.weight_decay evaluation.every evaluation.temperature logging.samples_per_step failure.empty_steps",
    ),
    ("in (0, 1)", lambda x: 0 < x < 1, "generator.memory_frac generator.servers.memory_frac"),
    (
        "in (0, 1]",
        lambda x: 0 < x <= 1,
        "algorithm.entropy.top_frac algorithm.critic.gamma sft.decay_frac evaluation.top_p",
    ),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "algorithm.critic.lam"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "model.lora.dropout"),
]

_FILLED_FROM = {
    "algorithm.aggregation_tokens": "sampling.max_new_tokens",
    "algorithm.critic.lr": "engine.lr",
    "evaluation.max_new_tokens": "sampling.max_new_tokens",
}
"""Fields that a recipe may leave to another one, whose bound is then the one to speak of."""


def load_and_check(path: str | Path, overrides: Sequence[str] = (), world_size: int = 1) -> Recipe:
    """Load a recipe and check it; one error holds what is wrong with its lines and with what they make together."""
    return checked(*read(path, overrides), world_size)


def checked(recipe: Recipe, problems: list[str], world_size: int = 1) -> Recipe:
    """The recipe, where neither its lines nor what they make together has a problem."""
    unread = tuple(problem.split()[0].rstrip(":") for problem in problems)
    for problem in check(recipe, world_size):
        keys = re.findall(r"[\w.]+", problem)
        # A field that could not be read stands at its default here, about which nothing should be said.
        if not any(key == name or key.startswith(f"{name}.") for key in keys for name in unread):
            problems.append(problem)
    if problems:
        raise RecipeError(problems)
    return recipe


def validate(recipe: Recipe, world_size: int = 1) -> None:
    """Raise everything that `check` finds."""
    if problems := check(recipe, world_size):
        raise RecipeError(problems)


def check(recipe: Recipe, world_size: int = 1) -> list[str]:
    """Every problem that shows without loading a model, one line each, naming the recipe key."""
    return [
        *_bounds(recipe),
        *_model(recipe),
        *_lora(recipe),
        *task_problems(recipe),
        *evaluation_problems(recipe),
        *_plugins(recipe),
        *rollout_problems(recipe),
        *algorithm_problems(recipe),
        *explore_problems(recipe),
        *synth_problems(recipe),
        *_sampling(recipe),
        *pipeline_problems(recipe),
        *_batches(recipe, world_size),
        *_lengths(recipe),
        *_sft(recipe.sft, world_size),
        *_engine(recipe),
        *parallel_problems(recipe, world_size),
        *server_problems(recipe, world_size),
        *_run(recipe),
        *secret_problems(recipe),
    ]


def _bounds(recipe: Recipe) -> list[str]:
    problems: dict[str, str] = {}
    for bound, holds, keys in _BOUNDS:
        for key in keys.split():
            value: Any = recipe
            for part in key.split("."):
                value = getattr(value, part, None)
            if value is not None and not holds(value):
                problems[key] = f"{key} must be {bound} (got {value})"
    return [problem for key, problem in problems.items() if _FILLED_FROM.get(key) not in problems]


def _model(recipe: Recipe) -> list[str]:
    model = recipe.model
    if (model.path is None) == (model.init is None):
        found = "neither" if model.path is None else "both"
        return [f"exactly one of model.path and model.init must be given (got {found}): set the other to null"]
    problems = _init(recipe) if model.init is not None else _model_path(model.path or "")
    if model.offload_activations and not model.gradient_checkpointing:
        problems.append(
            "model.offload_activations needs model.gradient_checkpointing=true (got false): it moves what "
            "checkpointing keeps; switch that on, or this off"
        )
    if model.attention == "flash_attention_2":
        if find_spec("flash_attn") is None:
            problems.append("model.attention=flash_attention_2 needs the package flash-attn: install it, or use auto")
        if model.dtype == "float32":
            problems.append("model.attention=flash_attention_2 must have model.dtype=bfloat16 (got float32)")
    return problems


def _init(recipe: Recipe) -> list[str]:
    init = recipe.model.init
    assert init is not None
    problems = []
    if init.tokenizer == "char":
        repeated = sorted({symbol for symbol in init.alphabet if init.alphabet.count(symbol) > 1})
        if not init.alphabet:
            problems.append("model.init.alphabet must be given for model.init.tokenizer=char")
        if repeated:
            problems.append(f"model.init.alphabet must have each character once (repeated: {''.join(repeated)!r})")
    if min(init.num_heads, init.num_kv_heads or 1) < 1:
        return problems
    if init.hidden_size % init.num_heads:
        problems.append(
            f"model.init.hidden_size must be a multiple of model.init.num_heads (got {init.hidden_size} and "
            f"{init.num_heads})"
        )
    elif recipe.generator.kind != "hf" and (size := init.hidden_size // init.num_heads) not in CPU_HEAD_SIZES:
        problems.append(
            f"model.init.hidden_size / model.init.num_heads must be one of {', '.join(map(str, CPU_HEAD_SIZES))} for "
            f"vLLM (got {size}): change one of them, or use generator.kind=hf"
        )
    if init.num_kv_heads and init.num_heads % init.num_kv_heads:
        problems.append(
            f"model.init.num_heads must be a multiple of model.init.num_kv_heads (got {init.num_heads} and "
            f"{init.num_kv_heads})"
        )
    return problems


def _lora(recipe: Recipe) -> list[str]:
    lora, reset = recipe.model.lora, recipe.algorithm.kl.reset
    if lora is None:
        return []
    problems = []
    named = isinstance(lora.targets, list) and lora.targets and all(isinstance(name, str) for name in lora.targets)
    if lora.targets != "all-linear" and not named:
        problems.append(
            f"model.lora.targets must be all-linear or a list of names of layers (got {lora.targets!r}): such as "
            "[q_proj, v_proj]"
        )
    problems += [
        f"algorithm.kl.reset.{name} must be 0 with model.lora (got {getattr(reset, name)}): the reference is the model "
        "without its adapters, which cannot become a copy of the policy"
        for name in RESET_TRIGGERS
        if getattr(reset, name)
    ]
    if lora.quantize is not None:
        if find_spec("bitsandbytes") is None:
            problems.append("model.lora.quantize=nf4 needs the package bitsandbytes: install it, or set it to null")
        if recipe.engine.zero_stage == 3:
            problems.append(
                "model.lora.quantize=nf4 needs engine.zero_stage <= 2 (got 3): 4-bit weights are not sharded"
            )
    return problems


def _model_path(name: str) -> list[str]:
    """A local path must exist; `owner/name` that is no folder here is taken as a hub name and not looked up."""
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        return [] if path.is_file() else [f"model.path: the file {name} does not exist"]
    if path.is_dir():
        found = (path / "config.json").is_file()
        return [] if found else [f"model.path: the folder {name} must have a config.json, as save_pretrained writes it"]
    if path.exists():
        return [f"model.path must be a folder, a hub name or a .gguf file (got the file {name})"]
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        return [f"model.path: the folder {name!r} does not exist; relative paths start at the current folder"]
    return []


def _plugins(recipe: Recipe) -> list[str]:
    problems = reward_problems(recipe.rewards, recipe.group_rewards)
    try:
        curriculum = bind(recipe.curriculum, "curricula", where="curriculum", skip=1, supplied=("seed",)).func
    except RecipeError as error:
        return problems + error.problems
    lacks = [name for name in CURRICULUM_METHODS if inspect.isclass(curriculum) and not hasattr(curriculum, name)]
    if lacks:
        problems.append(f"curriculum.use: `{recipe.curriculum['use']}` must have the methods {', '.join(lacks)}")
    return problems


def _sampling(recipe: Recipe) -> list[str]:
    sampling = recipe.sampling
    return [
        f"sampling.{key} must be {whole} in training (got {value}): the trainer's log-probs are over the full "
        "vocabulary and the sampler's mask is not replayed, so it would be another policy; use sampling.temperature"
        for key, value, whole in (("top_p", sampling.top_p, 1.0), ("top_k", sampling.top_k, 0))
        if value != whole
    ]


def _batches(recipe: Recipe, world_size: int) -> list[str]:
    prompts, minibatches = recipe.prompts_per_step, recipe.algorithm.minibatches
    if min(prompts, minibatches) < 1:
        return []
    if prompts % world_size:
        return [f"prompts_per_step must be a multiple of the number of ranks (got {prompts} on {world_size})"]
    if prompts % (world_size * minibatches):
        return [
            f"prompts_per_step must divide into algorithm.minibatches on every rank (got {prompts // world_size} a "
            f"rank and {minibatches} minibatches): make it a multiple of {world_size * minibatches}"
        ]
    return []


def _lengths(recipe: Recipe) -> list[str]:
    context = recipe.model.context or _made_for(recipe.model.path)
    if context is None:
        return []
    answer, interruption = recipe.sampling.max_new_tokens, recipe.algorithm.interruption
    problems = [
        f"{key} must be less than model.context, which holds the prompt too (got {value} and {context})"
        for key, value in (
            ("sampling.max_new_tokens", recipe.sampling.max_new_tokens),
            ("evaluation.max_new_tokens", recipe.evaluation.max_new_tokens or 0),
        )
        if value >= context
    ]
    if interruption.text is not None and answer < context <= answer + interruption.answer_tokens:
        problems.append(
            "sampling.max_new_tokens + algorithm.interruption.answer_tokens must be less than model.context, which "
            f"holds the prompt too (got {answer} + {interruption.answer_tokens} and {context})"
        )
    return problems


def _made_for(path: str | None) -> int | None:
    """The longest text a model folder was made for, where it says so."""
    file = Path(path or "").expanduser() / "config.json"
    if not path or not file.is_file():
        return None
    try:
        made_for = json.loads(file.read_text()).get("max_position_embeddings")
    except ValueError:
        return None
    return made_for if isinstance(made_for, int) else None


def _sft(sft: Sft | None, world_size: int) -> list[str]:
    if sft is None:
        return []
    problems = source_problems(sft.tasks, "sft.tasks") + _betas(sft.betas, "sft.betas")
    if sft.tasks.solution is None:
        problems.append("sft.tasks.solution must name the column with the text that supervised training imitates")
    if sft.batch_size % world_size:
        found = f"{sft.batch_size} on {world_size}"
        problems.append(f"sft.batch_size must be a multiple of the number of ranks (got {found})")
    return problems


def _engine(recipe: Recipe) -> list[str]:
    engine = recipe.engine
    problems = _betas(engine.betas, "engine.betas")
    if engine.offload_optimizer and engine.zero_stage == 0:
        problems.append("engine.offload_optimizer needs engine.zero_stage >= 1 (got 0)")
    if engine.offload_params and engine.zero_stage != 3:
        problems.append(
            f"engine.offload_params needs engine.zero_stage=3 (got {engine.zero_stage}): below it every rank has whole "
            "weights on its device; set the stage to 3, or use engine.offload_optimizer"
        )
    problems += _park(recipe)
    if recipe.model.dtype == "bfloat16" and engine.zero_stage == 0:
        problems.append(
            "engine.zero_stage must be >= 1 for model.dtype=bfloat16 (got 0): DeepSpeed keeps the float32 copy of the "
            "weights in its sharded optimizer, on one rank too"
        )
    return problems


def _park(recipe: Recipe) -> list[str]:
    engine, generator = recipe.engine, recipe.generator
    if engine.park in (None, "none"):
        return []
    if generator.kind == "local_vllm" and generator.sleep_level == 0:
        return [
            f"engine.park must be none with generator.sleep_level=0 (got {engine.park}): the trainer and a vLLM that "
            "never sleeps must fit side by side anyway; raise the sleep level, or leave park out"
        ]
    if engine.park == "optimizer" and engine.offload_optimizer:
        return [
            "engine.park must not be optimizer with engine.offload_optimizer (got both): its state is in the host's "
            "memory already; leave one out, or use park=all for the weights"
        ]
    if engine.park == "all" and engine.offload_params:
        return [
            "engine.park must not be all with engine.offload_params (got both): the weights are in the host's memory "
            "already; leave park out, or use park=optimizer where the optimizer is not offloaded"
        ]
    return []


def _betas(betas: Sequence[float], key: str) -> list[str]:
    fits = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    return [] if fits else [f"{key} must be two numbers in [0, 1) (got {list(betas)})"]


def _run(recipe: Recipe) -> list[str]:
    problems = []
    folder = Path(recipe.run_dir).expanduser().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        problems.append(f"run_dir must be a folder (got {recipe.run_dir}, and {nearest} is a file)")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        problems.append(f"run_dir must be writable (got {recipe.run_dir}, and {nearest} is not): choose another")
    if recipe.resume not in ("never", "auto") and not Path(recipe.resume).expanduser().exists():
        problems.append(f"resume must be never, auto, or the path of a checkpoint that exists (got {recipe.resume!r})")
    if recipe.keep_best is not None:
        try:
            metric_info(recipe.keep_best.removeprefix("-"))
        except ValueError:
            problems.append(f"keep_best must be a metric such as eval/pass@1, or -eval/... (got {recipe.keep_best!r})")
    if recipe.logging.wandb is not None and find_spec("wandb") is None:
        problems.append("logging.wandb needs the package wandb: install it, or set logging.wandb=null")
    return problems
