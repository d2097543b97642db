"""The command line: `rlpost COMMAND RECIPE key=value ...`, or `torchrun ... -m rlpost COMMAND RECIPE key=value ...`."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.errors import Preempted, RecipeError, RunError, without_secrets
from rlpost.evaluation.audit_command import add_audit
from rlpost.evaluation.options import add_eval, asked_of, out_of
from rlpost.preempt import PREEMPTED, preemption
from rlpost.report.command import add_commands
from rlpost.reward_commands import add_reward_commands
from rlpost.scaling.options import add_scaling
from rlpost.servers.options import add_serve
from rlpost.simulate.options import add_simulations
from rlpost.synth.options import add_synth
from rlpost.task_options import add_tasks

if TYPE_CHECKING:
    from rlpost.recipe import Recipe
    from rlpost.types import Task
    from rlpost.world import World

BAD_RECIPE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes, beside PREEMPTED."""
GO_ON = "go on from the last checkpoint with resume=auto"
DIFFICULTY = "how difficult the training tasks are, by sampling; a file that curricula read"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a problem that a person can solve is one message and an exit code, not a stack."""
    quiet()
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except RecipeError as error:
        tell(error, every_rank=False)
        return BAD_RECIPE
    except Preempted as error:
        tell(error, every_rank=False, what="left")
        return PREEMPTED
    except RunError as error:
        tell(error, every_rank=True)
        return FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the files of the run"
        tell(f"there must be space left for {where} ({error}): make room; {GO_ON}", every_rank=True)
        return FAILED
    except KeyboardInterrupt:
        tell(f"interrupted; {GO_ON}", every_rank=False)
        return INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and what they take."""
    top = argparse.ArgumentParser(prog="rlpost", description="Post-train reasoning models with verifiable rewards.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, what in (
        ("train", train, "reinforcement learning, after the supervised part where the recipe has one"),
        ("sft", sft, "only the supervised part of a recipe; prints the folder of the model"),
        ("check", check, "find every problem in a recipe without loading a model, and print it resolved"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("recipe", help="a YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="such as engine.lr=1e-6")
        command.set_defaults(run=run)
        if name == "check":
            add_plan(command)
    add_eval(commands, evaluate)
    add_difficulty(commands.add_parser("difficulty", help=DIFFICULTY, description=DIFFICULTY))
    what = "write a run's newest checkpoint as an ordinary Hugging Face folder"
    command = commands.add_parser("export", help=what, description=what)
    command.add_argument("run_folder", type=Path, help="such as runs/quickstart")
    command.add_argument("--to", type=Path, help="the folder to write (default: RUN/model)")
    command.add_argument("--adapter", action="store_true", help="only the adapters of model.lora, as a folder of peft")
    command.add_argument("--checkpoint", type=Path, help="another than the newest, such as RUN/checkpoints/step-000010")
    command.set_defaults(run=export)
    add_hints(commands)
    add_audit(commands)
    add_tasks(commands)
    add_synth(commands)
    add_serve(commands)
    add_tables(commands)
    add_simulations(commands)
    add_scaling(commands)
    add_commands(commands)
    add_reward_commands(commands)
    return top


def add_hints(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rlpost hints` and its options."""
    what = "hints for the training tasks, written by a model, for `explore: [{use: guide, source: file, path: ...}]`"
    command = commands.add_parser("hints", help=what, description=what)
    command.add_argument("recipe", help="a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.path=FOLDER")
    command.add_argument("--out", type=Path, default=Path("hints.jsonl"), help="(default: hints.jsonl)")
    command.add_argument("--levels", type=int, choices=(1, 2, 3), default=3, help="hints a task, from weak to strong")
    command.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, such as http://HOST:8000/v1")
    command.add_argument("--model", help="the model's name there (default: the recipe's own model, in this process)")
    command.add_argument("--chunk", type=int, default=64, help="tasks that are asked for at once")
    command.set_defaults(run=hints)


def add_plan(command: argparse.ArgumentParser) -> None:
    """The options of `rlpost check --plan` and `--dry-run`."""
    from rlpost.devices import DEVICES

    what = "instead of the recipe, print parameters, memory, FLOPs and predicted seconds of a step"
    command.add_argument("--plan", action="store_true", help=what)
    what = "push the worst micro-batch through the real engine on this machine, without a generator or a run folder"
    command.add_argument("--dry-run", action="store_true", help=what)
    command.add_argument("--device", choices=[*DEVICES, "cpu"], help="for --plan (default: what is in this machine)")


def add_tables(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rlpost algorithms` and `rlpost metrics`."""
    what = "the table of algorithms, or one of them as a section to paste into a recipe"
    command = commands.add_parser("algorithms", help=what, description=what)
    command.add_argument("name", nargs="?", type=algorithm_name, metavar="NAME", help="such as dapo")
    command.set_defaults(run=algorithms)
    what = "every figure that a run can log: unit, how ranks are merged, meaning, source"
    commands.add_parser("metrics", help=what, description=what).set_defaults(run=metrics)


def add_difficulty(command: argparse.ArgumentParser) -> None:
    """The options of `rlpost difficulty`."""
    command.add_argument("recipe", help="a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as sampling.max_new_tokens=8")
    command.add_argument("--n", type=int, default=16, help="answers a task (default: 16)")
    command.add_argument("--out", type=Path, help="a JSONL file; what it has is kept (default: in run_dir)")
    command.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="other models than the recipe's")
    command.add_argument("--passuntil", type=int, metavar="MAX", help="try on where passes are rare, up to MAX times")
    command.add_argument("--probe", metavar="TOKEN", help="how probable this is as first token, such as </think>")
    command.set_defaults(run=difficulty)


def train(options: argparse.Namespace) -> None:
    """`rlpost train`."""
    recipe = checked(options)
    with preemption.listening():
        from rlpost.train import train as run
        from rlpost.world import World

        with_world(lambda world: run(shown(recipe, world), world), World())


def sft(options: argparse.Namespace) -> None:
    """`rlpost sft`."""
    recipe = checked(options)
    from rlpost.sft import base_model
    from rlpost.world import World

    def run(world: World) -> None:
        folder = base_model(shown(recipe, world), world)
        if world.is_main:
            print(f"model: {folder}")

    with preemption.listening():
        with_world(run, World())


def evaluate(options: argparse.Namespace) -> None:
    """`rlpost eval`."""
    from rlpost.evaluation.sets import is_recipe, recipes_of

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    how: dict[str, Any] = {"asked": asked_of(options), "limit": options.limit, "world_size": ranks}
    asked = recipes_of(options.target, options.tasks, options.overrides, **how)
    from rlpost.evaluation.model import evaluate_sets
    from rlpost.world import World

    def run(world: World) -> None:
        out = out_of(options, recipe=is_recipe(options.target))
        found = evaluate_sets(asked, world, out=out, against=options.against)
        if world.is_main:
            figures = {name: one["figures"] for name, one in found.items()}
            print(json.dumps(figures if options.tasks else figures[asked[0][0]], indent=2))

    with preemption.listening():
        with_world(run, World())


def check(options: argparse.Namespace) -> None:
    """`rlpost check`."""
    from rlpost.notes import of_recipe
    from rlpost.recipe import to_yaml
    from rlpost.tasks import load_task_sets

    recipe = checked(options)
    train_tasks, eval_tasks = load_task_sets(recipe, offline=True)
    for note in of_recipe(recipe):
        print(f"note: {note}", file=sys.stderr)
    if options.plan:
        show_plan(recipe, train_tasks, options.device)
    if options.dry_run:
        show_dry_run(recipe, train_tasks)
    if options.plan or options.dry_run:
        return
    print(to_yaml(recipe), end="")
    for name, tasks in (("tasks.train", train_tasks), ("tasks.eval", eval_tasks)):
        print(f"# {name}: {len(tasks)} problems" if tasks else f"# {name}: not read (on the hub, or not given)")
    print("# no problem found")


def show_plan(recipe: Recipe, tasks: list[Task], device: str | None) -> None:
    """`rlpost check --plan`: for as many ranks as this is started with, or WORLD_SIZE says."""
    from rlpost.devices import find_device
    from rlpost.plan import make_plan
    from rlpost.plan_report import report

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    plan = make_plan(recipe, find_device(device, recipe.model.dtype, ranks=ranks), tasks, ranks=ranks)
    print(report(plan), end="")


def show_dry_run(recipe: Recipe, tasks: list[Task]) -> None:
    """`rlpost check --dry-run`: on as many ranks as this is started with."""
    from rlpost.dry_run import dry_run, plan_of, report
    from rlpost.world import World

    def run(world: World) -> None:
        plan = plan_of(recipe, tasks, world)
        trial = dry_run(recipe, world)
        if world.is_main:
            print(report(trial, plan), end="")

    with_world(run, World())


def difficulty(options: argparse.Namespace) -> None:
    """`rlpost difficulty`."""
    recipe = checked(options)
    from rlpost.difficulty import Ask, measure, measure_each
    from rlpost.world import World

    ask = Ask(options.n, options.passuntil, options.probe)
    out = options.out or Path(recipe.run_dir) / f"{recipe.name}-difficulty.jsonl"
    if len(options.models) > 1:
        named = {"--n": ask.n, "--passuntil": ask.until, "--probe": ask.probe}
        asked = [f"{name}={value}" for name, value in named.items() if value is not None]
        command = ["difficulty", options.recipe, *options.overrides, "--out", str(out), *asked]
        sys.exit(measure_each(options.models, command, World().size))
    model = options.models[0] if options.models else None

    def run(world: World) -> None:
        measure(shown(recipe, world), world, ask, out=out, model=model)
        if world.is_main:
            print(f"difficulty: {out}")

    with_world(run, World())


def export(options: argparse.Namespace) -> None:
    """`rlpost export`."""
    from rlpost.export import export_run
    from rlpost.world import World

    asked = {"checkpoint": options.checkpoint, "to": options.to, "adapter": options.adapter}
    print(f"model: {export_run(options.run_folder, World(), **asked)}")


def hints(options: argparse.Namespace) -> None:
    """`rlpost hints`."""
    from rlpost.tasks import load_task_sets
    from rlpost.world import World
    from rlpost.write_hints import ask_endpoint, hints_of_recipe, write_hints

    options.overrides = [*options.overrides, "explore=[]"]  # which may already name the file that is to be written
    recipe = checked(options)
    how = {"levels": options.levels, "chunk": options.chunk}
    if bool(options.endpoint) != bool(options.model):
        raise RunError("--endpoint and --model belong together (got one): name the server and the model that it serves")
    if options.endpoint:
        tasks, _ = load_task_sets(recipe)
        num = write_hints(tasks, ask_endpoint(options.endpoint, options.model), options.out, **how)
    else:
        world = World()
        found: list[int] = []
        with_world(lambda world: found.append(hints_of_recipe(recipe, world, options.out, **how)), world)
        [num] = found
    print(f"hints: {options.out} ({num} tasks are new)")


def algorithms(options: argparse.Namespace) -> None:
    """`rlpost algorithms`."""
    from rlpost.catalogue import print_catalogue, section

    if options.name is None:
        print_catalogue()
    else:
        print(section(options.name), end="")


def metrics(_: argparse.Namespace) -> None:
    """`rlpost metrics`."""
    from rlpost.catalogue import print_metrics

    print_metrics()


def algorithm_name(text: str) -> str:
    """`text` where it names an algorithm."""
    from rlpost.algorithms import ALGORITHMS
    from rlpost.plugins import did_you_mean

    if text not in ALGORITHMS:
        hint = did_you_mean(text, ALGORITHMS)
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(ALGORITHMS)} (got {text!r}){hint}")
    return text


def checked(options: argparse.Namespace) -> Recipe:
    """The recipe, loaded and free of every problem that can be seen without a model."""
    from rlpost.check import load_and_check

    return load_and_check(options.recipe, options.overrides, world_size=int(os.environ.get("WORLD_SIZE", "1")))


def shown(recipe: Recipe, world: World) -> Recipe:
    """Print the resolved recipe, once, and what is to be said of it on this machine."""
    from rlpost.notes import of_machine, of_recipe
    from rlpost.recipe import to_yaml

    if world.is_main:
        print(to_yaml(recipe), flush=True)
        for note in (*of_recipe(recipe), *of_machine(recipe)):
            print(f"note: {note}", file=sys.stderr, flush=True)
    return recipe


def with_world(run: Callable[[World], object], world: World) -> None:
    """Join the ranks, run, and leave them in any case."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # DeepSpeed, whoever imports it, would guess aloud
    world.start()
    try:
        run(world)
    finally:
        world.stop()


def tell(message: object, *, every_rank: bool, what: str = "error") -> None:
    """Say what went wrong on standard error; what every rank knows is said once."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0 or every_rank:
        where = f" (rank {rank})" if size > 1 and every_rank else ""
        sys.stdout.flush()
        print(f"{what}{where}: {without_secrets(str(message))}", file=sys.stderr, flush=True)


def quiet() -> None:
    """Keep the libraries' start-up chatter out of the way of what a person should read."""
    for name, value in (
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("DS_LOG_LEVEL", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("GLOO_LOG_LEVEL", "ERROR"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
    ):
        os.environ.setdefault(name, value)
    # vLLM warns while it is imported, before it reads its own setting.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    for library in ("torch", "deepspeed", "vllm", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{library}(\..*)?")
    warnings.formatwarning = as_sentence


def as_sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of rlpost as a person should read it; those of libraries say where they come from."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    return f"warning: {message}\n" if ours else f"{filename}:{lineno}: {category.__name__}: {message}\n"


if __name__ == "__main__":
    sys.exit(main())
