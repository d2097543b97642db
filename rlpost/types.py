"""The records that flow through a run, in the order in which they are made.

Shape legend, used as suffixes of tensors and nested lists everywhere:
`P` prompts of this rank's step, `G` samples per prompt, `N = P * G` rollouts, `B` rows of a micro-batch,
`T` positions of a row, `V` vocabulary. A micro-batch is packed: one row holds several documents one after another.

Names of policies: `logp` is the policy being trained, `behavior_logp` what the generator sampled with, `ref_logp` the
frozen reference.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from rlpost.talk import Turn

FinishReason = Literal["stop", "length", "repetition", "abort"]
"""Why an answer ended: it was over, it had no tokens left, it went round in circles, or the generator gave it up."""
Ending = Literal["ok", "wrong", "unparsable", "timeout", "crash", "error"]
"""Of a reward on one rollout: it gave 1 or more; less; it found nothing to judge, or could not judge; it took too long;
its process died or ran out of memory; it raised, or returned no number."""
Spans = tuple[tuple[int, int], ...]
"""Which policy version wrote which tokens: (first token, version), the earliest first, up to where the next begins."""
FAILED: tuple[Ending, ...] = ("timeout", "crash", "error")
"""Where the reward is to blame, and not the answer."""
Role = Literal["policy", "guided", "expert"]
"""Who wrote an answer: the policy on the problem alone, the policy with a hint beside it, or somebody else."""


@dataclass(frozen=True, slots=True)
class Task:
    """One problem, as the tasks file gave it.

    >>> task = Task(key="a1", prompt="7-0+6=", answer="13", extra={"terms": 3})
    >>> task.answer, task.extra["terms"]
    ('13', 3)
    """

    key: str
    """Stable: the same row has the same key in every run, on every rank."""
    prompt: str | Sequence[Mapping[str, str]]
    """Plain text, or chat messages (`{"role": ..., "content": ...}`)."""
    answer: str | None = None
    solution: str | None = None
    """A worked solution: what supervised training imitates and what hints are cut from."""
    hints: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Any other columns that the recipe asked for, for rewards and for tables by level."""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    >>> Sampling(max_new_tokens=64).temperature
    1.0
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: the whole vocabulary."""
    stop_ids: tuple[int, ...] = ()
    repeats: tuple[int, int] | None = None
    """(n, m): an answer ends once its last m or fewer tokens have come n times in a row; None: it may go on."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer as well: the token that completes one is its last."""
    rollout: Callable[[Any], Awaitable[None]] | None = None
    """What leads each answer over several calls of the generator (`talk.py`); None: one call makes it."""


