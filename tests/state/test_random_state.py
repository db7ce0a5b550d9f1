"""State of the global random generators."""

import random
import tempfile

import numpy as np
import torch

from treelora_avalanche.state import load_state, random_state, save_state, set_random_state


def test_random_generators_go_back_to_where_they_were():
    def draw():
        return random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()

    draw()  # so that a second gaussian number is cached
    with tempfile.TemporaryDirectory() as folder:
        save_state(folder, random_state())
        first = draw()
        set_random_state(load_state(folder))
    assert draw() == first
