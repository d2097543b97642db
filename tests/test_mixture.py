"""Several sources of training tasks: shares of a step, exact resume, and what the recipe may say of them."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from curricula.learnable import Learnable
from curricula.scalerl import Scalerl
from curricula.uniform import Uniform
from rlpost.check import load_and_check
from rlpost.errors import RecipeError, RunError
from rlpost.mixture import Mixture, mixed
from rlpost.recipe import load, to_yaml
from rlpost.task_recipe import Tasks, TaskSource
from rlpost.tasks import load_task_sets
from rlpost.types import Outcome, Task

SHARES = {"a": 5.0, "b": 2.0, "c": 1.0, "d": 0.5}


def sources(weights):
    first, *others = (TaskSource(path=f"{name}.jsonl", name=name, weight=weight) for name, weight in weights.items())
    return Tasks(train=first, more=others)


def tasks_of(names, size=30):
    return [Task(f"{name}{i}", f"{name} {i}", source=name) for name in names for i in range(size)]


def mixture(kind=Uniform, weights=SHARES):
    return mixed(sources(weights), tasks_of(weights), lambda pool: kind(pool, seed=3))


EIGHT = {name: float(i * i + 1) for i, name in enumerate("abcdefgh")}


@pytest.mark.parametrize("weights", [SHARES, EIGHT, {"a": 1.0, "b": 1.0}, {"a": 97.0, "b": 3.0}])
def test_every_source_has_its_share_of_the_first_n_tasks_within_one(weights):
    curriculum, counts, whole = mixture(weights=weights), Counter(), sum(weights.values())
    for n, task in enumerate(curriculum.select(1000), start=1):
        counts[task.source] += 1
        assert all(abs(counts[name] - n * weight / whole) < 1 for name, weight in weights.items()), n


@pytest.mark.parametrize("kind", [Uniform, Learnable, Scalerl])
def test_a_mixture_resumes_exactly(kind):
    dice = random.Random(0)

    def step(curriculum, outcomes):
        chosen = curriculum.select(7)
        curriculum.observe(outcomes)
        return [task.key for task in chosen], curriculum.metrics()

    def outcome(key):
        passed = tuple(dice.random() < 0.5 for _ in range(4))
        return Outcome(key, tuple(map(float, passed)), 0, passed)

    first = mixture(kind)
    for _ in range(5):
        step(first, [outcome(task.key) for task in dice.sample(tasks_of(SHARES), 5)])
    second = mixture(kind)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(5):
        outcomes = [outcome(task.key) for task in dice.sample(tasks_of(SHARES), 5)]
        assert step(first, outcomes) == step(second, outcomes)
    assert first.state_dict() == second.state_dict()


def test_a_mixture_has_what_its_parts_have_and_tells_each_its_own():
    assert not hasattr(mixture(Uniform), "wants_measured") and not hasattr(mixture(Uniform), "correction")

    class Part(Uniform):
        """Remembers, measures and corrects."""

        def observe(self, outcomes):
            self.seen = [outcome.key for outcome in outcomes]

        def wants_measured(self):
            return self.tasks[:1]

        def correction(self, key):
            return 2.0 if key.startswith("b") else 1.0

    curriculum = mixture(Part, {"a": 1.0, "b": 1.0})
    curriculum.observe([Outcome(key, (1.0,), 0) for key in ("a1", "b2", "a3")])
    assert curriculum.parts["a"].seen == ["a1", "a3"] and curriculum.parts["b"].seen == ["b2"]
    assert [task.key for task in curriculum.wants_measured()] == ["a0", "b0"]
    assert (curriculum.correction("a1"), curriculum.correction("b1")) == (1.0, 2.0)
    curriculum.add([Task("new", "x", source="b")])
    assert [task.key for task in curriculum.added] == ["new"] and curriculum.correction("new") == 1.0
    assert {name.partition("/")[2] for name in curriculum.metrics()} == {"a", "b"}


def test_without_weights_the_sources_are_one_pool():
    assert isinstance(mixture(weights={"a": None, "b": None}), Uniform)
    assert isinstance(mixture(), Mixture)


def test_another_set_of_sources_does_not_go_on():
    with pytest.raises(RunError, match=r"sources that the run began with \(now a, b; then a, b, c, d\)"):
        mixture(weights={"a": 1.0, "b": 1.0}).load_state_dict(mixture().state_dict())
    with pytest.raises(RunError, match="one without weights"):
        mixture().load_state_dict(Uniform(tasks_of("a"), seed=0).state_dict())


RECIPE = """
model: {init: {tokenizer: byte}}
rewards: [{use: final_number}]
tasks:
  train:
    - {path: a.jsonl, name: a, weight: 3, extra: [kind], keep: {where: {kind: [x, y]}}}
    - {path: b.jsonl, weight: 1, duplicates: drop}
  eval: {path: e.jsonl}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        "a": [{"prompt": f"a {i} words of a problem", "answer": i, "kind": "xyz"[i % 3]} for i in range(9)],
        "b": [{"prompt": f"{name} words of a problem", "answer": 0} for name in ("b 0", "b 1", "b 2", "b 3", "a 0")],
        "e": [{"prompt": "held out", "answer": 1}],
    }
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (tmp_path / "mix.yaml").write_text(RECIPE)
    return tmp_path


def test_a_recipe_lists_its_sources_and_reads_them(folder):
    recipe = load_and_check("mix.yaml", ["tasks.train.1.weight=2"])
    train, held_out = load_task_sets(recipe)
    assert Counter(task.source for task in train) == {"a": 6, "b.jsonl": 4} and len(held_out) == 1
    assert recipe.tasks.more[0].weight == 2.0
    (folder / "whole.yaml").write_text(to_yaml(recipe))
    assert load("whole.yaml", ["name=mix"]) == recipe


def test_every_mistake_in_a_mixture_is_named_with_its_key(folder):
    said = ["tasks.train.1.weight=null", "tasks.train.1.name=a", "tasks.train.0.keep.where={sort: x}",
            "tasks.train.1.keep.min_tokens=9", "tasks.train.1.keep.max_tokens=3", "tasks.train.0.keep.max_difficulty=1",
            "tasks.eval.keep.max_tokens=9", "tasks.decontaminate.near=2"]  # fmt: skip
    with pytest.raises(RecipeError) as error:
        load_and_check("mix.yaml", said)
    for part in (
        "tasks.more.0.weight must be given where other sources have one",
        "tasks.more.0.name must tell it from an earlier source",
        "tasks.train.keep.where must name columns of tasks.train.extra (got `sort`",
        "tasks.more.0.keep.min_tokens must be at most",
        "tasks.train.keep.difficulty must name a file",
        "tasks.eval.keep.max_tokens is for training tasks",
        "tasks.decontaminate.near must be in (0, 1]",
    ):
        assert part in str(error.value), part
    with pytest.raises(RecipeError, match=r"tasks\.more\.0\.wieght: no such key, did you mean `weight`"):
        load_and_check("mix.yaml", ["tasks.train.1.wieght=1"])


def test_sources_must_not_share_problems_unless_the_later_drops_them(folder):
    with pytest.raises(RunError, match=r"tasks\.more\.0: no earlier source may have the same problems, and 1 are"):
        load_task_sets(load_and_check("mix.yaml", ["tasks.train.1.duplicates=refuse"]))
