"""The `tasks` and `evaluation` sections of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Keep:
    """Which tasks of a source are used; the others are left out, and counted."""

    where: dict[str, Any] = field(default_factory=dict)
    """A column of `extra` -> its value, or a list of values, such as `{Type: [Addition, Subtraction]}`."""
    difficulty: str | None = None
    """A file of `rlpost difficulty`, or a column of numbers in `extra`; a task that it does not know is left out."""
    min_difficulty: float | None = None
    max_difficulty: float | None = None
    """1 - pass rate, where the file says it; both ends are kept."""
    min_tokens: int | None = None
    max_tokens: int | None = None
    """Of the prompt, as the model sees it; of training tasks only."""


@dataclass
class TaskSource:
    """One data set and how its columns become tasks."""

    path: str = "???"
    """`file.jsonl`, `file.parquet`, `hf:owner/name[:config]:split`, `reasoning_gym:name`, or `pkg.module:function`."""
    name: str | None = None
    """What it is called in figures; None: its path."""
    weight: float | None = None
    """Its share of every step's tasks beside other sources; None, for all of them: the sources are one pool."""
    prompt: str = "prompt"
    """A column (text, or a list of chat messages), or a template over columns such as `"{Body} {Question}"`."""
    answer: str | None = "answer"
    """A column, or a template; None where the rewards need no answer."""
    answer_regex: str | None = None
    """Applied to the answer: its first group is kept, such as `"#### (.+)"` for GSM8K."""
    solution: str | None = None
    hints: list[str] = field(default_factory=list)
    """Columns with hints, weak to strong."""
    extra: list[str] = field(default_factory=list)
    """Other columns that rewards or tables by level want; they arrive in `task.extra`."""
    key: str | None = None
    """A column with a unique id; None: a hash of the prompt."""
    limit: int | None = None
    """Use only the first so many."""
    keep: Keep = field(default_factory=Keep)
    """Filters, after `limit`."""
    duplicates: Literal["refuse", "drop"] = "refuse"
    """Repeated keys or prompts: an error that names them, or all but the first left out. `drop` on `tasks.train` also
    leaves out what `tasks.eval` holds. `reasoning_gym` draws with replacement, so there it is always `drop`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Arguments of a `reasoning_gym` task or of a function source."""


@dataclass
class Prompting:
    """How a task's prompt becomes token ids."""

    chat: bool | None = None
    """Use the tokenizer's chat template; None: where it has one."""
    system: str | None = None
    prefix: str = ""
    suffix: str = ""
    """Text around the prompt, such as an instruction on the answer's format."""


@dataclass
class Decontaminate:
    """Training tasks that are too like a held-out one, beyond those that are the same: `decontaminate.py`."""

    ngram: int | None = None
    """A run of so many words in common, punctuation counted; 13 in GPT-3, arXiv:2005.14165, appendix C. None: off."""
    near: float | None = None
    """Jaccard similarity of runs of three words from which two problems are near, such as 0.8. None: off."""
    against: list[TaskSource] = field(default_factory=list)
    """Held-out sets beside `tasks.eval`, such as benchmarks that the model is to be judged by later."""
    found: Literal["drop", "refuse"] = "drop"
    """Leave such tasks out, with a warning, or stop with an error that names them."""


@dataclass
class Tasks:
    """What is trained on and what is held out."""

    train: TaskSource = field(default_factory=TaskSource)
    """A source, or a list of sources: all but the first stand in `more` then."""
    more: list[TaskSource] = field(default_factory=list)
    eval: TaskSource | None = None
    prompting: Prompting = field(default_factory=Prompting)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)

    @property
    def sources(self) -> dict[str, TaskSource]:
        """The recipe key of each source of training tasks."""
        return {"tasks.train": self.train} | {f"tasks.more.{i}": source for i, source in enumerate(self.more)}


@dataclass
class Evaluation:
    """Held-out pass@k."""

    n: int = 8
    """Samples a problem; pass@k and maj@k are reported for every power of two up to n."""
    k: list[int] = field(default_factory=list)
    """Further k, up to n."""
    until: int | None = None
    """PassUntil: a problem that few of the n samples solve is tried on, up to so many times; `eval/passuntil`."""
    vote: str | None = None
    """What maj@k counts: a function of a rollout that gives its answer, or None, as `pkg.module:function`, or
    `final_number` or `boxed_answer`; None: that of the first reward, where it is one of these, else no maj@k."""
    every: int = 0
    """Steps between evaluations while training; 0: only before and after."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    """None: as in training."""
    by: str | None = None
    """A field of `task.extra` to break the result down by, such as the level of difficulty."""
