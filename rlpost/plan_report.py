"""A plan as text: tables of 80 columns, and what to change in the recipe."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rlpost import flops
from rlpost.devices import GIB
from rlpost.plan import BANDWIDTH_UTILISATION, UTILISATION, Plan, Step

WIDTH = 80
RESERVE = 0.05
"""Share of a GPU's memory that the driver, libraries and fragmentation take."""
WASTE = 0.1
"""Share of the training FLOPs, spent on pairs that are masked, from which it is worth a word."""


def report(plan: Plan) -> str:
    """The whole plan, advice last."""
    said = list(advice(plan)) or ["nothing to change: everything fits"]
    lines = [*_head(plan), *_parameters(plan), *_memory(plan), *_step(plan), "", "advice"]
    wrapped = (textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in said)
    return "\n".join([*lines, *wrapped]) + "\n"


def advice(plan: Plan) -> Iterator[str]:
    """What does not fit or costs more than it need, and the recipe's key that changes it."""
    for phase, place in (("generation", 0), ("training", 1)):
        used = {part: held[place] for part, held in plan.memory.items()}
        over = sum(used.values()) - available(plan)
        if over > 0:
            yield f"{phase} does not fit: {over / GIB:.1f} GiB too much; {_remedy(plan, used)}"
    yield from _generation_advice(plan)
    length = plan.prompt + plan.longest
    if length > plan.recipe.batch.micro_tokens:
        yield f"batch.micro_tokens={plan.recipe.batch.micro_tokens} is less than one answer of full length ({length})"
    if plan.expected.across_frac > WASTE:
        yield (
            f"{plan.expected.across_frac:.0%} of training goes into masked pairs between the documents of a row: lower "
            f"batch.row_tokens from {plan.row_positions}, or model.attention=flash_attention_2 on a GPU"
        )


def available(plan: Plan) -> int:
    """Bytes that the parts of one rank may take."""
    return int(plan.device.memory_gib * GIB * (1 - RESERVE))


def _remedy(plan: Plan, used: dict[str, int]) -> str:
    """The key for the largest part of what does not fit."""
    part = max(used, key=lambda name: used[name])
    model = plan.recipe.model
    if part == "generator":
        return _generator_remedy(plan, sum(used.values()) - used[part])
    if part == "activations":
        lower = f"lower batch.micro_tokens from {plan.recipe.batch.micro_tokens}"
        return lower if model.gradient_checkpointing else f"model.gradient_checkpointing=true, or {lower}"
    if part == "gradient bucket":
        return "lower engine.deepspeed.zero_optimization.reduce_bucket_size from 5e8"
    if part == "logits":
        return f"lower model.logp_chunk from {model.logp_chunk}"
    return _state_remedy(plan)


def _generator_remedy(plan: Plan, others: int) -> str:
    """`others`: bytes of all other parts."""
    if plan.recipe.generator.kind == "hf":
        return "lower sampling.group_size"
    if not plan.device.is_gpu:
        return f"lower generator.kv_cache_gib from {plan.recipe.generator.kv_cache_gib:g}"
    free = (available(plan) - others) / (plan.device.memory_gib * GIB)
    return f"lower generator.memory_frac to {int(100 * free) / 100:g}" if free >= 0.01 else _state_remedy(plan)


def _state_remedy(plan: Plan) -> str:
    if plan.ranks > 1 and plan.recipe.engine.zero_stage < 3:
        return "engine.zero_stage=3 shards weights, gradients and optimizer over the ranks"
    if plan.device.is_gpu and not plan.recipe.engine.offload_optimizer:
        return "engine.offload_optimizer=true, or engine.zero_stage=3 on more ranks"
    return "engine.zero_stage=3 on more ranks, or a smaller model.path" + (
        "" if plan.itemsize == 2 else ", or model.dtype=bfloat16"
    )


def _generation_advice(plan: Plan) -> Iterator[str]:
    generator, room = plan.recipe.generator, plan.sequence_room
    if generator.kind == "hf":
        yield "generator.kind=hf answers one prompt after another: local_vllm is faster"
        return
    if generator.kind == "remote_vllm":
        yield "generator servers: what is said of generation is for as many servers as ranks, each like a rank's device"
    wanted = min(plan.rollouts, generator.max_num_seqs)
    if room < wanted:
        what = f"{room or 'not one'} of {wanted} answers of full length decode at once"
        yield f"{what}: {_more_cache(plan, wanted)}"
    if min(room, plan.rollouts) > generator.max_num_seqs:
        most = min(room, plan.rollouts)
        yield f"the cache has room for more answers at once: raise generator.max_num_seqs to {most}"
    if bound(plan.expected) == "decode: reading weights and cache" and plan.expected.concurrency < room:
        yield "reading weights bounds the step: more sampling.group_size or prompts_per_step cost little"


