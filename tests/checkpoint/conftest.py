"""A saved strategy for the tests of checkpoint/."""

import pytest
from saved_streams import make, train


@pytest.fixture
def saved(tiny_vit, tiny_benchmark, tmp_path):
    """A TreeLoRA strategy of two tasks, and the folder where it was saved."""
    strategy = make("lcb", tiny_vit(), train_epochs=1)
    train(strategy, tiny_benchmark, 0, 1)
    strategy.save(tmp_path / "state")
    return strategy, tmp_path / "state"
