"""Killed at random instants, a run ends as one that nobody killed; `python -m tests.bench.torture` does it longer."""

import pytest

from tests.bench.torture import torture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("ranks", "kills"), [(1, 3), (2, 2)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path, ranks, kills):
    found = torture(tmp_path, kills, ranks=ranks, steps=5)
    assert found["kills"] == kills
    assert found["differences"] == []
    assert (found["repeated_prompts"], found["corrupt_loads"]) == (0, 0)
    assert max(found["lost_steps"]) <= 1  # beside the one in flight: its checkpoint was still being written
