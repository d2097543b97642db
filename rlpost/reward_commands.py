"""The options of `rlpost try-reward` and `rlpost rescore`; no heavy library is loaded before they are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpost.errors import RunError

TRY = "ask a reward about a few answers, and show what it said, where it failed, and how long it took"
RESCORE = "a run's saved rollouts through other rewards, without a model: what would have changed"
REWARD = "a name in rewards/, path/to/file.py:function, or YAML such as '{use: math_answer, where: boxed}'"


def add_reward_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The two commands and what they take."""
    command = commands.add_parser("try-reward", help=TRY, description=TRY)
    command.add_argument("reward", help=f"{REWARD}; of a file alone, every reward in it")
    command.add_argument("parameters", nargs="*", metavar="key=value", help="such as target=300")
    command.add_argument("--answers", type=Path, metavar="FILE", help="JSONL with prompt, answer and completion a line")
    command.add_argument("--run", type=Path, dest="run_folder", metavar="RUN", help="rollouts that a run has saved")
    command.add_argument("--n", type=int, default=16, help="answers at most (default: 16)")
    command.add_argument("--timeout", type=float, default=5.0, metavar="S", help="for one answer (default: 5)")
    command.set_defaults(run=try_reward)
    command = commands.add_parser("rescore", help=RESCORE, description=RESCORE)
    command.add_argument("run_folder", type=Path, metavar="RUN", help="such as runs/quickstart")
    command.add_argument("--rewards", nargs="+", required=True, metavar="REWARD", help=REWARD)
    command.add_argument("--group-rewards", nargs="+", default=[], metavar="REWARD", help="those of whole groups")
    command.add_argument("--show", type=int, default=5, help="rollouts to print whose verdict changes (default: 5)")
    command.add_argument("--out", type=Path, help="a JSONL file with every verdict, before and after")
    command.set_defaults(run=rescore)


def try_reward(options: argparse.Namespace) -> None:
    """`rlpost try-reward`."""
    from rlpost.plugins import make_importable
    from rlpost.try_reward import try_on

    make_importable(Path.cwd())
    plugins = read_plugins([options.reward])
    for text in options.parameters:
        for plugin in plugins:
            plugin.update(_parameter(text))
    try_on(plugins, answers=options.answers, run=options.run_folder, most=options.n, seconds=options.timeout)


def rescore(options: argparse.Namespace) -> None:
    """`rlpost rescore`."""
    from rlpost.plugins import make_importable
    from rlpost.rescore import rescore_run

    make_importable(Path.cwd())
    each, of_groups = read_plugins(options.rewards), read_plugins(options.group_rewards)
    rescore_run(options.run_folder, each, of_groups, show=options.show, out=options.out)


def read_plugins(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rewards from the command line.

    >>> read_plugins(["final_number", "{use: brevity, weight: 0.1}"])
    [{'use': 'final_number'}, {'use': 'brevity', 'weight': 0.1}]
    """
    found = []
    for text in texts:
        value = _yaml(text) if text.lstrip().startswith(("{", "[")) else text
        for one in value if isinstance(value, list) else [value]:
            plugin = {"use": one} if isinstance(one, str) else one
            if not isinstance(plugin, dict) or not isinstance(plugin.get("use"), str):
                raise RunError(f"a reward must be {REWARD} (got {text!r})")
            found.append(plugin)
    return found


def _parameter(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise RunError(f"a parameter must be key=value, such as target=300 (got {text!r})")
    return {key: _yaml(value)}


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{text!r} must be YAML ({str(error).splitlines()[0]})") from error
