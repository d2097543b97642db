"""Killed at random instants, a run ends as one that nobody killed; `python -m tests.bench.torture` does it longer."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("ranks", "kills"), [(1, 3), (2, 2)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path, ranks, kills):
    """In a process of its own: runs are forked from it, and a process group of this one would go with them."""
    command = [sys.executable, "-m", "tests.bench.torture", "--kills", str(kills), "--ranks", str(ranks)]
    command += ["--steps", "5", "--out", str(tmp_path)]
    joined = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {key: value for key, value in os.environ.items() if key not in joined}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=said, stderr=said, start_new_session=True)
        try:
            code = process.wait(800)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert code == 0, (tmp_path / "said").read_text()[-3000:]
    found = json.loads((tmp_path / "torture.json").read_text())[str(ranks)]
    assert found["kills"] == kills
    assert found["differences"] == []
    assert (found["repeated_prompts"], found["corrupt_loads"]) == (0, 0)
    assert max(map(int, found["lost_steps"])) <= 1  # beside the one in flight: its checkpoint was still being written
