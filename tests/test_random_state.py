import random

import numpy as np
import torch
from tiny import CPU

from rlpost import random_state


def test_what_was_drawn_since_is_drawn_again():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = random_state.take(CPU)
    drawn = draw()
    assert draw() != drawn
    random_state.put_back(state, CPU)
    assert draw() == drawn
