"""Runs a function of a test file on several ranks (`nursery`), and returns what each of them returned.

The function takes the started `World` and JSON keyword arguments, and returns JSON.
"""

import gc
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import nursery

ROOT = Path(__file__).parent.parent


def run_ranks(function, *, num_ranks=2, timeout_s=270, **arguments):
    """`function`'s result on every rank, in the order of ranks."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        argv = ["ranks", f"{function.__module__}:{function.__qualname__}", json.dumps(arguments), folder]
        done = nursery.run_module(*argv, env=env, ranks=num_ranks, timeout_s=timeout_s)
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def _main(name, arguments, folder):
    from rlpost.world import World

    module, function = name.split(":")
    world = World().start()
    result = getattr(importlib.import_module(module), function)(world, **json.loads(arguments))
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(result))
    gc.collect()  # engines let go of their groups while those are still there
    world.barrier()
    world.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    # A hundred engines leave threads of gloo behind, which the end of the interpreter takes down in no order: now and
    # then that aborts a process whose work is done. How a run ends is tested through the command line, which exits as
    # usual.
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