@dataclass(frozen=True, slots=True)
class Request:
    """Ask the generator for `n` rollouts of one prompt.

    >>> request = Request(group=3, task=Task("a", "1+1="), prompt_ids=(5, 6), n=8, seed=17)
    >>> request.n
    8
    """

    group: int
    """Which group the rollouts belong to: an integer from the sampler, never the prompt's text."""
    task: Task
    prompt_ids: tuple[int, ...]
    """What the generator sees."""
    n: int
    seed: int
    """Rollout i of this request is drawn with seed + i where the generator seeds each rollout."""
    loss_prompt_ids: tuple[int, ...] | None = None
    """What the loss conditions on; None: what the generator sees."""
    role: Role = "policy"
    hint: str = ""
    level: int = 0
    """Of the hint, from 1 (the weakest) on; 0: none."""
    given: str | None = None
    """The answer itself, which is then not generated."""
    limit: int | None = None
    """Tokens of each of these rollouts, where that is less than the sampling allows."""
    known: int = 0
    """So many tokens of the prompt were computed for this answer by an earlier call."""

    def max_new_tokens(self, sampling: Sampling) -> int:
        """How long an answer to this request may be."""
        return sampling.max_new_tokens if self.limit is None else min(self.limit, sampling.max_new_tokens)

    def rollout(
        self,
        token_ids: Sequence[int],
        behavior_logp: Sequence[float],
        *,
        finish_reason: FinishReason,
        version: int | Spans,
        text: str,
    ) -> Rollout:
        """An answer to this request; `version` wrote all of it, or each span was written by another."""
        first, *later = ((0, version),) if isinstance(version, int) else version
        return Rollout(
            task=self.task,
            group=self.group,
            prompt_ids=self.prompt_ids if self.loss_prompt_ids is None else self.loss_prompt_ids,
            sampled_prompt_ids=self.prompt_ids,
            token_ids=tuple(token_ids),
            behavior_logp=tuple(behavior_logp),
            finish_reason=finish_reason,
            version=first[1],
            later_versions=tuple(later),
            text=text,
            role=self.role,
            hint=self.hint,
            level=self.level,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward may return instead of a number.

    >>> Score(0.5, parts={"compiles": 1.0, "tests": 0.5}).value
    0.5
    """

    value: float | None
    """What counts; None: the reward cannot judge this."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Figures of its own, logged as `reward/<name>/<part>`; they are not added to the value."""
    unparsable: bool = False
    """No answer was found in the text. It is counted as such, and `value` holds all the same."""
    note: str = ""
    """A word for those who read `samples.jsonl`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of asking one reward about one rollout.

    >>> Verdict(None, "timeout", note="took longer than 2 s").failed
    True
    """

    value: float | None
    ending: Ending
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    """Of the reward, or where and how it failed."""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the reward is to blame, and not the answer."""
        return self.ending in FAILED


@dataclass(slots=True)
class Rollout:
    """One sampled answer. Token ids stay as the generator returned them; text is only for rewards and readers.

    >>> r = Rollout(Task("a", "1+1=", "2"), group=0, prompt_ids=(5, 6), sampled_prompt_ids=(5, 6),
    ...             token_ids=(7, 1), behavior_logp=(-0.1, -0.2), finish_reason="stop", version=0, text="2")
    >>> len(r.token_ids) == len(r.behavior_logp), r.truncated
    (True, False)
    """

    task: Task
    group: int
    prompt_ids: tuple[int, ...]
    """What the loss conditions on."""
    sampled_prompt_ids: tuple[int, ...]
    """What the generator saw: longer than `prompt_ids` when a hint was shown."""
    token_ids: tuple[int, ...]
    """The completion, end token included where the generator produced one."""
    behavior_logp: tuple[float, ...]
    """Natural-log probability of each token under the distribution it was sampled from (temperature applied)."""
    finish_reason: FinishReason
    version: int
    """The policy version (optimizer-step count at the last weight sync) that wrote the tokens."""
    later_versions: Spans = ()
    """Spans that later versions wrote: the weights changed while the answer was being written."""
    text: str = ""
    role: Role = "policy"
    hint: str = ""
    """What the generator saw beside the problem."""
    level: int = 0
    """Of the hint, as in `Request`."""
    inclusion: float = 1.0
    """With what probability it came to be trained; it counts 1 / inclusion times. 0: it is not trained, and counts in
    the group's statistics alone."""
    reward: float | None = None
    """Weighted sum of the parts; None until scored, or where no reward could judge."""
    reward_parts: dict[str, float | None] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """What each part came from."""
    length_reward: float = 0.0
    """What the algorithm adds to the reward for the answer's length; not part of what counts as solved."""
    interrupted: bool = False
    """Whether the run ended the model's thinking and asked for the answer; its own tokens have no log-prob."""
    turns: tuple[Turn, ...] = ()
    """Who wrote what, in order, where a rollout function led; a tool's tokens have no log-prob."""

    @property
    def num_written(self) -> int:
        """Tokens that the policy wrote: those with a log-prob, of which the others have none."""
        if not self.turns and not self.interrupted:
            return len(self.token_ids)
        return sum(not math.isnan(logp) for logp in self.behavior_logp)

    @property
    def versions(self) -> Spans:
        """Which policy version wrote which tokens."""
        return ((0, self.version), *self.later_versions)

    @property
    def off_policy(self) -> bool:
        """Whether the loss conditions on less than the writer knew, or the writer was not the policy."""
        return self.role == "expert" or self.prompt_ids != self.sampled_prompt_ids

    @property
    def truncated(self) -> bool:
        """Whether the answer ran into the length limit, or would have: it repeated itself."""
        return self.finish_reason in ("length", "repetition")

    @property
    def passed(self) -> bool | None:
        """Whether the recipe's first reward gave at least 1: what counts as solved; None where it could not judge."""
        first = next(iter(self.reward_parts.values()), None)
        return None if first is None else first >= 1.0


@dataclass(slots=True)
class Group:
    """All rollouts of one prompt in one step.

    >>> group = Group(id=3, task=Task("a", "1+1="), rollouts=[], prompt_ids=(5, 6), seed=17)
    >>> group.rewards, group.request(8).seed
    ([], 17)
    """

    id: int
    task: Task
    rollouts: list[Rollout]
    greedy_reward: float = math.nan
    """Reward of the greedy answer, where the algorithm asks for one; NaN where it could not be judged."""
    prompt_ids: tuple[int, ...] = ()
    """Of the problem alone."""
    seed: int = 0
    """Rollout i of the group is drawn with seed + i, in however many requests it was asked for."""
    begun: int = 0
    """The step in which it was begun: earlier than the one that trains it where rollouts are made ahead."""
    version: int = 0
    """Of the policy when it was begun."""
    left_out: list[Rollout] = field(default_factory=list)
    """Rollouts that an explorer has taken out: generated, and neither trained nor in the group's statistics."""

    def request(self, n: int) -> Request:
        """Ask for n more rollouts of the problem as it stands."""
        return Request(self.id, self.task, self.prompt_ids, n, self.seed + len(self.rollouts))

    @property
    def by_policy(self) -> list[Rollout]:
        """What the policy wrote without help, in the group or left out: how well it does."""
        return [rollout for rollout in (*self.rollouts, *self.left_out) if rollout.role == "policy"]

    @property
    def rewards(self) -> list[float | None]:
        """Rewards [G]; None where a rollout could not be judged."""
        return [rollout.reward for rollout in self.rollouts]

    @property
    def has_spread(self) -> bool:
        """Whether two judged rewards differ: compared exactly, where a float standard deviation would see noise."""
        return len({reward for reward in self.rewards if reward is not None}) > 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a curriculum learns about one group: the task and what its rollouts scored.

    >>> Outcome(key="a", rewards=(1.0, 0.0), step=4).mean
    0.5
    """

    key: str
    rewards: tuple[float | None, ...]
    step: int
    passed: tuple[bool | None, ...] = ()
    """`Rollout.passed` of each."""
    hinted: tuple[tuple[int, bool | None], ...] = ()
    """(level, passed) of each rollout that saw a hint; these are not in `rewards`."""
    measured: bool = False
    """Whether the curriculum asked for it (`wants_measured`) and nothing is trained on it."""

    @property
    def mean(self) -> float | None:
        """Mean of the rewards that could be judged; None where there is none."""
        judged = [reward for reward in self.rewards if reward is not None]
        return sum(judged) / len(judged) if judged else None


@dataclass(frozen=True, slots=True)
class Micro:
    """One forward pass: B rows of T positions, several documents packed in a row.

    Position t predicts the token at t + 1, so every `_BT` tensor below `position_BT` speaks of the token that follows.

    >>> import torch
    >>> from rlpost.document import Document
    >>> from rlpost.packing import Packer
    >>> packer = Packer(micro_tokens=8, row_tokens=8, device=torch.device("cpu"))
    >>> [micro] = packer.micros([Document(prompt_ids=(5, 6), token_ids=(7, 1), behavior_logp=(-0.1, -0.2))])
    >>> micro.mask_BT.tolist()                       # prompt 5 6, answer 7 1: two trained tokens
    [[False, True, True, False]]
    """

    tokens_BT: Tensor
    position_BT: Tensor
    """Restarts at 0 with every document; this is what keeps documents apart in attention."""
    target_BT: Tensor
    mask_BT: Tensor
    """True where the target is trained."""
    behavior_logp_BT: Tensor
    """0 wherever `mask_BT` is False, and always finite."""
    adv_BT: Tensor
    document_BT: Tensor
    """Which document of the micro-batch a position belongs to; -1 where it belongs to none."""
    weight_BT: Tensor
    """What a trained token counts in the loss of the optimizer step (`aggregation.py`); 0 elsewhere."""
    imitation_weight_BT: Tensor
    """The same for imitation of correct answers; 0 outside of them."""
    version_BT: Tensor
    """The policy version that wrote the target."""
    off_policy_BT: Tensor
    """True where the target was written under another prompt, or by somebody else."""
    prefix_BT: Tensor
    """Which shared prompt a position belongs to or may look back to; -1 where there is none."""
    shares_prompts: bool
    """Whether any documents share a prompt: attention then follows `prefix_BT` and `document_BT`, not positions."""
    has_off_policy: bool
    """Whether `off_policy_BT` is True anywhere."""
    num_trained: int
    """Positions where `mask_BT` is True, counted before the tensors went to a device."""
    num_tokens: int
    """Tokens of its documents, each with a prompt of its own; no padding."""
    num_positions: int
    """The same with one copy of a prompt that several share."""
    num_pairs: int
    """Of those positions, one and another that it may look at."""
    scores: Mapping[str, Tensor]
    """What earlier forward passes said of each trained token `[B, T]`: `prox_logp`, `ref_logp`, `value`, ..."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One optimizer step of one rank: equally many micro-batches on every rank.

    >>> Batch(micros=(), step_tokens=128).step_tokens
    128
    """

    micros: tuple[Micro, ...]
    step_tokens: int
    """Trained tokens of the whole optimizer step, over all ranks and micro-batches; those that sampling left out are
    in the weights' denominator and not here."""
    cells: tuple[int, ...] = ()
    """Of each micro-batch: it holds prompts of this cell alone. One cell, unless the gradient noise is measured."""
    prompts: tuple[int, ...] = ()
    """How many prompts each cell has, over all ranks."""
