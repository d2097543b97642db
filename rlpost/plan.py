"""What a recipe will ask of a device, before a weight is loaded: parameters, memory, FLOPs, seconds of a step.

From the recipe and the model's configuration alone. The formulas are in `flops.py`; the seconds are a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rlpost import flops
from rlpost.devices import GIB, Device
from rlpost.flops import Shape
from rlpost.model_shape import model_sizes
from rlpost.recipe import Recipe
from rlpost.types import Task
from rlpost.widths import generated_a_prompt, trained_a_step, updates_a_step

UTILISATION = 0.4
"""Share of the peak that matrix products reach: dense training at scale reports 0.46 (PaLM, table 3, arXiv:2204.02311),
and the rows here are shorter."""
BANDWIDTH_UTILISATION = 0.6
"""Share of the peak bandwidth that decoding reaches: copies of large blocks come to about 0.8, and its are small."""
DECODE_STEP_S, TOKEN_S = 0.003, 40e-6
"""What vLLM spends outside the model on a decode step and on each of its tokens: scheduling, sampling, bookkeeping.
Fitted to the quickstart (512 sequences on 2 CPU cores), where a model of 0.6 M parameters leaves little else to see."""
UPDATE_BYTES = 30
"""AdamW reads gradient, master copy and moments of a parameter, writes the last three and the weight in bfloat16."""
REDUCE_BUCKET = 500_000_000
"""Elements of the buffer in which DeepSpeed collects gradients, unless `engine.deepspeed` says otherwise."""
PROMPT_GUESS = 256
"""Tokens of a prompt where the tasks cannot be read."""
CHARS_A_TOKEN = 4
"""Of English in a trained tokenizer; a `char` or `byte` tokenizer has one."""
_OPTIMIZER = frozenset({"gradients", "master copy", "moments", "gradient bucket"})
PARKED = {"none": frozenset(), "optimizer": _OPTIMIZER, "all": _OPTIMIZER | {"weights", "reference"}}
"""Parts that are not on the device while generating, by `engine.park`."""
VLLM_WORKSPACE = GIB
"""What vLLM keeps of its share of a GPU for activations and CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's share of a step whose answers have `completion` tokens on average."""

    completion: int
    generated: int
    """Completion tokens."""
    micros: int
    """Micro-batches of an optimizer step."""
    concurrency: int
    """Sequences that decode at once."""
    flops: dict[str, int]
    seconds: dict[str, float]
    across_frac: float
    """Share of the training FLOPs spent on pairs between documents of a row, which are masked."""


