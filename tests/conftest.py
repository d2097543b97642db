import os

import pytest
import torch

from rlpost.__main__ import quiet

quiet()  # as in a process of its own: libraries read this when they are imported, which here is long before `main`
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count()
    for mark, needed in (("gpu", 1), ("multigpu", 2)):
        skip = pytest.mark.skip(reason=f"needs {needed} GPU{'s' * (needed > 1)} (found {gpus})")
        for item in items:
            if gpus < needed and item.get_closest_marker(mark):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def single_rank():
    """This process as the only rank, with a process group, for DeepSpeed."""
    from rlpost.world import World

    before = dict(os.environ)
    world = World().start()
    yield world
    world.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A user's folder in which the run `first` has ended."""
    from lab import make_lab, train

    folder = make_lab(tmp_path_factory.mktemp("lab"))
    train(folder, "first")
    return folder
