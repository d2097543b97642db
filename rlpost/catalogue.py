"""The algorithms and their pieces as text: `rlpost algorithms`, and one of them as a section to paste into a recipe."""

from __future__ import annotations

import textwrap

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlpost.algorithm_recipe import Algorithm
from rlpost.algorithms import (
    ADVANTAGES,
    ALGORITHMS,
    CORRECTIONS,
    LENGTHS,
    LOSSES,
    OFF_POLICY_LOSSES,
    Bundle,
    Piece,
    with_bundle,
)
from rlpost.metrics import METRICS

DEFAULT_CURRICULUM = "uniform"
WIDTH = 100
"""Characters of a line of what is to be pasted."""
PIECES = (
    ("algorithm.advantage.use", "rewards -> advantages; or the path of a function of a group's rewards", ADVANTAGES),
    ("algorithm.loss.use", "or the path of a function with the signature of losses.ppo_clip", LOSSES),
    (
        "algorithm.off_policy.loss.use",
        "of tokens written under a hint, or by an expert; or a name or path as above",
        {name: piece for name, piece in OFF_POLICY_LOSSES.items() if piece not in LOSSES.values()},
    ),
    ("algorithm.mismatch.weights", "a list of these, with algorithm.mismatch.mode=decoupled", CORRECTIONS),
    ("algorithm.length.use", "a reward for an answer's length", LENGTHS),
)
"""Recipe key, what may stand there, and the table."""


def print_catalogue(console: Console | None = None) -> None:
    """All bundles, and below them the pieces that they are made of, as wide as the terminal or the given console."""
    console = console or Console()
    bundles = _table("algorithm.name", "what it does", "made of")
    for name, bundle in ALGORITHMS.items():
        bundles.add_row(Text(name), Text(f"{bundle.summary}\n{bundle.paper}"), Text("\n".join(ingredients(bundle))))
    console.print(bundles)
    for key, what, pieces in PIECES:
        console.print(Text(f"\n{key}: {what}"))
        table = _table("name", "what it is", "parameters")
        for name, piece in pieces.items():
            table.add_row(Text(name), Text(piece.summary), Text(_parameters(piece)))
        console.print(table)
    console.print(Text("\nrlpost algorithms NAME prints one of the first table as a section for a recipe."))


def print_metrics(console: Console | None = None) -> None:
    """Every figure that a run can log: `*` stands for the part of a name that only the run knows."""
    console = console or Console()
    table = _table("figure", "unit", "over ranks", "what it says")
    for name, info in METRICS.items():
        says = f"{info.meaning}\n{info.source}" if info.source else info.meaning
        table.add_row(Text(name), Text(info.unit), Text(info.reduction), Text(says))
    console.print(table)


def section(name: str) -> str:
    """One bundle as YAML that can be pasted into a recipe, with what is to be said of it in comments above.

    >>> print(section("dr_grpo").partition("algorithm:")[2])
    <BLANKLINE>
      name: dr_grpo
      advantage: {use: dr_grpo}
      loss: {use: ppo_clip, clip_low: 0.2, clip_high: 0.2}
      aggregation: seq_sum_const
      groups: {without_spread: keep}
    <BLANKLINE>
    """
    bundle = ALGORITHMS[name]
    said = [f"{name}: {bundle.summary}", f"paper: {bundle.paper}", f"conflicts: {bundle.conflicts}"]
    if bundle.curriculum != DEFAULT_CURRICULUM:
        said.append(f"curriculum: {bundle.curriculum}, where the recipe names none")
    comments = [f"# {line}" for text in said for line in textwrap.wrap(text, WIDTH - 2, subsequent_indent="  ")]
    tree: dict[str, object] = {"algorithm": {"name": name, **with_bundle({"name": name})}}
    if bundle.explore:
        tree["explore"] = [dict(one) for one in bundle.explore]
    return "\n".join([*comments, yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=WIDTH)])


def ingredients(bundle: Bundle) -> list[str]:
    """What a bundle is made of, a line each; what is off is left out.

    >>> ingredients(ALGORITHMS["reinforce_pp"])[2:]
    ['aggregation token_mean', 'KL 0.001, k1 in the reward', 'groups keep']
    """
    chosen = bundle.section
    lines = [
        f"advantage {chosen['advantage']['use']}",
        f"loss {chosen['loss']['use']}",
        f"aggregation {chosen.get('aggregation', Algorithm.aggregation)}",
    ]
    if kl := chosen.get("kl"):
        lines.append(f"KL {kl['coef']}, {kl['estimator']} in the {kl['place']}")
    lines.append(f"groups {chosen['groups']['without_spread']}")
    if length := chosen.get("length"):
        lines.append(f"length {length['use']}")
    lines += [f"explore {one['use']}" for one in bundle.explore]
    if off_policy := chosen.get("off_policy", {}).get("loss"):
        lines.append(f"off-policy loss {off_policy['use']}")
    lines += [f"mismatch {weight['use']}" for weight in chosen.get("mismatch", {}).get("weights", [])]
    return lines


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _parameters(piece: Piece) -> str:
    """`name=default`, as a recipe would have them."""
    return ", ".join(
        name if default is None else f"{name}={str(default).lower()}" for name, default in piece.parameters.items()
    )