@dataclass(frozen=True)
class Plan:
    """A recipe on `ranks` devices, with prompts of `prompt` tokens."""

    recipe: Recipe
    device: Device
    ranks: int
    prompt: int
    shape: Shape
    params: dict[str, int]
    """By role; a head that is tied to the embedding is counted there."""
    scored_by: tuple[str, ...]
    """Who gives log-probs or values of the rollouts before the first update."""
    row_positions: int
    """Of a packed row; 0 where attention is paid by document."""

    @property
    def total(self) -> int:
        """Parameters of the policy, all of which are trained."""
        return sum(self.params.values())

    @property
    def critic_total(self) -> int:
        """Parameters of the critic, which has no language-model head."""
        return self.total - self.params.get("head", 0) if "critic" in self.scored_by else 0

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 2 if self.recipe.model.dtype == "bfloat16" else 4

    @property
    def rollouts(self) -> int:
        """Of one rank, without those under hints."""
        return self.recipe.prompts_per_step * generated_a_prompt(self.recipe) // self.ranks

    @property
    def trained_rollouts(self) -> int:
        """Of one rank."""
        return trained_a_step(self.recipe) // self.ranks

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        after = self.recipe.algorithm.interruption
        return self.recipe.sampling.max_new_tokens + (after.answer_tokens if after.text is not None else 0)

    @property
    def updates(self) -> int:
        """Optimizer steps of a step."""
        return updates_a_step(self.recipe) * self.recipe.algorithm.epochs

    @property
    def cache_room(self) -> int:
        """Bytes that the generator has for keys and values."""
        generator = self.recipe.generator
        if not self.device.is_gpu:
            return int(generator.kv_cache_gib * GIB)
        frac = generator.servers.memory_frac if generator.kind == "remote_vllm" else generator.memory_frac
        share = int(frac * self.device.memory_gib * GIB)
        return max(0, share - self.total * self.itemsize - VLLM_WORKSPACE)

    @property
    def sequence_room(self) -> int:
        """Answers of full length whose keys and values fit at once."""
        return self.cache_room // (flops.cache_bytes(self.shape, self.itemsize) * (self.prompt + self.longest))

    @cached_property
    def expected(self) -> Step:
        """Answers half as long as they may be."""
        return step_of(self, max(1, self.longest // 2))

    @cached_property
    def worst(self) -> Step:
        """Every answer as long as it may be."""
        return step_of(self, self.longest)

    @cached_property
    def memory(self) -> dict[str, tuple[int, int]]:
        """Bytes of each part while generating and while training."""
        return memory_of(self)


def make_plan(recipe: Recipe, device: Device, tasks: Sequence[Task], *, ranks: int) -> Plan:
    """The plan of a recipe; `tasks` tell how long prompts are."""
    from rlpost.objective import Objective
    from rlpost.packing import row_tokens_of
    from rlpost.policy import uses_flash_attention
    from rlpost.world import World

    world = World()
    shape, params = model_sizes(recipe)
    asked = {
        "policy": Objective(recipe.algorithm, world).needs_prox,
        "reference": recipe.algorithm.kl.coef > 0,
        "critic": recipe.algorithm.advantage["use"] == "gae",
    }
    by_document = uses_flash_attention(recipe.model)
    return Plan(
        recipe=recipe,
        device=device,
        ranks=ranks,
        prompt=prompt_length(recipe, tasks),
        shape=shape,
        params=params,
        scored_by=tuple(name for name, wanted in asked.items() if wanted),
        row_positions=0 if by_document else row_tokens_of(recipe),
    )


def prompt_length(recipe: Recipe, tasks: Sequence[Task]) -> int:
    """Tokens of a mean prompt, by its characters."""
    if not tasks:
        return PROMPT_GUESS
    prompting, prompts = recipe.tasks.prompting, [task.prompt for task in tasks]
    around = len(prompting.prefix) + len(prompting.suffix) + len(prompting.system or "")
    each = [len(one) if isinstance(one, str) else sum(len(message["content"]) for message in one) for one in prompts]
    chars = around + sum(each) // len(each)
    return max(1, chars // (CHARS_A_TOKEN if recipe.model.init is None else 1))


def step_of(plan: Plan, completion: int) -> Step:
    """One rank's share of a step."""
    rollouts, micro_tokens = plan.trained_rollouts, plan.recipe.batch.micro_tokens
    length = plan.prompt + completion
    in_a_row = max(1, (plan.row_positions or micro_tokens) // length)
    rows_each = -(-rollouts // (updates_a_step(plan.recipe) * in_a_row))
    num_micros = -(-rows_each // max(1, micro_tokens // (in_a_row * length)))
    whole, rest = divmod(rollouts, in_a_row)
    rows = [in_a_row * length] * whole + [rest * length] * (rest > 0)
    logits, documents = rollouts * completion, [length] * rollouts
    pairs = flops.full_pairs(rows) if plan.row_positions else flops.causal_pairs(documents)
    work = _training(plan, positions=sum(rows), pairs=pairs, logits=logits)
    across_frac = 0.0
    if plan.row_positions:
        alone = _training(plan, positions=sum(rows), pairs=flops.full_pairs(documents), logits=logits)
        across_frac = 1 - alone["train"] / work["train"]
    generation, seconds, concurrency = _generation(plan, completion)
    rate, _ = _rates(plan)
    seconds |= {name: amount / rate for name, amount in work.items()}
    seconds["optimizer"] = plan.updates * _update_seconds(plan)
    return Step(completion, logits, num_micros, concurrency, generation | work, seconds, across_frac)


def micro_seconds(plan: Plan, widths: Sequence[int], lengths: Sequence[int]) -> dict[str, float]:
    """Of one micro-batch with rows and documents so long: scored by all, also by the policy, and trained on alone."""
    asked = replace(plan, scored_by=("policy", *(who for who in plan.scored_by if who != "policy")))
    pairs = flops.full_pairs(widths) if plan.row_positions else flops.causal_pairs(lengths)
    work = _training(asked, positions=sum(widths), pairs=pairs, logits=sum(lengths) - len(lengths))
    rate, _ = _rates(plan)
    train_s = work["train"] / plan.recipe.algorithm.epochs / rate
    return {"score": work["score"] / rate, "train": train_s, "optimizer step": _update_seconds(plan)}


def _update_seconds(plan: Plan) -> float:
    sharded = plan.ranks if plan.recipe.engine.zero_stage else 1
    return UPDATE_BYTES * (plan.total + plan.critic_total) / sharded / _rates(plan)[1]


def _training(plan: Plan, *, positions: int, pairs: int, logits: int) -> dict[str, int]:
    """FLOPs of the passes before the first update, and of the updates."""
    model, num_logits = plan.recipe.model, {"policy": logits, "reference": logits, "critic": 0}
    forward, both = {}, {}
    for who, seen in num_logits.items():
        forward[who] = flops.forward_flops(plan.shape, positions=positions, pairs=pairs, logits=seen)
        both[who] = forward[who] + flops.backward_flops(
            plan.shape,
            positions=positions,
            pairs=pairs,
            logits=seen,
            fused_attention=model.attention != "eager",
            checkpointed=model.gradient_checkpointing,
            logits_again=True,
        )
    trained = [both[who] for who in ("policy", "critic") if who == "policy" or who in plan.scored_by]
    return {"score": sum(forward[who] for who in plan.scored_by), "train": plan.recipe.algorithm.epochs * sum(trained)}


def _generation(plan: Plan, completion: int) -> tuple[dict[str, int], dict[str, float], int]:
    """FLOPs, seconds and how many sequences decode at once: prompts once a group, then steps of one token a sequence.

    A decode step reads all weights and the caches of its sequences; the longest answer ends the last.
    """
    recipe, shape, prompts = plan.recipe, plan.shape, plan.recipe.prompts_per_step // plan.ranks
    answers = plan.rollouts + (prompts if recipe.algorithm.advantage["use"] == "remax" else 0)
    one_by_one = recipe.generator.kind == "hf"
    most = recipe.sampling.group_size if one_by_one else min(recipe.generator.max_num_seqs, plan.sequence_room)
    concurrency = max(1, min(answers, most))
    steps = prompts * plan.longest if one_by_one else max(plan.longest, -(-answers * completion // concurrency))
    prefill = prompts * flops.prefill_flops(shape, prompt=plan.prompt)
    decode = answers * flops.decode_flops(shape, prompt=plan.prompt, completion=completion)
    cached = answers * flops.decode_pairs(prompt=plan.prompt, completion=completion)
    rate, bandwidth = _rates(plan)
    read = steps * plan.total * plan.itemsize + cached * flops.cache_bytes(shape, plan.itemsize)
    reading, computing = read / bandwidth, decode / rate
    seconds = {
        "prefill": prefill / rate,
        "decode: reading weights and cache": reading if reading > computing else 0.0,
        "decode: arithmetic": computing if computing >= reading else 0.0,
        "decode: overhead of its steps": steps * DECODE_STEP_S + (0 if one_by_one else answers * completion * TOKEN_S),
    }
    return {"prefill": prefill, "decode": decode}, seconds, concurrency


def memory_of(plan: Plan) -> dict[str, tuple[int, int]]:
    """Bytes of each part on one rank while generating and while training; what stays stands in both.

    Offloaded parts are in the host's memory and not here, parked ones while training only.
    """
    from rlpost.parking import park_of

    recipe, engine, size = plan.recipe, plan.recipe.engine, plan.itemsize
    state: dict[str, int] = {}
    for num_params in (plan.total, plan.critic_total):
        for part, held in flops.state_bytes(num_params, size, zero_stage=engine.zero_stage, ranks=plan.ranks).items():
            state[part] = state.get(part, 0) + held
    if engine.offload_optimizer and plan.device.is_gpu:
        state |= {"master copy": 0, "moments": 0}
    if "reference" in plan.scored_by:
        state["reference"] = plan.total * size // (plan.ranks if engine.zero_stage == 3 else 1)
    if engine.offload_params and plan.device.is_gpu:
        state |= dict.fromkeys(state.keys() & {"weights", "reference"}, 0)
    gone = PARKED[park_of(recipe, on_gpu=plan.device.is_gpu)] if plan.device.is_gpu else frozenset()
    (generating, parked), bucket = _generator_bytes(plan), _bucket_bytes(plan)
    longest = plan.prompt + plan.longest
    positions = min(max(recipe.batch.micro_tokens, longest), plan.trained_rollouts * longest)
    kept = flops.activation_bytes(
        plan.shape,
        size,
        positions=positions,
        eager_row=max(plan.row_positions, longest) if recipe.model.attention == "eager" else 0,
        checkpointed=recipe.model.gradient_checkpointing,
    )
    return {part: (0 if part in gone else held, held) for part, held in state.items()} | {
        "generator": (generating, parked),
        "gradient bucket": (0, bucket[1]) if "gradient bucket" in gone else bucket,
        "activations": (0, kept),
        "logits": (0, flops.logits_bytes(plan.shape, size, chunk=recipe.model.logp_chunk)),
    }


def _bucket_bytes(plan: Plan) -> tuple[int, int]:
    """Of the buffers where stages 2 and 3 collect gradients; stage 3 keeps them. A CPU gives what is touched only."""
    stage = plan.recipe.engine.zero_stage
    if stage < 2 or not plan.device.is_gpu:
        return 0, 0
    asked = plan.recipe.engine.deepspeed.get("zero_optimization", {})
    modules = 2 if plan.critic_total else 1
    held = modules * plan.itemsize * int(asked.get("reduce_bucket_size", REDUCE_BUCKET))
    return held if stage == 3 else 0, held


def _generator_bytes(plan: Plan) -> tuple[int, int]:
    """Of the generator while it generates, and while training, when it may sleep."""
    weights, cache = plan.total * plan.itemsize, flops.cache_bytes(plan.shape, plan.itemsize)
    if plan.recipe.generator.kind == "hf":
        return weights + plan.recipe.sampling.group_size * (plan.prompt + plan.longest) * cache, weights
    if not plan.device.is_gpu:
        servers = plan.recipe.generator.servers
        here = 0 if servers.urls else servers.replicas  # those of a run are on its own machine
        engines = 1.0 if plan.recipe.generator.kind == "local_vllm" else here / plan.ranks
        held = int(engines * (weights + plan.cache_room))
        return held, held
    if plan.recipe.generator.kind == "remote_vllm":
        return 0, 0
    share = int(plan.recipe.generator.memory_frac * plan.device.memory_gib * GIB)
    return share, share if plan.recipe.generator.sleep_level == 0 else 0


def _rates(plan: Plan) -> tuple[float, float]:
    """FLOP/s and bytes/s that are counted on."""
    return plan.device.rate[plan.recipe.model.dtype] * UTILISATION, plan.device.bandwidth * BANDWIDTH_UTILISATION
