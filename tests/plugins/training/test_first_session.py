"""The first experience adapts all blocks, later ones only the last blocks."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from treelora_avalanche.adapters import lora_layers
from treelora_avalanche.plugins import FirstSessionPlugin, OGDPlugin, RouterPlugin
from treelora_avalanche.strategies import (
    OGD,
    EWCLoRA,
    GEMLoRA,
    InfLoRA,
    L2Anchor,
    OLoRA,
    SeqLoRA,
    TaSL,
    TreeLoRAStrategy,
)

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

STRATEGIES = {
    "SeqLoRA": SeqLoRA,
    "TreeLoRA": partial(TreeLoRAStrategy, head="task_adaptive"),
    "TreeLoRA, last": partial(TreeLoRAStrategy, inference="last"),
    "EWC": EWCLoRA,
    "GEM": GEMLoRA,
    "L2Anchor": L2Anchor,
}


def make(kind, model, *plugins, **kwargs):
    """A strategy with LoRA in all blocks, with momentum: a step goes on without a gradient."""
    torch.manual_seed(1)
    defaults = {
        "layers": "all",
        "rank": 2,
        "optimizer": partial(torch.optim.Adam, lr=0.01),
        "train_mb_size": 5,
        "train_epochs": 2,
        "evaluator": EvaluationPlugin(loggers=[]),
    }
    strategy = STRATEGIES[kind](model, plugins=list(plugins), **{**defaults, **kwargs})
    torch.manual_seed(2)
    return strategy


def factors(strategy):
    """The active adapter by block."""
    weights: dict[int, list[torch.Tensor]] = {}
    for name, layer in lora_layers(strategy.model).items():
        block = next(int(part) for part in name.split(".") if part.isdigit())
        active = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        weights.setdefault(block, []).extend(weight.detach().clone() for weight in active)
    return weights


def equal(first, second):
    return all(map(torch.equal, first, second))


def all_weights(strategy):
    return [p.detach().clone() for p in strategy.model.module.parameters()]


@pytest.mark.parametrize("kind", STRATEGIES)
def test_lower_blocks_change_in_the_first_experience_alone(kind, tiny_vit, tiny_benchmark):
    strategy = make(kind, tiny_vit(), FirstSessionPlugin(1))
    seen = [factors(strategy)]
    for experience in tiny_benchmark.train_stream:
        strategy.train(experience)
        seen.append(factors(strategy))
    for number, (before, after) in enumerate(pairwise(seen)):
        moved = [not equal(before[block], after[block]) for block in range(3)]
        assert moved == ([True] * 3 if number == 0 else [False, False, True])


def test_the_first_experience_is_that_of_the_strategy_alone(tiny_vit, tiny_benchmark):
    results = []
    for plugins in ([], [FirstSessionPlugin(1)]):
        strategy = make("TreeLoRA", tiny_vit(), *plugins)
        strategy.train(tiny_benchmark.train_stream[0])
        results.append(all_weights(strategy))
    assert equal(*results)


def test_later_experiences_equal_training_with_lower_blocks_frozen_by_hand(
    tiny_vit, tiny_benchmark
):
    by_hand = make("SeqLoRA", tiny_vit(), cache=None)
    by_hand.train(tiny_benchmark.train_stream[0])
    for block in by_hand.model.transformer.blocks[:2]:
        block.requires_grad_(False)
    strategy = make("SeqLoRA", tiny_vit(), FirstSessionPlugin(1))
    strategy.train(tiny_benchmark.train_stream[0])
    for experience in tiny_benchmark.train_stream[1:]:
        for each in (strategy, by_hand):
            torch.manual_seed(3)
            each.train(experience)
    assert equal(all_weights(strategy), all_weights(by_hand))


@pytest.mark.parametrize("kind", ["TreeLoRA", "EWC"])
def test_it_is_the_same_bit_for_bit_with_the_frozen_blocks_cached(kind, tiny_vit, tiny_benchmark):
    results, passes = [], []
    for cache in (None, "auto"):
        strategy = make(kind, tiny_vit(), FirstSessionPlugin(1), cache=cache)
        strategy.train(tiny_benchmark.train_stream[0])
        strategy.eval(tiny_benchmark.test_stream)
        passed: list[int] = []
        strategy.model.transformer.blocks[1].register_forward_hook(
            lambda _, __, output, passed=passed: passed.append(len(output))
        )
        strategy.train(tiny_benchmark.train_stream[1:])
        strategy.eval(tiny_benchmark.test_stream)
        results.append(all_weights(strategy))
        passes.append(sum(passed))
    assert equal(*results)
    # Every sample once; one for the shape, two twice for randomness. The test sets were cached
    # before.
    assert passes[1] == 2 * (32 + 1 + 4)
    assert passes[0] >= 2 * (2 * 32 + 16)


def test_a_stream_is_continued_in_a_new_process(tiny_vit, tiny_benchmark, tmp_path):
    whole = make("TreeLoRA", tiny_vit(), FirstSessionPlugin(1))
    for experience in tiny_benchmark.train_stream[:2]:
        whole.train(experience)
    whole.save(tmp_path / "state")
    whole.train(tiny_benchmark.train_stream[2])

    continued = make("TreeLoRA", tiny_vit(), FirstSessionPlugin(1))
    continued.load(tmp_path / "state")
    assert continued.model.n_frozen == 2
    continued.train(tiny_benchmark.train_stream[2])
    assert equal(all_weights(whole), all_weights(continued))

    with pytest.raises(ValueError, match="n_blocks"):
        make("TreeLoRA", tiny_vit(), FirstSessionPlugin(2)).load(tmp_path / "state")


def test_decoder_layers_of_a_language_model_are_frozen(make_language_model, tiny_texts):
    strategy = make("TreeLoRA, last", make_language_model(), FirstSessionPlugin(1))
    seen = []
    for experience in tiny_texts.train_stream[:2]:
        strategy.train(experience)
        seen.append(factors(strategy))
    assert [equal(seen[0][block], seen[1][block]) for block in range(2)] == [True, False]
    assert strategy.model.n_frozen == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(SeqLoRA, layers="last:1"), "no block below the last 1 of 3 is adapted"),
        (partial(OLoRA, layers="all"), "freezes a whole adapter per experience"),
        (partial(InfLoRA, layers="all"), "freezes a whole adapter per experience"),
        (
            partial(TreeLoRAStrategy, layers="all", head="task_adaptive", inference="routed"),
            "TaskStartPlugin starts an experience from the whole adapter",
        ),
        (partial(OGD, layers="all"), "OGDPlugin projects steps of the whole adapter"),
    ],
)
def test_where_blocks_cannot_be_frozen(build, message, tiny_vit, tiny_benchmark):
    strategy = build(tiny_vit(), plugins=[FirstSessionPlugin(1)], train_epochs=1)
    before = all_weights(strategy)
    with pytest.raises(ValueError, match=message):
        strategy.train(tiny_benchmark.train_stream[0])
    assert equal(before, all_weights(strategy))


class OGDVariantPlugin(OGDPlugin, supports_distributed=True):
    """A subclass that says nothing about FirstSessionPlugin itself."""


class ThirdPartyPlugin(SupervisedPlugin):
    """A plugin of another package, with the reason as an attribute."""

    requires_whole_adapter = "rotates the whole adapter"


class PermissivePlugin(OGDPlugin, supports_distributed=True):
    """A subclass that works with part of the adapter."""

    requires_whole_adapter = None


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (OGDVariantPlugin(), "OGDVariantPlugin projects steps of the whole adapter"),
        (RouterPlugin(), "RouterPlugin predicts with a whole adapter per task"),
        (ThirdPartyPlugin(), "ThirdPartyPlugin rotates the whole adapter. Leave one of the two"),
    ],
)
def test_a_plugin_that_requires_the_whole_adapter_is_refused(
    plugin, message, tiny_vit, tiny_benchmark
):
    strategy = make("SeqLoRA", tiny_vit(), FirstSessionPlugin(1), plugin)
    before = all_weights(strategy)
    with pytest.raises(ValueError, match=message):
        strategy.train(tiny_benchmark.train_stream[0])
    assert equal(before, all_weights(strategy))


def test_a_subclass_may_lift_the_restriction(tiny_vit, tiny_benchmark):
    strategy = make("SeqLoRA", tiny_vit(), FirstSessionPlugin(1), PermissivePlugin(2))
    strategy.train(tiny_benchmark.train_stream[0])
    assert strategy.model.n_settled == 2


def test_an_adapter_that_is_consolidated_cannot_be_frozen(make_language_model, tiny_texts):
    strategy = TaSL(make_language_model(), plugins=[FirstSessionPlugin(1)])
    with pytest.raises(ValueError, match="TaSLPlugin consolidates the whole adapter"):
        strategy.train(tiny_texts.train_stream[0])


def test_a_trained_embedding_keeps_blocks_from_being_frozen(tiny_vit, tiny_benchmark):
    strategy = make("SeqLoRA", tiny_vit(), FirstSessionPlugin(1))
    strategy.model.transformer.patch_embed.requires_grad_(True)
    strategy.model.train()
    with pytest.raises(ValueError, match="below the blocks should be frozen, but are trained"):
        strategy.train(tiny_benchmark.train_stream[0])


def test_a_model_that_cannot_be_split(tiny_benchmark):
    from avalanche.training.supervised import Naive

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[FirstSessionPlugin()],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    with pytest.raises(ValueError, match="is a Sequential, which cannot be split at a block"):
        strategy.train(tiny_benchmark.train_stream[0])


def test_at_least_one_block_is_trained():
    with pytest.raises(ValueError, match="should be at least 1, but is 0"):
        FirstSessionPlugin(0)
