"""SD-LoRA: the forward pass is its equation, directions are frozen, magnitudes trained."""

import copy

import pytest
import torch
from torch import nn

from support import make, same, train, weights
from treelora_avalanche.adapters import LoRAFactors, load_adapter, lora_layers, save_adapter
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.strategies import SDLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

OPTIONS = {"rank": 3, "alpha": 6, "lr": 0.02, "train_epochs": 1, "target_modules": ("qkv", "fc2")}


def logits(model):
    images = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    model.eval()
    with torch.no_grad():
        return model(images)


def products(strategy):
    """B A of every layer."""
    return [(b @ a).detach().clone() for a, b in LoRAFactors(strategy.model).parameters]


def magnitudes(strategy):
    return [m.detach().clone() for m in strategy.past.magnitudes]


def test_forward_is_the_equation_worked_by_hand(tiny_vit, tiny_benchmark):
    strategy = make(SDLoRA, tiny_vit(), **OPTIONS)
    trained = []
    for task in range(3):
        train(strategy, tiny_benchmark, task)
        trained.append(products(strategy))
    by_hand = tiny_vit()
    by_hand.head.load_state_dict(
        {n.rpartition(".")[2]: p for n, p in weights(strategy).items() if ".head." in n}
    )
    names = LoRAFactors(strategy.model).names
    assert len(names) == 6
    for layer, name in enumerate(names):
        alpha = magnitudes(strategy)[layer].tolist()
        first, second, active = (of_task[layer] for of_task in trained)
        weight = by_hand.get_submodule(name.rpartition("base_model.model.")[2]).weight
        weight.data += alpha[0] * first / first.square().sum().sqrt()
        weight.data += alpha[1] * second / second.square().sum().sqrt()
        weight.data += alpha[2] * 6 / 3 * active
    torch.testing.assert_close(logits(strategy.model), logits(by_hand), rtol=1e-4, atol=1e-5)


def test_directions_are_frozen_bit_for_bit_and_magnitudes_move(tiny_vit, tiny_benchmark):
    strategy = train(make(SDLoRA, tiny_vit(), **OPTIONS), tiny_benchmark, 0, 1)
    assert all(m[-1] != 0.8 for m in magnitudes(strategy))
    before, expected = magnitudes(strategy), logits(strategy.model)
    strategy.past.fold()
    directions = [(a.clone(), b.clone()) for a, b in strategy.past.factors]
    torch.testing.assert_close(logits(strategy.model), expected, rtol=1e-4, atol=1e-5)
    folded = magnitudes(strategy)
    assert all(torch.equal(new[:1], old[:1]) for new, old in zip(folded, before, strict=True))
    train(strategy, tiny_benchmark, 2)
    for (a, b), (first, second) in zip(strategy.past.factors, directions, strict=True):
        assert torch.equal(a, first)
        assert torch.equal(b, second)
        for task in (slice(0, 3), slice(3, 6)):
            assert (b[:, task] @ a[task]).square().sum().item() == pytest.approx(1, rel=1e-4)
    for after, start in zip(magnitudes(strategy), folded, strict=True):
        assert len(after) == 3
        assert (after != start).all()


def test_stores_an_adapter_per_past_task_and_a_magnitude_per_task(tiny_vit, tiny_benchmark):
    strategy = make(SDLoRA, tiny_vit(), **{**OPTIONS, "target_modules": ["qkv"]})
    for task in range(3):
        train(strategy, tiny_benchmark, task)
        assert stored_bytes(strategy) == 4 * 3 * (task * 3 * (16 + 48) + task + 1)


def test_continues_saves_and_copies(tiny_vit, tiny_benchmark, tmp_path):
    whole = train(make(SDLoRA, tiny_vit(), **OPTIONS), tiny_benchmark, 0, 1)
    whole.save(tmp_path / "state")
    save_adapter(whole.model, tmp_path / "adapter")
    loaded = load_adapter(tiny_vit(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(whole.model), rtol=1e-4, atol=1e-5)
    model = tiny_vit()
    nn.init.normal_(model.head.weight)
    resumed = make(SDLoRA, model, seed=4, **OPTIONS)
    resumed.load(tmp_path / "state")
    twin, expected = copy.deepcopy(resumed.model), logits(resumed.model)
    assert torch.equal(logits(whole.model), expected)
    for strategy in (whole, resumed):
        train(strategy, tiny_benchmark, 2)
    assert same(weights(whole), weights(resumed))
    assert torch.equal(logits(whole.model), logits(resumed.model))
    assert torch.equal(logits(twin), expected)
    state = whole.past.state_dict()
    with pytest.raises(ValueError, match="magnitudes in the state should be"):
        resumed.past.load_state_dict({**state, "magnitudes": state["magnitudes"][:2]})
    with pytest.raises(ValueError, match="should be of 3 layers, but are of 6"):
        make(SDLoRA, tiny_vit(), rank=3).past.load_state_dict(state)


def test_text_is_generated_with_all_magnitudes(make_language_model, tiny_texts):
    strategy = make(SDLoRA, make_language_model(), rank=2, lr=0.05)
    train(strategy, tiny_texts, 0, 1)
    host = strategy.model.module
    prompt = [5, 6, 7, 8]
    first = host.generate([prompt], max_new_tokens=1)
    with torch.no_grad():
        token = int(strategy.model.eval()(torch.tensor([prompt]))[0, :, -1].argmax())
    assert first == [host.tokenizer.decode([token], skip_special_tokens=True)]
    assert all(len(layer.magnitudes) == 2 for layer in lora_layers(host).values())
