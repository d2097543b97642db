"""Hints where the model never succeeds: it is shown one, and learns as if it had not seen it. Guide, arXiv:2506.13923.

The family differs in what is shown, when, how much, what the answers replace, and what the loss conditions on; all of
that is a parameter here. How a guided token's ratio enters the loss is `algorithm.off_policy`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rlpost.errors import RunError
from rlpost.explore._hints import SOURCES, UNITS, HintSource, copied_frac, leaks, read_hints, with_hint
from rlpost.explore._places import keep, replace_failures
from rlpost.render import Renderer
from rlpost.types import Group, Outcome, Request, Sampling

TEMPLATE = "{prompt}\n\nHint: {hint}"
LADDERS, PLACES, PROMPTS, LEAKS = (
    ("first_success", "all"),
    ("group", "failures", "add"),
    ("plain", "hinted"),
    ("use", "skip"),
)


class Guide:
    """Ask for answers under a hint where the policy's own share of successes is at most `threshold`.

    source      `column`, `solution` (its first parts, by `levels` of `unit`s), `answer`, or `file` (`path`)
    template    how {hint} and {prompt} make the prompt; {answer} and {solution} may stand in it too
    threshold   0: where all have failed; 1: always
    n, ladder   so many answers a level, from the weakest hint on: until one succeeds, or all levels at once
    remember    begin a task's ladder at the level that last succeeded
    place       guided answers become the `group`, replace up to `k` `failures`, or are `add`ed
    prompt      the loss conditions on the `plain` prompt, with a ratio to what wrote it, or on the `hinted` one
    start_step, fade_from, fade_steps   no hint before; fewer and fewer from then on, none after so many more steps
    leaks       whether a hint that holds the answer is used
    copy_limit  an answer that repeats more of its hint than this share is left out
    """

    def __init__(  # noqa: PLR0913 -- the family's differences, each by its name
        self,
        *,
        seed: int,
        renderer: Renderer,
        sampling: Sampling,
        source: str = "column",
        levels: Sequence[float] = (),
        unit: str = "steps",
        separator: str = "\n",
        path: str = "",
        template: str = TEMPLATE,
        threshold: float = 0.0,
        n: int = 8,
        ladder: str = "first_success",
        remember: bool = False,
        place: str = "group",
        k: int = 1,
        prompt: str = "plain",
        start_step: int = 0,
        fade_from: int = 0,
        fade_steps: int = 0,
        leaks: str = "use",
        copy_limit: float = 1.0,
    ) -> None:
        _check(locals())
        written = read_hints(path) if source == "file" else None
        self.hints = HintSource(source, tuple(levels), unit, separator, written)
        self.seed, self.renderer, self.sampling = seed, renderer, sampling
        self.template, self.threshold, self.n = template, threshold, n
        self.ladder, self.remember, self.place, self.k = ladder, remember, place, k
        self.on_plain_prompt, self.skips_leaks, self.copy_limit = prompt == "plain", leaks == "skip", copy_limit
        self.start_step, self.fade_from, self.fade_steps = start_step, fade_from, fade_steps
        self.step = 0
        self.worked: dict[str, int] = {}
        """By task: the weakest level that has succeeded when it was last tried."""
        self._seen: set[tuple[int, int, str]] = set()
        """(group, level, what): hints of this step that do not fit or that leak, each once."""

    def begin(self, step: int, groups: Sequence[Group]) -> None:
        """Take note of the step."""
        self.step = step

    def more(self, group: Group) -> list[Request]:
        """The next level of the ladder, or all of them; [] where no hint is due, or is left."""
        if not self._acts(group):
            return []
        guided = [rollout for rollout in group.rollouts if rollout.level]
        if self.ladder == "first_success" and any(rollout.passed for rollout in guided):
            return []
        first = self.worked.get(group.task.key, 1) if self.remember else 1
        above = max((rollout.level for rollout in guided), default=first - 1)
        requests: list[Request] = []
        for level, hint in enumerate(self.hints.of(group.task), 1):
            if level <= above or (requests and self.ladder == "first_success"):
                continue
            request = self._request(group, level, hint, len(requests))
            requests += [request] if request is not None else []
        return requests

    def choose(self, group: Group) -> None:
        """Put guided answers where the recipe wants them; those of other levels than the last, and copies, go."""
        guided = [rollout for rollout in group.rollouts if rollout.level]
        if not guided:
            return
        last = max(rollout.level for rollout in guided)
        usable = [
            rollout
            for rollout in guided
            if (self.ladder == "all" or rollout.level == last)
            and copied_frac(rollout.hint, rollout.text) <= self.copy_limit
        ]
        own = [rollout for rollout in group.rollouts if not rollout.level]
        if self.place == "failures":
            keep(group, [*own, *usable])
            replace_failures(group, usable, self.k)
        elif not any(rollout.passed for rollout in usable):
            keep(group, own)
        else:
            keep(group, usable if self.place == "group" else [*own, *usable])

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Remember which level of a task has succeeded."""
        for outcome in outcomes:
            successes = [level for level, passed in outcome.hinted if passed]
            if successes:
                self.worked[outcome.key] = min(successes)

    def metrics(self) -> dict[str, float]:
        """`too_long`: hinted prompts that do not fit the context; `leaks`: hints that hold the answer."""
        seen, self._seen = self._seen, set()
        return {name: float(sum(what == name for _, _, what in seen)) for name in ("too_long", "leaks")}

    def state_dict(self) -> dict[str, Any]:
        """The levels that have worked."""
        return {"worked": dict(self.worked)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.worked = dict(state["worked"])

    def _acts(self, group: Group) -> bool:
        judged = [rollout.passed for rollout in group.by_policy if rollout.passed is not None]
        if not judged or sum(judged) > self.threshold * len(judged) or self.step < self.start_step:
            return False
        if not self.fade_steps or self.step < self.fade_from:
            return True
        left = 1 - (self.step - self.fade_from) / self.fade_steps
        return random.Random(f"{self.seed} {group.id}").random() < left

    def _request(self, group: Group, level: int, hint: str, asked: int) -> Request | None:
        """The answers of one level; None where the hint does not fit, or gives away what it must not."""
        if leaks(hint, group.task.answer):
            self._seen.add((group.id, level, "leaks"))
            if self.skips_leaks:
                return None
        ids = self.renderer.prompt_ids(with_hint(group.task, hint, self.template))
        if len(ids) + self.sampling.max_new_tokens > self.renderer.context:
            self._seen.add((group.id, level, "too_long"))
            return None
        return Request(
            group=group.id,
            task=group.task,
            prompt_ids=ids,
            n=self.n,
            seed=group.seed + len(group.rollouts) + asked * self.n,
            loss_prompt_ids=group.prompt_ids if self.on_plain_prompt else None,
            role="guided",
            hint=hint,
            level=level,
        )


def _check(given: dict[str, Any]) -> None:
    """What is wrong with the parameters of a guide, before anything is loaded."""
    levels, source = list(given["levels"]), given["source"]
    for name, holds, bound in (
        ("source", source in SOURCES, f"one of {', '.join(SOURCES)}"),
        ("unit", given["unit"] in UNITS, f"one of {', '.join(UNITS)}"),
        ("ladder", given["ladder"] in LADDERS, f"one of {', '.join(LADDERS)}"),
        ("place", given["place"] in PLACES, f"one of {', '.join(PLACES)}"),
        ("prompt", given["prompt"] in PROMPTS, f"one of {', '.join(PROMPTS)}"),
        ("leaks", given["leaks"] in LEAKS, f"one of {', '.join(LEAKS)}"),
        ("levels", source != "solution" or bool(levels), "given for source=solution, such as [0.25, 0.5, 0.75]"),
        ("levels", all(_is_level(level) for level in levels), "shares in (0, 1], or whole numbers below 0"),
        ("separator", given["unit"] != "steps" or bool(given["separator"]), "some text for unit=steps"),
        ("path", source != "file" or bool(given["path"]), "given for source=file: what `rlpost hints` wrote"),
        ("template", "{hint}" in given["template"] or source == "answer", "a text with {hint} in it"),
        ("threshold", 0 <= given["threshold"] <= 1, "in [0, 1]"),
        ("n", given["n"] >= 1, ">= 1"),
        ("k", given["k"] >= 1, ">= 1"),
        ("copy_limit", 0 <= given["copy_limit"] <= 1, "in [0, 1]"),
    ):
        if not holds:
            raise RunError(f"explore: guide.{name} must be {bound} (got {given[name]!r})")


def _is_level(level: Any) -> bool:
    if isinstance(level, bool) or not isinstance(level, int | float):
        return False
    return 0 < level <= 1 or (level < 0 and level == int(level))
