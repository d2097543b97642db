"""The explorers of a run: who is asked, in what order, and what they may answer.

After each wave of generation every group is shown to the explorers, in the order of the recipe: a later one is asked
once the earlier ones have what they want of the group. When nobody asks for anything more the group is complete. Then
each explorer may say which rollouts make up the group, and after all of them which of these are trained.

An explorer is a class with `more`; whatever else it has of `Explorer` is called too. What lasts beyond a step changes
in `observe` alone, which hears of all ranks' groups: so every rank has the same state, and the checkpoint one of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from rlpost.errors import RunError
from rlpost.plugins import USER_CODE_ERRORS, bind, resolve, user_error
from rlpost.types import Group, Outcome, Request

GIVEN_TO_EXPLORERS = frozenset({"seed", "renderer", "sampling", "group_size"})
"""What an explorer may ask the run for by keyword."""
HOME = "rlpost.explore"
"""Where bare names are looked up."""


class Explorer(Protocol):
    """Decides which rollouts a group still needs. Only `more` must be there."""

    def more(self, group: Group) -> list[Request]:
        """What to ask for; [] means that the group is complete."""
        ...

    def begin(self, step: int, groups: Sequence[Group]) -> None:
        """Called before each round of `more`, with all groups of this rank's wave."""

    def choose(self, group: Group) -> None:
        """Move rollouts of a complete group from `rollouts` to `left_out`."""

    def sample(self, group: Group) -> None:
        """Set `inclusion` of the rollouts of a complete group."""

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Hear of the groups of all ranks; the only place where lasting state may change."""

    def metrics(self) -> dict[str, float]:
        """Figures of the step so far on this rank, logged as `explore/...`; called once a step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that lasts beyond a step, as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


class Explorers:
    """All explorers of a recipe, behind the same verbs."""

    def __init__(self, plugins: Sequence[Mapping[str, Any]], given: Mapping[str, Any], *, context: int) -> None:
        self.names = [str(plugin["use"]) for plugin in plugins]
        self.every = [make_explorer(plugin, given, i) for i, plugin in enumerate(plugins)]
        self.context = context
        """Tokens that prompt and answer may have together; what is given or hinted must leave room."""
        self.max_new_tokens = given["sampling"].max_new_tokens

    def requests(self, step: int, groups: Sequence[Group]) -> list[Request]:
        """What the explorers want of this rank's groups in the next wave."""
        self._call("begin", step, groups)
        return [request for group in groups for request in self._of(group)]

    def settle(self, groups: Sequence[Group]) -> None:
        """Let the explorers choose from complete groups, then sample what is trained of them."""
        for verb in ("choose", "sample"):
            for group in groups:
                self._call(verb, group)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Tell all explorers how the groups of all ranks went."""
        self._call("observe", outcomes)

    def metrics(self) -> dict[str, float]:
        """Figures of the step on this rank; equal names of two explorers are told apart by a number."""
        found: dict[str, float] = {}
        for i, figures in self._call("metrics"):
            for name, value in figures.items():
                found[name if name not in found else f"{name}_{i}"] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state of each explorer that has one, by its place in the recipe."""
        return {str(i): state for i, state in self._call("state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, by the same explorers."""
        for i, explorer in enumerate(self.every):
            if str(i) in state:
                explorer.load_state_dict(state[str(i)])

    def _of(self, group: Group) -> list[Request]:
        for i, explorer in enumerate(self.every):
            requests = self._guarded(i, lambda explorer=explorer: explorer.more(group))
            if requests:
                return [self._checked(request, group, i) for request in requests]
        return []

    def _checked(self, request: Any, group: Group, i: int) -> Request:
        where = f"explore.{i}: `{self.names[i]}` must ask for rollouts"
        if not isinstance(request, Request):
            raise RunError(f"{where} with requests, such as `group.request(8)` (got {request!r})")
        if request.group != group.id or request.n < 1:
            raise RunError(
                f"{where} of the group that it was shown, at least one (got {request.n} of group {request.group} for "
                f"group {group.id})"
            )
        room = self.context - (self.max_new_tokens if request.given is None else 0)
        if len(request.prompt_ids) > room:
            raise RunError(
                f"{where} with a prompt that leaves room for the answer (task {group.task.key} has "
                f"{len(request.prompt_ids)} tokens of {room}): raise model.context, or leave it out there"
            )
        return request

    def _call(self, verb: str, *arguments: Any) -> list[tuple[int, Any]]:
        """(place, answer) of each explorer that has the method."""
        return [
            (i, self._guarded(i, lambda explorer=explorer: getattr(explorer, verb)(*arguments)))
            for i, explorer in enumerate(self.every)
            if hasattr(explorer, verb)
        ]

    def _guarded(self, i: int, work: Any) -> Any:
        try:
            return work()
        except RunError:
            raise
        except USER_CODE_ERRORS as error:
            raise RunError(f"explore.{i}: `{self.names[i]}` raised {user_error(error)}: mend it") from error


def make_explorer(plugin: Mapping[str, Any], given: Mapping[str, Any], i: int) -> Any:
    """An explorer with its recipe parameters, handed what its signature asks for."""
    bound = bind_explorer(plugin, i)
    takes = GIVEN_TO_EXPLORERS & set(inspect.signature(bound.func).parameters)
    return bound(**{name: given[name] for name in takes})


def bind_explorer(plugin: Mapping[str, Any], i: int) -> Any:
    """The class of an explorer with its recipe parameters filled in; raises what is wrong with them."""
    use = plugin.get("use")
    takes: frozenset[str] = frozenset()
    if isinstance(use, str) and use:
        with suppress(RunError):  # `bind` says it, with the key
            takes = GIVEN_TO_EXPLORERS & set(inspect.signature(resolve(use, HOME)).parameters)
    return bind(plugin, HOME, where=f"explore.{i}", skip=0, supplied=takes)
