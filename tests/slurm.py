#!/usr/bin/env python3
"""A small stand-in for Slurm on one machine: `sbatch`, `srun`, `scontrol` and `scancel` that start real processes.

Called under each of these names. A job is a folder `$STANDIN/JOB` with the pids of its batch shell and of its tasks;
every "node" is this machine. What it has of Slurm: the options in the script's #SBATCH lines and before its name, a
copy of the script that runs elsewhere, signals to the batch shell alone, signals that srun hands on (SIGTERM makes it
kill its tasks), the highest exit code, `--wait`, and a job that is queued again after `scontrol requeue`, with
SLURM_RESTART_COUNT.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("STANDIN", "."))  # doctests import this file too
MAX_STARTS = 5


def options_of(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Leading `--key=value` options, and the rest."""
    found = {}
    while words and words[0].startswith("--"):
        key, _, value = words[0][2:].partition("=")
        found[key] = value
        words = words[1:]
    return found, words


def sbatch(words: list[str]) -> int:
    """Run the job here, to its end; prints `Submitted batch job ID` first."""
    given, (script, *arguments) = options_of(words)
    lines = re.findall(r"^#SBATCH (--\S+)$", Path(script).read_text(), re.MULTILINE)
    options = options_of(lines)[0] | given
    job = HOME / "7001"
    job.mkdir(parents=True)
    shutil.copy(script, job / "slurm_script")
    print(f"Submitted batch job {job.name}", flush=True)
    output = options["output"].replace("%x", options["job-name"]).replace("%j", job.name)
    nodes = options["nodes"]
    own = {"SLURM_JOB_ID": job.name, "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_JOB_NODELIST": f"here[1-{nodes}]"}
    own |= {"SLURM_JOB_NUM_NODES": nodes}
    code = 0
    for start in range(MAX_STARTS):
        restarted = {"SLURM_RESTART_COUNT": str(start)} if start else {}
        (job / "requeue").unlink(missing_ok=True)
        with open(output, "a" if options.get("open-mode") == "append" else "w") as log:
            process = subprocess.Popen(
                ["bash", str(job / "slurm_script"), *arguments],
                env=os.environ | own | restarted,
                stdout=log,
                stderr=log,
            )
            (job / "batch").write_text(str(process.pid))
            code = process.wait()
        if not ((job / "requeue").exists() and "requeue" in options):
            break
    (job / "ended").write_text(str(code))
    return code


def srun(words: list[str]) -> int:
    """One task a node, from the one that is named on; signals go to the tasks."""
    options, command = options_of(words)
    nodes, job = int(options["nodes"]), HOME / os.environ["SLURM_JOB_ID"]
    tasks = [
        subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)})
        for node in range(nodes)
    ]
    (job / ("tasks" if options["relative"] == "0" else "others")).write_text(" ".join(str(task.pid) for task in tasks))

    def hand_on(number: int, frame: object) -> None:
        for task in tasks:
            if task.poll() is None:
                task.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, hand_on)
    first_ended = None
    while any(task.poll() is None for task in tasks):
        if first_ended is None and any(task.poll() is not None for task in tasks):
            first_ended = time.monotonic()
        if first_ended is not None and time.monotonic() - first_ended > int(options.get("wait", "0")) > 0:
            hand_on(signal.SIGTERM, None)
        time.sleep(0.1)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(words: list[str]) -> int:
    """`show hostnames` and `requeue`."""
    if words[:2] == ["show", "hostnames"]:
        count = int(re.fullmatch(r"here\[1-(\d+)\]", words[2])[1])
        print("\n".join(["127.0.0.1"] * count))
    elif words[0] == "requeue":
        (HOME / words[1] / "requeue").touch()
    else:
        return 1
    return 0


def scancel(words: list[str]) -> int:
    """`--signal=NAME` to the tasks; with `--batch`, to the batch shell alone, as `--signal=B:` does."""
    options, [job] = options_of(words)
    file = HOME / job / ("batch" if "batch" in options else "tasks")
    for pid in file.read_text().split():
        os.kill(int(pid), getattr(signal, f"SIG{options['signal']}"))
    return 0


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](sys.argv[1:]))
