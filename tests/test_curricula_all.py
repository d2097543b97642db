"""What every curriculum promises: enough tasks, the same on every rank, exact resume, new tasks, any group size."""

from __future__ import annotations

import json

import pytest

from curricula.adarft import Adarft
from curricula.adcl import Adcl
from curricula.difficulty_pool import DifficultyPool
from curricula.irt import Irt
from curricula.kimi import Kimi
from curricula.learnable import Learnable
from curricula.scalerl import Scalerl
from curricula.seta import Seta
from curricula.staged import Staged
from curricula.uniform import Uniform
from rlpost.checkpoint import state_to_json
from rlpost.curriculum import kept_in_memory
from rlpost.errors import RunError
from rlpost.types import Outcome, Task

TASKS = [Task(str(i), f"{i}+{i}=", extra={"terms": i % 7}, source="a" if i % 2 else "b") for i in range(60)]
NEW = [Task(f"new{i}", f"{i}-{i}=", hints=("look",), extra={"terms": i % 7}, source="synth") for i in range(20)]
STAGES = [{"steps": 3, "at_most": 3}, {"steps": 2, "at_least": 2, "at_most": 5}, {}]
EVERY = {
    "uniform": (Uniform, {}),
    "scalerl": (Scalerl, {}),
    "staged": (Staged, {"difficulty": "terms", "stages": STAGES}),
    "difficulty_pool": (DifficultyPool, {"half_life": 3.0}),
    "adarft": (Adarft, {"difficulty": "terms"}),
    "kimi": (Kimi, {}),
    "kimi warm-up": (Kimi, {"difficulty": "terms", "warmup_tasks": 20}),
    "learnable": (Learnable, {"half_life": 3.0}),
    "learnable mixed": (Learnable, {"weight": "mixed", "difficulty": "terms", "correct": True}),
    "seta": (Seta, {"epochs": 3}),
    "adcl": (Adcl, {}),
    "adcl given": (Adcl, {"difficulty": "terms", "draws": 40}),
    "adcl static": (Adcl, {"difficulty": "terms", "static": True}),
    "irt": (Irt, {}),
    "irt window": (Irt, {"window": [None, 0.0], "nudge": 0.5, "all_after": 30, "text": False}),
}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """What happens every so many steps happens in these short runs."""
    monkeypatch.setattr("curricula.irt.REFIT", 2)
    monkeypatch.setattr("curricula.irt.PATIENCE", 2)


def make(name, tasks=TASKS, seed=3):
    kind, parameters = EVERY[name]
    return kind(tasks, seed=seed, **parameters)


def answer(task, step, size=4, measured=False):
    """An outcome that follows from the task and the step: harder with `terms`, easier with time, some not judged."""
    solved = max(0, min(size, size - task.extra["terms"] + step // 2))
    flags = tuple(None if (step + i) % 11 == 10 else i < solved for i in range(size))
    return Outcome(task.key, tuple(None if flag is None else float(flag) for flag in flags), step, flags, measured)


def go_on(curriculum, steps, start=0, waves=(8, 3)):
    """So many steps of several waves, as the loop asks for them; the keys of all choices."""
    chosen = []
    for step in range(start, start + steps):
        for wave in waves:
            wanted = getattr(curriculum, "wants_measured", list)()
            if wanted:
                curriculum.observe([answer(task, step, 2, measured=True) for task in wanted])
            tasks = curriculum.select(wave)
            chosen.append([task.key for task in tasks])
            curriculum.observe([answer(task, step, 2 + i % 5) for i, task in enumerate(tasks)])
        assert all(isinstance(value, float) for value in curriculum.metrics().values())
    return chosen


def saved(curriculum):
    return json.loads(state_to_json(curriculum.state_dict()))


@pytest.mark.parametrize("name", EVERY)
def test_every_curriculum_gives_as_many_known_tasks_as_it_is_asked_for(name):
    known = {task.key for task in TASKS}
    for size in (1, 7, 60, 150):
        chosen = make(name).select(size)
        assert len(chosen) == size and {task.key for task in chosen} <= known
        assert chosen == make(name).select(size)
    assert make(name).select(9) != make(name, seed=4).select(9)


@pytest.mark.parametrize("name", EVERY)
def test_every_curriculum_asks_for_no_task_twice_in_a_wave(name):
    chosen = go_on(make(name), 12)
    repeats = sum(len(wave) - len(set(wave)) for wave in chosen)
    epochs = 2 if name in ("uniform", "scalerl", "seta", "kimi warm-up") or name.startswith("adcl") else 0
    assert repeats <= epochs * 3  # where one epoch ends and the next begins


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
@pytest.mark.parametrize("name", EVERY)
def test_every_curriculum_resumes_exactly(name, steps):
    whole = make(name)
    go_on(whole, steps)
    state = saved(whole)
    resumed = make(name, seed=99)
    go_on(resumed, 2)
    resumed.load_state_dict(state)
    assert saved(resumed) == state
    assert go_on(resumed, 6, start=steps) == go_on(whole, 6, start=steps)
    assert saved(resumed) == saved(whole)
    assert resumed.metrics() == whole.metrics()


@pytest.mark.parametrize("name", EVERY)
def test_every_curriculum_goes_back_to_a_state_kept_in_memory(name):
    """As a run does whose step failed before it trained on anything; the state is no part of what goes on."""
    whole = make(name)
    go_on(whole, 4)
    state = saved(whole)
    with kept_in_memory():
        kept = whole.state_dict()
    chosen = go_on(whole, 6, start=4)
    whole.load_state_dict(kept)
    assert saved(whole) == state
    assert go_on(whole, 6, start=4) == chosen
    whole.load_state_dict(kept)
    assert saved(whole) == state


@pytest.mark.parametrize("name", EVERY)
def test_every_curriculum_takes_new_tasks_and_resumes_with_them(name):
    whole = make(name)
    go_on(whole, 3)
    whole.add(NEW)
    resumed = make(name, seed=1)
    state = saved(whole)
    resumed.load_state_dict(state)
    assert saved(resumed) == state
    chosen = go_on(whole, 40, start=3)
    assert go_on(resumed, 40, start=3) == chosen
    assert {task.key for task in NEW} & {key for wave in chosen for key in wave}
    assert saved(resumed) == saved(whole)
    assert [task for task in resumed.tasks if task.key == "new3"] == [NEW[3]]


@pytest.mark.parametrize("name", EVERY)
def test_every_curriculum_refuses_new_tasks_that_it_has(name):
    with pytest.raises(RunError, match="must have new keys"):
        make(name).add([TASKS[3]])
    with pytest.raises(RunError, match="must have new keys"):
        make(name).add([NEW[0], NEW[0]])


@pytest.mark.parametrize("name", EVERY)
def test_every_curriculum_refuses_the_state_of_other_tasks(name):
    with pytest.raises(RunError, match=r"tasks\.train must be what the checkpoint was trained on"):
        make(name, TASKS[:59]).load_state_dict(saved(make(name)))
