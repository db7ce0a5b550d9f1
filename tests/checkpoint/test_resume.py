"""Streams continued from a saved strategy equal the uninterrupted ones, bit for bit."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from avalanche.checkpointing import save_checkpoint
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from saved_streams import VARIANTS, continue_streams, fresh, make, outcome, train
from torch import nn

from support import identical
from treelora_avalanche import testing
from treelora_avalanche.adapters import AdapterBank, LoRAFactors, TrainableView, add_lora
from treelora_avalanche.checkpoint import load_strategy, save_strategy
from treelora_avalanche.metrics import AccuracyMatrix
from treelora_avalanche.plugins import (
    FiniteLossPlugin,
    RandomSelectorPlugin,
    SparseUpdatePlugin,
    TreeBuilderPlugin,
)
from treelora_avalanche.state import TENSOR_FILE, VALUE_FILE, load_state
from treelora_avalanche.strategies import TreeLoRAStrategy
from treelora_avalanche.testing.reloading import new_process
from treelora_avalanche.tree import AdapterTree

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore:Avalanche is transitioning"),
]


# The methods that are continued in a new process too, which is slow to start.
IN_NEW_PROCESS = (
    *("SeqLoRA", "lcb", "nearest", "random", "merging"),
    *("L2P", "DualPrompt", "HiDePrompt", "HiDeLoRA"),
)


class Whole(NamedTuple):
    """A stream that was trained without interruption, and saved after the second of 3 tasks."""

    folder: Path
    results: dict[str, Any]
    outcome: dict[str, Any]


@pytest.fixture(scope="module")
def wholes(tiny_benchmark, tmp_path_factory):
    """Trains a variant when a test first needs it."""

    @cache
    def of(variant):
        folder = tmp_path_factory.mktemp("whole") / "state"
        strategy = make(variant, testing.tiny_vit())
        train(strategy, tiny_benchmark, 0, 1)
        strategy.save(folder)
        return Whole(folder, train(strategy, tiny_benchmark, 2), outcome(strategy))

    return of


@pytest.mark.parametrize("variant", VARIANTS)
def test_continued_stream_equals_the_uninterrupted_one(tiny_vit, tiny_benchmark, wholes, variant):
    whole = wholes(variant)
    resumed = fresh(variant, tiny_vit)
    resumed.load(whole.folder)
    assert resumed.clock.train_exp_counter == 2
    results = train(resumed, tiny_benchmark, 2)
    assert identical(outcome(resumed), whole.outcome)
    assert whole.outcome["matrix"].shape == (3, 3)
    picks = whole.outcome["plugins"]["Picks.0"]["picks"]
    assert len(picks) == (16 if VARIANTS[variant][0] is TreeLoRAStrategy else 0)
    assert "StreamForgetting/eval_phase/test_stream" in results
    assert results == {name: whole.results[name] for name in results}


def test_three_plugins_share_the_loaded_tree_and_bank(tiny_vit, saved):
    strategy, folder = saved
    resumed = fresh("lcb", tiny_vit, train_epochs=1)
    tree, bank = resumed.tree, resumed.bank
    resumed.load(folder)
    builder, selector, update = (
        p for p in resumed.plugins if hasattr(p, "tree") or hasattr(p, "bank")
    )
    assert resumed.tree is tree is builder.tree is selector.tree
    assert resumed.bank is bank is builder.bank is update.bank
    assert tree.tasks == strategy.tree.tasks == [[0], [1]]
    assert torch.equal(bank.factors, strategy.bank.factors)


def test_a_new_process_continues_the_stream(tmp_path, wholes):
    for variant in IN_NEW_PROCESS:
        shutil.copytree(wholes(variant).folder, tmp_path / variant)
    with new_process() as other:
        other.submit(continue_streams, tmp_path, IN_NEW_PROCESS).result()
    for variant in IN_NEW_PROCESS:
        continued = load_state(tmp_path / f"{variant}-outcome")
        assert identical(continued, wholes(variant).outcome), variant


def test_avalanches_own_strategies_continue_too(tiny_benchmark, tmp_path):
    def build():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
        # Only some parameters: Avalanche adds the rest at the first experience.
        optimizer = torch.optim.Adam(model[3].parameters(), lr=0.01)
        return Naive(
            model=model,
            optimizer=optimizer,
            train_mb_size=8,
            evaluator=None,
            plugins=[FiniteLossPlugin()],
        )

    whole = build()
    whole.train(tiny_benchmark.train_stream[0])
    save_strategy(whole, tmp_path / "state")
    whole.train(tiny_benchmark.train_stream[1])
    resumed = build()
    load_strategy(resumed, tmp_path / "state")
    resumed.train(tiny_benchmark.train_stream[1])
    assert identical(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_plugins_of_a_built_in_strategy_continue(tiny_vit, tiny_benchmark, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = TrainableView(add_lora(tiny_vit()))
        tree, bank = AdapterTree(), AdapterBank()
        selector = RandomSelectorPlugin(tree, seed=3)
        return Naive(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
            train_mb_size=8,
            evaluator=EvaluationPlugin(AccuracyMatrix(), loggers=[]),
            plugins=[
                TreeBuilderPlugin(tree, bank),
                selector,
                SparseUpdatePlugin(selector, bank, 0.3),
            ],
        )

    whole, resumed = build(0), build(1)
    for experience in tiny_benchmark.train_stream[:2]:
        whole.train(experience)
    save_strategy(whole, tmp_path / "state")
    load_strategy(resumed, tmp_path / "state")
    stacks = []
    for strategy in (whole, resumed):
        load_strategy(strategy, tmp_path / "state")  # also into the original
        strategy.train(tiny_benchmark.train_stream[2])
        stacks.append(LoRAFactors(strategy.model).stack)
    assert torch.equal(*stacks)


def test_saving_before_any_training(tiny_vit, tiny_benchmark, tmp_path):
    whole = make("lcb", tiny_vit(), train_epochs=1)
    whole.save(tmp_path / "state")
    train(whole, tiny_benchmark, 0)
    resumed = fresh("lcb", tiny_vit, train_epochs=1)
    resumed.load(tmp_path / "state")
    train(resumed, tiny_benchmark, 0)
    assert identical(outcome(resumed), outcome(whole))


def test_saving_changes_nothing(tiny_vit, tiny_benchmark, tmp_path):
    def run(save):
        strategy = make("merging", tiny_vit(), train_epochs=1)
        for index in range(2):
            train(strategy, tiny_benchmark, index)
            if save:
                strategy.save(tmp_path / "state")
        return outcome(strategy)

    assert identical(run(save=True), run(save=False))


def test_frozen_weights_are_not_saved_and_nothing_is_pickled(saved):
    _, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == [VALUE_FILE, TENSOR_FILE]
    names = safetensors.torch.load_file(folder / TENSOR_FILE)
    parameters = [name for name in names if name.startswith("model/parameters/")]
    assert len(parameters) == 3 * 2 + 2
    assert all("lora_" in name or "modules_to_save" in name for name in parameters)
    document = json.loads((folder / VALUE_FILE).read_text())
    assert document["format_version"] == 1
    assert document["state"]["strategy"] == "TreeLoRAStrategy"
    assert document["state"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_avalanches_own_checkpoint_fails_and_destroys_the_old_file(tmp_path):
    # When this fails, the paragraph on `save_checkpoint` in Resumable.save can go.
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Naive(model=model, optimizer=optimizer, evaluator=None)
    file = tmp_path / "checkpoint"
    file.write_text("the checkpoint of the task before")
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(strategy, file)
    assert "the checkpoint" not in file.read_text(encoding="latin1")
