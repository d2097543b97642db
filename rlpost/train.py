"""Reinforcement learning: the loop, one step of it, and what is done between steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rlpost import figures
from rlpost.algorithm_recipe import Algorithm
from rlpost.batch import documents_of, in_parts, make_batch, with_scores
from rlpost.behavior import with_behavior
from rlpost.credit import credit
from rlpost.curriculum import corrected, kept_in_memory
from rlpost.document import Document
from rlpost.errors import Preempted, RunError, SharedError
from rlpost.evaluate import against_first, tabulate
from rlpost.peak import fullest
from rlpost.preempt import preemption
from rlpost.progress import Progress
from rlpost.random_state import random_state, set_random_state
from rlpost.recipe import Recipe
from rlpost.report.command import report_of_finished
from rlpost.rollouts import gather
from rlpost.run import Run, build, clock_of
from rlpost.summary import write_summary
from rlpost.synth.online import synthesise
from rlpost.token_figures import write_samples
from rlpost.trackers import settle
from rlpost.types import Batch, Group, Micro
from rlpost.update import update
from rlpost.watchdog import Watchdog
from rlpost.widths import updates_a_step
from rlpost.world import World


def train(recipe: Recipe, world: World) -> Path:
    """Train as the recipe says, and return the run's folder."""
    clock = clock_of(world)
    preemption.limit(recipe.preempt.after_s)
    with Watchdog(recipe, world, clock):
        run = build(recipe, world, clock)
        shown = Progress(recipe, world, total_steps=recipe.steps, start=run.start_step)
        with closing(run), shown as progress:
            preemption.check(world)
            if run.evaluator and "before" not in run.evals:
                run.evals["before"] = evaluate(run, 0, progress)
            if run.evaluation_due:
                evaluate_between(run, run.start_step, progress)
            for step in range(run.start_step, recipe.steps):
                with saved_on_failure(run, step):
                    synthesised = synthesise(run, step)
                    logged = train_step(run, step)
                progress.update(step, logged)
                raise_alarms(run, step, logged, progress)
                for said in (synthesised, adapt(run, step, logged), look_after(run, step, logged)):
                    if said:
                        progress.message(said)
                if run.evaluator and every(recipe.evaluation.every, step) and step + 1 < recipe.steps:
                    evaluate_between(run, step + 1, progress)
                if every(recipe.save_every, step) or step + 1 == recipe.steps:
                    save(run, step + 1, wait=False)
                stop_if_due(run, step + 1)
            if run.evaluator:
                run.evals["after"] = evaluate(run, recipe.steps, progress)
            finish(run, progress)
    return run.folder


def train_step(run: Run, step: int) -> dict[str, float]:
    """One step: tasks, rollouts and rewards, then advantages, then optimizer steps, then figures."""
    recipe, clock, metrics, engine, critic = run.recipe, run.clock, run.metrics, run.engine, run.critic
    groups = gather(run, step)
    with clock("score"):
        documents = with_behavior(run, scored(run, to_train(run.recipe.algorithm, groups)))
        run.objective.begin(documents)
    with clock("batch"):
        documents = credited(run, groups, documents)
        batches = make_batches(run, groups, documents, cells=run.noise.cells(step))
    with clock("log"):
        write_samples(run, step, groups, documents)
    warming_up = critic is not None and step < (recipe.algorithm.critic.pretrain_steps or 0)
    if recipe.algorithm.fresh_optimizer:
        engine.clear_optimizer()
    version = engine.updates
    for epoch in range(recipe.algorithm.epochs):
        for batch in batches:
            if not batch.step_tokens:  # counted over all ranks, so all ranks leave it out
                continue
            with clock("train"):
                if not warming_up:
                    measured = engine.updates == version or (epoch == 0 and run.objective.needs_prox)
                    loss = partial(policy_loss, run, version=version, measured=measured)
                    with run.noise.watch(engine.deepspeed.module, batch, loss, first=engine.updates == version) as seen:
                        metrics.mean("optim/grad_norm", update(engine, batch, seen, metrics))
                    metrics.sum("tokens/trained", batch.step_tokens if run.world.is_main else 0)
                if critic is not None:
                    loss = partial(value_loss, run)
                    metrics.mean("critic/grad_norm", update(critic, batch, loss, metrics))
    return figures.log_step(run, step)


def to_train(algorithm: Algorithm, groups: list[Group]) -> list[Document]:
    """The rollouts as documents, with what the algorithm leaves out of them."""
    kept = {"train_truncated": algorithm.truncated == "keep", "train_earlier": algorithm.earlier == "train"}
    return documents_of(groups, **kept)


