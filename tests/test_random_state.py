import random

import numpy as np
import torch

from rlpost.random_state import random_state, seed_all, set_random_state

CPU = torch.device("cpu")


def drawn():
    return random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()


def test_every_generator_goes_on_where_it_stood():
    seed_all(3)
    drawn()  # gauss and standard_normal keep a second draw in their state
    text = random_state(CPU)
    expected = drawn()
    seed_all(4)
    assert drawn() != expected
    set_random_state(text, CPU)
    assert drawn() == expected


def test_a_seed_decides_every_generator():
    seed_all(5)
    first = drawn()
    seed_all(5)
    assert drawn() == first
