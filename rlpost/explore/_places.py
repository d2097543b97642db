"""Who makes room in a group for rollouts from elsewhere."""

from __future__ import annotations

from collections.abc import Collection

from rlpost.types import Group, Rollout


def keep(group: Group, kept: Collection[Rollout]) -> None:
    """Leave out everything of the group but `kept`."""
    chosen = {id(rollout) for rollout in kept}
    group.left_out += [rollout for rollout in group.rollouts if id(rollout) not in chosen]
    group.rollouts = [rollout for rollout in group.rollouts if id(rollout) in chosen]


def replace_failures(group: Group, candidates: Collection[Rollout], num: int) -> None:
    """Up to `num` successful candidates take the places of failures of the policy; the other candidates go.

    Candidates are in the group already. Where there are fewer failures than candidates, so many take a place.
    """
    failed = [rollout for rollout in group.rollouts if rollout.role == "policy" and not rollout.passed]
    coming = [rollout for rollout in candidates if rollout.passed][: min(num, len(failed))]
    leaving = failed[len(failed) - len(coming) :]
    gone = {id(rollout) for rollout in (*leaving, *candidates)} - {id(rollout) for rollout in coming}
    keep(group, [rollout for rollout in group.rollouts if id(rollout) not in gone])
