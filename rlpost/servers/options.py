"""`rlpost serve`: generator servers for a recipe, on this machine, until it is asked to end."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
from pathlib import Path

from rlpost.errors import RunError

KEY = "RLPOST_SERVER_KEY"


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`rlpost serve` and its options."""
    what = "vLLM servers for `generator.kind=remote_vllm`, which runs with these `generator.servers.urls` sample from"
    command = commands.add_parser("serve", help=what, description=what)
    command.add_argument("recipe", help="a YAML file: the one that trains")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as generator.servers.replicas=4")
    command.set_defaults(run=serve)


def serve(options: argparse.Namespace) -> None:
    """Start the servers and look after them."""
    from rlpost.check import load_and_check

    os.environ.setdefault("LOCAL_WORLD_SIZE", "0")  # no rank trains here
    own = ["generator.kind=remote_vllm", "generator.servers.urls=[]"]
    recipe = load_and_check(options.recipe, [*options.overrides, *own])
    from rlpost.model_source import context_length, model_folder
    from rlpost.servers.command import make_spec
    from rlpost.servers.start import gpus_here
    from rlpost.servers.supervisor import Supervisor
    from rlpost.world import World

    world = World()
    model = model_folder(recipe, world)
    node = os.environ.get("SLURM_PROCID", socket.gethostname())
    folder = (Path(recipe.run_dir) / str(recipe.name) / "servers" / f"node-{node}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    spec = make_spec(recipe, model, context_length(recipe.model, model), folder, gpus=gpus_here(world))
    said = _share_key(folder)
    for server in spec["servers"]:
        print(f"server: {server['url']}")
    print(f"{said}logs: {folder}", flush=True)
    if Supervisor(spec).run():
        raise RunError(f"generator.servers: no server stays: see the logs in {folder}")


def _share_key(folder: Path) -> str:
    """See that there is a key; one that is made here is in a file that only this user can read."""
    if os.environ.get(KEY):
        return ""
    file = folder / "key"
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(key := secrets.token_urlsafe(24))
    os.environ[KEY] = key
    return f"key: export {KEY}=$(cat {json.dumps(str(file))})\n"
