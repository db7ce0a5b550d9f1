"""What print(strategy) and print(strategy.tree) show."""

import pytest

from support import make, train
from treelora_avalanche.strategies import (
    L2P,
    FrozenNCM,
    HiDeLoRA,
    InContext,
    SeqLoRA,
    TreeLoRAStrategy,
)
from treelora_avalanche.strategies.base.summary import StrategySummary

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def lines_of(strategy):
    first, *middle, last = str(strategy).split("\n")
    assert (first, last) == (f"{type(strategy).__name__}(", ")")
    return dict(line.strip().split(": ", 1) for line in middle)


def test_a_lora_strategy_shows_model_adapters_and_progress(tiny_vit, tiny_benchmark):
    strategy = make(TreeLoRAStrategy, tiny_vit(), rank=3, alpha=6, lr=0.01, layers=[0, 2])
    shown = lines_of(strategy)
    trainable = 2 * 3 * (16 + 48) + 6 * 16 + 6
    total = sum(p.numel() for p in tiny_vit().parameters()) + trainable
    assert shown == {
        "model": "VisionTransformer",
        "adapters": "LoRA on 2 layers in blocks 0, 2, rank 3, alpha 6",
        "parameters": f"{trainable:,} trainable of {total:,}",
        "head": "Linear(16, 6)",
        "optimizer": "Adam, lr 0.01",
        "experiences": "0",
    }
    train(strategy, tiny_benchmark, 0, 1)
    assert lines_of(strategy)["experiences"] == "2"


@pytest.mark.parametrize(
    ("strategy_class", "options", "part", "text"),
    [
        (
            SeqLoRA,
            {"layers": "all"},
            "adapters",
            "LoRA on 3 layers in blocks 0-2, rank 10, alpha 10",
        ),
        (
            SeqLoRA,
            {"head": "task_adaptive"},
            "head",
            "Linear(16, 6), fitted by TaskAdaptiveHeadPlugin",
        ),
        (HiDeLoRA, {}, "head", "Linear(16, 6), fitted by TrainedHeadPlugin"),
        (L2P, {}, "adapters", "none"),
        (L2P, {}, "optimizer", "Adam, lr 0.03"),
    ],
)
def test_parts(tiny_vit, strategy_class, options, part, text):
    assert lines_of(make(strategy_class, tiny_vit(), **options))[part] == text


def test_an_untrained_strategy_has_no_optimizer(tiny_vit):
    shown = lines_of(FrozenNCM(tiny_vit(), evaluator=None))
    assert shown["optimizer"] == "none"
    assert shown["head"] == "Linear(16, 6), fitted by NearestMeanHeadPlugin"


@pytest.mark.parametrize("strategy_class", [SeqLoRA, InContext])
def test_a_language_model_is_named_with_its_network(make_language_model, strategy_class):
    shown = lines_of(strategy_class(make_language_model(), evaluator=None))
    assert shown["model"] == "LanguageModel(LlamaForCausalLM)"
    assert shown["head"] == "none"


def test_a_strategy_that_is_not_built_yet_is_shown_without_its_parts():
    assert "SeqLoRA object at" in repr(SeqLoRA.__new__(SeqLoRA))
    assert SeqLoRA.__repr__ is StrategySummary.__repr__


def test_the_tree_is_drawn(tiny_vit, tiny_benchmark):
    strategy = make(TreeLoRAStrategy, tiny_vit())
    assert str(strategy.tree) == "empty tree"
    train(strategy, tiny_benchmark)
    drawn = str(strategy.tree)
    assert drawn.startswith("level 0  δ ")
    assert "(3 tasks)" in drawn.split("\n")[0]
    assert sum("adapter" in line for line in drawn.split("\n")) == 3
    assert "\x1b" not in drawn
    assert not drawn.endswith("\n")