def scored(run: Run, documents: list[Document]) -> list[Document]:
    """What the policy before its first update, the reference and the critic say of each token, where that is asked."""
    engine, reference, critic = run.engine, run.reference, run.critic
    scored_by_policy = run.objective.needs_prox
    if not scored_by_policy and reference is None and critic is None:
        return documents
    chosen = [document for document in documents if document.inclusion]

    def scores(micro: Micro) -> dict[str, Tensor]:
        preemption.check(run.world)
        found: dict[str, Tensor] = {}
        if scored_by_policy:
            found["prox_logp"], found["entropy"] = engine.token_logp(micro)
            run.accounts.passed("prox", micro)
        if reference is not None:
            found["ref_logp"] = reference.token_logp(micro)
            run.accounts.passed("reference", micro)
        if critic is not None:
            found["value"] = critic.values(micro)
            run.accounts.passed("critic", micro)
        return found

    whole = iter(with_scores(chosen, run.packer, run.world, scores))
    return [next(whole) if document.inclusion else document for document in documents]


def credited(run: Run, groups: list[Group], documents: list[Document]) -> list[Document]:
    """Every token with its advantage."""
    weights = run.rewards.weights
    kl_coef = run.objective.kl_coef
    documents = credit(groups, documents, run.recipe.algorithm, weights, kl_coef=kl_coef, world=run.world)
    return corrected(documents, groups, run.curriculum)


def make_batches(run: Run, groups: list[Group], documents: list[Document], *, cells: int = 1) -> list[Batch]:
    """The optimizer steps of one batch of rollouts, every token with its weight.

    The first has its prompts in `cells`, for the gradient noise scale.
    """
    algorithm, max_tokens = run.recipe.algorithm, run.recipe.algorithm.aggregation_tokens or 1
    cut, ids = algorithm.minibatch_rollouts is not None, [group.id for group in groups]
    parts = in_parts(documents, ids, updates_a_step(run.recipe), cut=cut)
    how: list[Any] = [run.packer, run.world, algorithm.aggregation, max_tokens]
    return [make_batch(part, *how, cells=1 if i else cells) for i, part in enumerate(parts)]


