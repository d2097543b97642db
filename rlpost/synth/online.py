"""Synthesis while a run trains: every so many steps, problems like those that the policy fails now join the pool.

A round is a pipeline of its own, in `online/round-<step>/` of the run's folder: the tasks that failed last are its
seeds, the generator goes on learning from them, and what is sampled, solved and filtered is answered by the policy of
this step. What it solves sometimes is added, with that pass rate as first observation, up to `synth.online`'s caps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.duplicates import jaccard, shingles
from rlpost.errors import Preempted, RunError
from rlpost.measure import answered, as_measured
from rlpost.preempt import PREEMPTED, preemption
from rlpost.recipe import Recipe, TaskSource, to_yaml
from rlpost.rollouts import outcomes_of, score_together
from rlpost.synth.collect import FUNNEL, PROBLEMS
from rlpost.synth.filters.near_duplicates import text_of
from rlpost.synth.stages.generator import generator_of_folder
from rlpost.synth_recipe import Online
from rlpost.types import Outcome, Task

if TYPE_CHECKING:
    from rlpost.run import Run

SOURCE = "synth"
"""What `Task.source` of added problems begins with."""


def synthesise(run: Run, step: int) -> str | None:
    """A round before this step, where one is due; what to say of it."""
    online = run.recipe.synth.online if run.recipe.synth else None
    if online is None or not step or step % online.every:
        return None
    with run.clock("synth"):
        why, room = reason_to_stop(run, online), room_of(run, online)
        if why is not None or not room:
            why = why or "the budget or the share of synth.online is used up"
            return f"step {step + 1}: nothing is synthesised: {why}"
        found = run.world.together(lambda: candidates(run, online, step) if run.world.is_main else [])
        tasks = [Task(**one) for one in run.world.all_gather_object(found)[0]]
        kept = informative(tasks, measured(run, online, step, tasks))[:room]
        added = [task for task, _ in kept]
        spread = diversity([text_of(task) for task in added])
        if run.world.is_main:
            run.metrics.sum("synth/measured", len(tasks))
            run.metrics.sum("synth/sometimes_solved", len(kept))
        run.metrics.last("synth/diversity", spread)
        if len(added) > 1 and spread < online.diversity:
            return f"step {step + 1}: {len(added)} problems are too much alike to be added (diversity {spread:.2f})"
        take_in(run, kept)
    return f"step {step + 1}: {len(added)} of {len(tasks)} new problems join the tasks"


def take_in(run: Run, kept: Sequence[tuple[Task, Outcome]]) -> None:
    """Add the problems to the curriculum, which then hears how the policy did on them."""
    if kept:
        run.curriculum.add([task for task, _ in kept])
        run.curriculum.observe(as_measured([outcome for _, outcome in kept]))
    if run.world.is_main:
        run.metrics.sum("synth/added", len(kept))
    added = len(synthetic(run))
    run.metrics.last("synth/share", added / (added + len(run.task_keys or ())))


def synthetic(run: Run) -> list[Task]:
    """What was added so far."""
    return [task for task in run.curriculum.added if task.source.startswith(SOURCE)]


def room_of(run: Run, online: Online) -> int:
    """How many problems may still be added: by the budget, and by the share of the pool."""
    real, added = len(run.task_keys or ()), len(synthetic(run))
    most = online.budget if online.share >= 1 else min(online.budget, int(real * online.share / (1 - online.share)))
    return max(0, most - added)


def reason_to_stop(run: Run, online: Online) -> str | None:
    """What speaks against more, the same on every rank: held-out success on real problems has fallen."""
    rows = run.lookout.rows if run.world.is_main else []
    curve = [value for row in rows if (value := row.get("eval/pass@1")) is not None]
    said = None
    if curve and curve[-1] < max(curve) - online.drop:
        said = f"held-out pass@1 fell from {max(curve):.3f} to {curve[-1]:.3f} (synth.online.drop={online.drop:g})"
    return run.world.all_gather_object(said)[0]


def measured(run: Run, online: Online, step: int, tasks: list[Task]) -> list[Outcome]:
    """How the policy of this step does on them, of all ranks, in their order."""
    if not tasks:
        return []
    with run.clock("sync"), run.generator.awake(run.engine, run.engine.updates):
        groups = answered(run, tasks, online.measure)
    with run.clock("reward"):
        score_together(run, groups)
    return outcomes_of(run, step, groups)


def informative(tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> list[tuple[Task, Outcome]]:
    """Those that were solved and failed, the most even first: a group of their answers has a gradient.

    >>> said = [Outcome("a", (), 0, (True, True)), Outcome("b", (), 0, (True, False, False))]
    >>> [task.key for task, _ in informative([Task("a", "1+1="), Task("b", "2+2=")], said)]
    ['b']
    """
    by_key = {outcome.key: outcome for outcome in outcomes}

    def rate(outcome: Outcome) -> float:
        judged = [flag for flag in outcome.passed if flag is not None]
        return sum(judged) / len(judged) if judged else 0.0

    pairs = [(task, by_key[task.key]) for task in tasks if 0 < rate(by_key[task.key]) < 1]
    return sorted(pairs, key=lambda pair: abs(rate(pair[1]) - 0.5))


def diversity(texts: Sequence[str], size: int = 3) -> float:
    """Mean of 1 - Jaccard similarity to the nearest other text; 1 where there is no other.

    >>> diversity(["a b c", "a b c"]), diversity(["a b c", "d e f"])
    (0.0, 1.0)
    """
    sets = [shingles(text, size) for text in texts]
    if len(sets) < 2:
        return 1.0
    nearest = [max(jaccard(one, other) for j, other in enumerate(sets) if j != i) for i, one in enumerate(sets)]
    return 1 - sum(nearest) / len(nearest)


def candidates(run: Run, online: Online, step: int) -> list[dict[str, Any]]:
    """New problems that fit the context, as fields of tasks: made in this round, or from the file that is named."""
    rows = made(run, online, step) if online.path is None else _rows(Path(online.path))
    known = {task.key for task in run.curriculum.added} | set(run.task_keys or ())
    room = run.renderer.context - run.sampling.max_new_tokens
    found: list[dict[str, Any]] = []
    for row in rows:
        task = {"key": row["key"], "prompt": row["prompt"], "answer": row["answer"], "solution": row["solution"]}
        task |= {"source": f"{SOURCE}:{step}", "extra": {"difficulty": row["difficulty"]}}
        if row["key"] not in known and len(run.renderer.prompt_ids(Task(**task))) <= room:
            found.append(task)
    return found[: online.most]


def made(run: Run, online: Online, step: int) -> list[dict[str, Any]]:
    """The problems of a round, by `rlpost synth` in a process of its own; nothing where the policy fails nothing."""
    folder = run.folder / "online" / f"round-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    seeds = failed(run, online)
    run.metrics.sum("synth/seeds", len(seeds))
    if not seeds:
        return []
    _write(folder / "seeds.jsonl", seeds)
    _write(folder / "pool.jsonl", [{"prompt": text_of(task)} for task in run.curriculum.tasks])
    (folder / "round.yaml").write_text(to_yaml(round_recipe(run, online, step, folder)), encoding="utf-8")
    _pipeline([sys.executable, "-m", "rlpost", "synth", str(folder / "round.yaml")])
    for one in json.loads((folder / "synth" / FUNNEL).read_text()):
        if one["stage"] != "identify":
            run.metrics.sum(f"synth/{one['stage'].replace('-', '_')}", one["out"])
    return _rows(folder / "synth" / PROBLEMS)


def failed(run: Run, online: Online) -> list[dict[str, Any]]:
    """The tasks of lowest newest pass rate below `below`, real ones alone, as rows."""
    rates = run.frontier.rates
    tasks = [task for task in run.curriculum.tasks if rates.get(task.key, 1.0) < online.below]
    tasks = [task for task in tasks if not task.source.startswith(SOURCE)]
    hardest = sorted(tasks, key=lambda task: (rates[task.key], task.key))[: online.seeds]
    return [
        {"key": task.key, "prompt": text_of(task), "answer": task.answer, "difficulty": 1 - rates[task.key]}
        for task in hardest
    ]


def round_recipe(run: Run, online: Online, step: int, folder: Path) -> Recipe:
    """The recipe of a round: its seeds are the tasks, its generator goes on, the policy is asked in this process."""
    recipe = run.recipe
    assert recipe.synth is not None
    start = generator_of_folder(run.folder / "synth")
    pool = [{"path": str(folder / "pool.jsonl")}]
    screen = [
        {**one, "held_out": [*one.get("held_out", []), *pool]} if one["use"] == "near_duplicates" else one
        for one in recipe.synth.screen
    ]
    synth = replace(
        recipe.synth,
        identify={"use": "measured", "path": str(folder / "seeds.jsonl"), "at_least": 0.0},
        train=recipe.synth.train | ({"model": start["model"]} if start else {}),
        sample=recipe.synth.sample | {"number": online.number},
        screen=screen,
        filters=[one for one in recipe.synth.filters if one["use"] != "policy"],
        online=None,
    )
    seeds = TaskSource(path=str(folder / "seeds.jsonl"), key="key", answer=recipe.tasks.train.answer and "answer")
    return replace(
        recipe,
        name=f"{recipe.name}/online/{folder.name}",
        seed=recipe.seed + step,
        tasks=replace(recipe.tasks, train=seeds),
        model=replace(recipe.model, path=str(run.model), init=None),
        sft=None,
        synth=synth,
        curriculum={"use": "uniform"},
        resume="never",
    )


def _pipeline(command: Sequence[str]) -> None:
    """Run it, without this run's ranks; leave where this process is asked to."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    child = subprocess.Popen(
        command,
        env={key: value for key, value in os.environ.items() if key not in ranks},
        stdout=subprocess.DEVNULL,
    )
    try:
        while child.poll() is None:
            preemption.poll()
            try:
                child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if child.returncode == PREEMPTED:
        raise Preempted("asked to leave during synthesis")
    if child.returncode:
        raise RunError(
            f"synth.online: a round must end well (it ended with {child.returncode}, and its message is above): mend "
            f"it, or try it alone with `rlpost synth {command[-1]}`"
        )


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that may still grow; none where it is not there yet."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
