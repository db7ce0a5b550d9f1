"""LoRA on the layers of the MLP, with every LoRA method, on images and on texts."""

import pytest
import torch

from treelora_avalanche.adapters import find_adaptable_layers, lora_layers
from treelora_avalanche.registry import LORA, METHODS

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

GATED = ("gate_proj", "up_proj", "down_proj")


def lora_methods(kind):
    """Built-in methods of the family, which attach LoRA themselves."""
    rows = {name: METHODS.data[name] for name in METHODS.data}
    return [name for name, row in rows.items() if row.family is LORA and kind in row.models]


def train_two(name, model, benchmark, **options):
    """Returns the factors B by layer, after each of two experiences."""
    row = METHODS[name]
    torch.manual_seed(0)
    strategy = row.strategy_class()(
        model,
        **row.options,
        **options,
        rank=2,
        lr=0.01,
        train_mb_size=8,
        train_epochs=1,
        evaluator=None,
    )
    factors = []
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience)
        layers = lora_layers(strategy.model)
        factors.append({n: m.lora_B["default"].weight.detach().clone() for n, m in layers.items()})
    return factors


def check_trained(name, factors, expected):
    """Every named layer, and no other, has an adapter that both experiences trained."""
    first, second = factors
    assert [n.partition("base_model.model.")[2] for n in first] == expected
    assert all(b.abs().max() > 0 for b in first.values())
    still = [layer for layer in first if torch.equal(first[layer], second[layer])]
    if name == "RanPAC":  # adapts to the first experience alone
        assert len(still) == len(first)
        return
    # TaSL sets matrices that matter to past tasks alone back to their state before the task.
    assert len(still) < len(first) if name == "TaSL" else not still


@pytest.mark.parametrize("name", lora_methods("language"))
def test_language_model(name, make_language_model, tiny_texts):
    model = make_language_model()
    expected = [f"model.layers.{i}.mlp.{part}" for i in range(2) for part in GATED]
    factors = train_two(name, model, tiny_texts, target_modules=list(GATED))
    check_trained(name, factors, expected)


@pytest.mark.parametrize("name", lora_methods("vision"))
def test_vision_transformer(name, tiny_vit, tiny_benchmark):
    expected = [f"blocks.{i}.mlp.{part}" for i in range(3) for part in ("fc1", "fc2")]
    factors = train_two(name, tiny_vit(), tiny_benchmark, target_modules=["mlp.fc1", "mlp.fc2"])
    check_trained(name, factors, expected)


def test_name_of_a_module_stands_for_its_layers(tiny_vit, make_language_model):
    assert find_adaptable_layers(tiny_vit(), "last:1", ["mlp"]) == [
        "blocks.2.mlp.fc1",
        "blocks.2.mlp.fc2",
    ]
    model = make_language_model()
    assert find_adaptable_layers(model, "last:1", ["mlp"]) == [
        f"model.layers.1.mlp.{part}" for part in GATED
    ]
    mixed = find_adaptable_layers(model, "first:1", ["mlp", "q_proj"])
    assert mixed == [
        "model.layers.0.self_attn.q_proj",
        *(f"model.layers.0.mlp.{part}" for part in GATED),
    ]
    with pytest.raises(ValueError, match="Did you mean 'mlp'"):
        find_adaptable_layers(model, "all", ["mlpp"])
    with pytest.raises(ValueError, match="every name in `target_modules` should be one of"):
        find_adaptable_layers(model, "all", ["layers"])
