"""Runs a function of a test file on several ranks under `torchrun`, and returns what each of them returned.

The function takes the started `World` and JSON keyword arguments, and returns JSON.
"""

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_ranks(function, *, num_ranks=2, timeout_s=270, **arguments):
    """`function`'s result on every rank, in the order of ranks; processes are stopped by their id when time is up."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"{function.__module__}:{function.__qualname__}"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={_free_port()}"]
        command += [__file__, name, json.dumps(arguments), folder]
        _run(command, timeout_s)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def _run(command, timeout_s):
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = f"not ended after {timeout_s} s"
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks, which have sessions of their own
                process.wait(60)
        output.seek(0)
        assert code == 0, f"{code}\n{output.read()[-6000:]}"


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
