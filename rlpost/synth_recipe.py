"""The `synth` section of a recipe: difficult problems are found, more of them made, and what does not hold sorted out.

Each stage is a plug-in: `use` and its parameters. Shipped ones are functions of `rlpost/synth/stages/` and
`rlpost/synth/filters/`, whose docstrings say what the parameters mean; a dotted path names one of your own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHIPPED = {"identify": "pass_rate", "train": "generator", "sample": "sample", "distil": "teacher"}
"""What a stage is where the recipe does not say `use`."""


def _screen() -> list[dict[str, Any]]:
    return [{"use": "rules"}, {"use": "near_duplicates"}]


def _filters() -> list[dict[str, Any]]:
    return [{"use": "solution_rules"}, {"use": "agreement"}, {"use": "policy"}]


@dataclass
class Online:
    """Synthesis while a run trains (`rlpost train`), every so many steps."""

    every: int = 20
    """Steps between rounds; before step 0 there is none."""
    seeds: int = 64
    """Training tasks of a round that the policy failed last, from which the generator goes on learning."""
    number: int = 256
    """Problems that a round samples, in place of `synth.sample.number`."""
    path: str | None = None
    """Take problems from this file instead of making any: `problems.jsonl` of a `rlpost synth` of somebody else, which
    may grow; a run that resumes then adds what is in it by that time."""
    most: int = 64
    """Problems of a round that the policy answers."""
    below: float = 0.5
    """A task whose newest pass rate is lower is one that the policy fails."""
    measure: int = 8
    """Answers of the policy to each new problem; what it solves always or never is not added."""
    budget: int = 1000
    """Problems that the run may add in all."""
    share: float = 0.5
    """At most so much of the pool is synthetic: problems beyond it wait for nothing and are not added."""
    diversity: float = 0.2
    """Mean distance (1 - Jaccard similarity) of a round's problems to their nearest neighbour among them; a round below
    it is not added."""
    drop: float = 0.05
    """Where `eval/pass@1`, on real problems, is so far below its best of the run, nothing more is added."""


@dataclass
class Synth:
    """Synthesis of difficult problems (`rlpost synth`), after ScaleDiff, arXiv:2509.21070."""

    identify: dict[str, Any] = field(default_factory=dict)
    """Which tasks of `tasks.train` are difficult: `pass_rate`, `probe`, `measured`."""
    train: dict[str, Any] = field(default_factory=dict)
    """The problem generator, on the text of those alone."""
    sample: dict[str, Any] = field(default_factory=dict)
    """New problems."""
    screen: list[dict[str, Any]] = field(default_factory=_screen)
    """Filters of problems, before a teacher spends work on them."""
    distil: dict[str, Any] = field(default_factory=dict)
    """Solutions by a teacher."""
    filters: list[dict[str, Any]] = field(default_factory=_filters)
    """Filters of problems with their solutions."""
    online: Online | None = None
    """Present: rounds of synthesis while the policy is trained."""

    def __post_init__(self) -> None:
        """Name the shipped stage where none is named."""
        for stage, name in SHIPPED.items():
            setattr(self, stage, {"use": name, **getattr(self, stage)})