def policy_loss(run: Run, micro: Micro, *, version: int, measured: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's share of the step's loss, and per-token figures."""
    leave_if_whole(run, version)
    run.accounts.passed("train", micro, trained=True)
    logp_BT, entropy_BT = run.engine.token_logp(micro)
    return run.objective.policy_loss(micro, logp_BT, entropy_BT, version=version, measured=measured)


def value_loss(run: Run, micro: Micro) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's share of the step's loss, and per-token figures."""
    assert run.critic is not None
    preemption.get_on()
    run.accounts.passed("critic", micro, trained=True)
    return run.objective.value_loss(micro, run.critic.values(micro))


def adapt(run: Run, step: int, logged: dict[str, float]) -> str | None:
    """Steer by the figures of a step, and renew the reference where that is due; what to say of it."""
    reason = run.objective.after_step(step, logged)
    if reason is None or run.reference is None:
        return None
    with run.clock("reset"):
        run.reference.follow(run.engine)
        if run.recipe.algorithm.kl.reset.clear_optimizer:
            run.engine.clear_optimizer()
    return f"step {step + 1}: the reference is now a copy of the policy ({reason})"


def leave_if_whole(run: Run, version: int) -> None:
    """Leave, if that was asked, while this step has not changed the policy; later it is quicker to end the step."""
    preemption.get_on()
    if run.engine.updates == version:
        preemption.check(run.world)


def look_after(run: Run, step: int, logged: dict[str, float]) -> str | None:
    """Count what goes wrong step after step; what to say of it."""
    engines = [run.engine] if run.critic is None else [run.engine, run.critic]
    worst = max(engines, key=lambda engine: engine.skipped_in_a_row)
    return run.health.see(step, logged, skipped_in_a_row=worst.skipped_in_a_row, lr_key=worst.lr_key)


def stop_if_due(run: Run, step: int) -> None:
    """After `step` whole steps, save and leave where that was asked, or where the run is broken."""
    broken = run.health.broken()
    if broken is None and (step == run.recipe.steps or not preemption.agree(run.world)):
        return
    save(run, step)
    if broken is not None:
        raise RunError(f"{broken}\n{step} steps are saved: correct this and go on with resume=auto")
    raise Preempted(f"{preemption.message()}: {step} steps are saved, go on with resume=auto")


@contextmanager
def saved_on_failure(run: Run, step: int) -> Iterator[None]:
    """Where all ranks leave a step together before it has changed the policy, save what the steps before it gave.

    What the step drew and generated is forgotten, and comes again from the same seeds when the run goes on.
    """
    updates, next_group = run.engine.updates, run.next_group
    listeners = run.curriculum, run.explorers, run.objective
    run.frontier.begin()
    run.pipeline.begin_step()
    dice = random_state(run.world.device)
    with kept_in_memory():
        states = [listener.state_dict() for listener in listeners]
    try:
        yield
    except SharedError as error:
        if not step or run.engine.updates != updates:
            raise
        for listener, state in zip(listeners, states, strict=True):
            listener.load_state_dict(state)
        run.frontier.undo()
        run.pipeline.undo()
        run.next_group = next_group
        set_random_state(dice, run.world.device)
        save(run, step)
        if isinstance(error, Preempted):
            raise Preempted(f"{error}: {step} steps are saved, go on with resume=auto") from error
        raise RunError(f"{error}\n{step} steps are saved: correct this and go on with resume=auto") from error


def every(interval: int, step: int) -> bool:
    """Whether an action of this interval is due after the 0-based step; 0 means never."""
    return bool(interval) and (step + 1) % interval == 0


def evaluate_between(run: Run, step: int, progress: Progress) -> None:
    """The evaluation after `step` whole steps; a run that leaves in it begins with it when it goes on."""
    run.evaluation_due = True
    try:
        figures = evaluate(run, step, progress)
    except Preempted:
        save(run, step)
        raise
    run.evaluation_due = False
    if "pass@1" in figures:
        run.objective.after_evaluation(figures["pass@1"])


def evaluate(run: Run, step: int, progress: Progress) -> dict[str, float]:
    """Held-out figures of the policy after `step` steps, logged and returned."""
    assert run.evaluator is not None
    with run.clock("evaluate"):
        rows = run.evaluator.rows(run.generator, run.engine)
        first = run.evals.setdefault("first", [row["correct"] for row in rows])
        result = tabulate(rows, run.evaluator.recipe.n) | against_first(rows, first)
        spent = run.accounts.close_evaluation(run.world.all_gather_object(run.accounts.take()))
    logged = {f"eval/{name}": value for name, value in result.items()} | spent
    run.trackers.log(max(step - 1, 0), logged)
    found = f"pass@1 {result['pass@1']:.3f}" if "pass@1" in result else "no answer could be judged"
    progress.message(f"evaluation after {step} steps: {found} on {result['num_problems']:.0f} problems")
    raise_alarms(run, max(step - 1, 0), logged, progress)
    return result


def raise_alarms(run: Run, step: int, logged: dict[str, float], progress: Progress) -> None:
    """Say each alarm once, when a line of figures is the first to raise it."""
    if run.world.is_main:
        for alarm in run.lookout.observe(step, logged):
            progress.message(alarm.line())


def save(run: Run, step: int, *, wait: bool = True) -> None:
    """Write a checkpoint of everything that has a state, after `step` whole steps; it may be written in a thread."""
    with run.clock("checkpoint"):
        score = score_of(run.recipe.keep_best, run.trackers.newest)
        state = {
            "recipe": asdict(run.recipe),
            "sizes": {"metrics": run.trackers.settle(), "samples": settle(run.samples.path)},
            "curriculum": run.curriculum.state_dict(),
            "explorers": run.explorers.state_dict(),
            "frontier": run.frontier.state_dict(),
            "pipeline": run.pipeline.state_dict(run.world),
            "next_group": run.next_group,
            "objective": run.objective.state_dict(),
            "clock": run.clock.state_dict(),
            "accounts": run.accounts.state_dict(),
            "noise": run.noise.state_dict(),
            "law": run.law.state_dict(),
            "evals": run.evals,
            "evaluation_due": run.evaluation_due,
            "model": str(run.model),
        }
        run.checkpoints.save(step, run.engines, state, score=score, wait=wait)


def score_of(metric: str | None, logged: Mapping[str, float]) -> float | None:
    """What a checkpoint is worth: the larger the better; None where that is not known.

    >>> score_of("-critic/loss", {"critic/loss": 0.5}), score_of("eval/pass@1", {})
    (-0.5, None)
    """
    value = logged.get((metric or "").removeprefix("-"), math.nan)
    if not math.isfinite(value):
        return None
    return -value if (metric or "").startswith("-") else value


def finish(run: Run, progress: Progress) -> None:
    """Write and show the summary."""
    with run.clock("checkpoint"):
        run.checkpoints.wait()
    run.clock.lap()
    peak_gib = fullest(run.world.all_gather_object(run.clock.total_peak_gib))
    if run.world.is_main:
        summary = write_summary(
            run.folder,
            recipe=run.recipe,
            seeds=[run.recipe.seed],
            before=run.evals.get("before"),
            after=run.evals.get("after"),
            wall_s=sum(run.clock.total.values()),
            phase_s=run.clock.total,
            memory={"of": run.clock.gauge.of, "peak_gib": peak_gib} if run.clock.gauge is not None else None,
            steps=run.recipe.steps,
            totals=run.accounts.totals,
        )
        progress.final(summary)
    run.trackers.close()
    if run.world.is_main:
        progress.message(report_of_finished(run.folder))
    run.world.barrier()