def _more_cache(plan: Plan, wanted: int) -> str:
    """How to make room for `wanted` answers of full length, as far as memory goes."""
    generator, memory = plan.recipe.generator, plan.device.memory_gib * GIB
    missing = wanted * flops.cache_bytes(plan.shape, plan.itemsize) * (plan.prompt + plan.longest) - plan.cache_room
    free = available(plan) - sum(one for one, _ in plan.memory.values())
    if free < min(missing, 0.01 * memory):
        return "there is no memory for more; lower sampling.max_new_tokens, or use more ranks"
    more = min(missing, free)
    if plan.device.is_gpu:
        if generator.kind == "remote_vllm":
            return "raise generator.servers.memory_frac, or use more generator.servers.replicas"
        return f"raise generator.memory_frac to {generator.memory_frac + more / memory:.2f}"
    return f"raise generator.kv_cache_gib to {generator.kv_cache_gib + more / GIB:.3g}"


def bound(step: Step) -> str:
    """What takes the largest part of the step's seconds."""
    return max(step.seconds, key=lambda part: step.seconds[part])


def _head(plan: Plan) -> list[str]:
    device, dtype = plan.device, plan.recipe.model.dtype
    rates = f"{device.rate[dtype] / 1e12:.3g} TFLOP/s {dtype}, {device.bandwidth / 1e9:.0f} GB/s"
    return [
        f"plan of {plan.recipe.name}: {plan.ranks} x {device.name}, {device.memory_gib:.1f} GiB a rank",
        f"{rates}: {'the data sheet' if device.is_gpu else 'measured just now'}",
        f"predictions count on {UTILISATION:.0%} of the FLOP/s and {BANDWIDTH_UTILISATION:.0%} of the bandwidth",
        "",
    ]


def _parameters(plan: Plan) -> list[str]:
    rows = [f"{role:<40}{count:>20,}{count / plan.total:>19.1%}" for role, count in plan.params.items()]
    trained = plan.total + plan.critic_total
    return [
        f"{'parameters':<40}{'number':>20}{'share':>19}",
        *rows,
        f"{'total, all trained':<40}{plan.total:>20,}",
        *([f"{'with the critic':<40}{trained:>20,}"] if plan.critic_total else []),
        "",
    ]


def _memory(plan: Plan) -> list[str]:
    rows = [f"{part:<40}{one / GIB:>20.2f}{two / GIB:>20.2f}" for part, (one, two) in plan.memory.items()]
    sums = [sum(held[place] for held in plan.memory.values()) for place in (0, 1)]
    fits = ["fits" if whole <= available(plan) else "DOES NOT FIT" for whole in sums]
    return [
        f"{'GiB of a rank':<40}{'generation':>20}{'training':>20}",
        *rows,
        f"{'total':<40}{sums[0] / GIB:>20.2f}{sums[1] / GIB:>20.2f}",
        f"{f'of {available(plan) / GIB:.1f} that may be used':<40}{fits[0]:>20}{fits[1]:>20}",
        "",
    ]


def _step(plan: Plan) -> list[str]:
    both = plan.expected, plan.worst
    room = str(plan.sequence_room) if plan.recipe.generator.kind != "hf" else "-"
    table: list[tuple[str, list[str]]] = [
        ("tokens of a completion", [f"{one.completion}" for one in both]),
        ("tokens of a prompt", [f"{plan.prompt}"] * 2),
        ("rollouts of a rank", [f"{plan.rollouts}"] * 2),
        ("completion tokens of a rank", [f"{one.generated:,}" for one in both]),
        ("sequences that decode at once", [f"{one.concurrency}" for one in both]),
        ("answers of full length in the cache", [room] * 2),
        ("optimizer steps", [f"{plan.updates}"] * 2),
        ("micro-batches of each", [f"{one.micros}" for one in both]),
        *((f"TFLOP, {part}", [f"{one.flops[part] / 1e12:.4g}" for one in both]) for part in plan.expected.flops),
        *((f"s, {part}", [f"{one.seconds[part]:.3g}" for one in both]) for part in plan.expected.seconds),
        ("predicted s of the step", [f"{sum(one.seconds.values()):.3g}" for one in both]),
    ]
    scored = ", ".join(plan.scored_by) or "nothing"
    how = "whole rows, masked pairs too" if plan.row_positions else "documents"
    return [
        f"{'a step (PREDICTION)':<40}{'expected':>20}{'worst':>20}",
        *(f"{name:<40}{values[0]:>20}{values[1]:>20}" for name, values in table),
        "worst: every answer at its limit; expected: half of that, the longest at it",
        f"scored before the update by: {scored}",
        f"attention is paid for {how}",
        f"bound by {bound(plan.expected).removeprefix('decode: ')}",
    ]
