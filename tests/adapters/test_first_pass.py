"""Avalanche's own strategies refuse adapters that no gradient reaches, before the first step."""

import copy
import re

import pytest
import timm
import torch
from avalanche.training import EWC, LwF, Naive, Replay
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD

from support import identical, make, weights
from treelora_avalanche.adapters import TrainableView, add_lora, graph, load_adapter, save_adapter
from treelora_avalanche.adapters.first_pass import skip_check
from treelora_avalanche.models import TokenCrossEntropy
from treelora_avalanche.models.views.precision import train_in_float32
from treelora_avalanche.models.views.split_vit import SplitViT
from treelora_avalanche.state import random_state
from treelora_avalanche.strategies import SeqLoRA

KINDS = {
    "Naive": (Naive, {}),
    "EWC": (EWC, {"ewc_lambda": 1}),
    "LwF": (LwF, {"alpha": 1, "temperature": 2}),
    "Replay": (Replay, {"mem_size": 4}),
}
WRAPPERS = {"add_lora": lambda model: model, "TrainableView": TrainableView, "SplitViT": SplitViT}
OUTSIDE = "`model` should pass a gradient to every adapted layer, but `blocks.0.attn.qkv`"


def avalanches(kind, model, criterion=None, **options):
    strategy_class, own = KINDS[kind]
    trained = [p for p in model.parameters() if p.requires_grad]
    return strategy_class(
        model=model,
        optimizer=SGD(trained, lr=0.1),
        criterion=criterion or nn.CrossEntropyLoss(),
        train_mb_size=8,
        evaluator=None,
        **own,
        **options,
    )


def users_lora(model):
    config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    return get_peft_model(model, config)


def forward_hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_merged_adapter_is_refused(kind, wrapper, tiny_vit, tiny_benchmark):
    adapted = add_lora(tiny_vit(), layers="all")
    adapted.merge_adapter()
    strategy = avalanches(kind, WRAPPERS[wrapper](adapted))
    before = weights(strategy)
    for _ in range(2):  # a refused model is refused again
        with pytest.raises(ValueError, match=re.escape(OUTSIDE) + ".*unmerge_adapter"):
            strategy.train(tiny_benchmark.train_stream[0])
    assert identical(before, weights(strategy))
    adapted.unmerge_adapter()
    strategy.train(tiny_benchmark.train_stream[0])
    assert all(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)


def beit(**options):
    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1}
    return timm.create_model("beit_base_patch16_224", num_classes=6, **small, **options)


class Enlarged(nn.Module):
    """Reads images of 8 x 8 pixels as those of 32 x 32."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, x):
        return self.vit(nn.functional.interpolate(x, 32))


def test_weights_read_without_their_layer_are_refused(tiny_benchmark, tmp_path):
    model = TrainableView(users_lora(Enlarged(beit())))
    message = r"`vit.blocks.0.attn.qkv`.*get none.*set `qkv_bias_separate = True`"
    with pytest.raises(ValueError, match=message):
        avalanches("Naive", model).train(tiny_benchmark.train_stream[0])
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(Enlarged(beit()), tmp_path / "adapter")
    avalanches("Naive", loaded).train(tiny_benchmark.train_stream[0])
    assert all(p.any() for name, p in loaded.named_parameters() if "lora_B" in name)


def test_frozen_classifier_is_refused(tiny_vit, tiny_benchmark):
    adapted = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(ValueError, match=r"come from `head` \(Linear\), which is frozen"):
        avalanches("Naive", TrainableView(adapted)).train(tiny_benchmark.train_stream[0])


def test_features_are_trained_without_a_classifier(tiny_vit, tiny_benchmark):
    model = TrainableView(add_lora(tiny_vit(num_classes=0), layers="all"))
    avalanches("Naive", model, lambda features, _: features.square().mean()).train(
        tiny_benchmark.train_stream[0]
    )


@pytest.mark.parametrize("wrapper", ["add_lora", "TrainableView"])
def test_merged_adapter_of_a_language_model_is_refused(wrapper, make_language_model, tiny_texts):
    model = add_lora(make_language_model())
    model.network.merge_adapter()
    strategy = avalanches("Naive", WRAPPERS[wrapper](model), TokenCrossEntropy())
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn.q_proj`.*unmerge_adapter"):
        strategy.train(tiny_texts.train_stream[0])
    model.network.unmerge_adapter()
    strategy.train(tiny_texts.train_stream[0])


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_bit_for_bit_without_the_check(kind, tiny_vit, tiny_benchmark):
    def run(model):
        torch.manual_seed(3)
        strategy = avalanches(kind, model, train_epochs=2)
        for experience in tiny_benchmark.train_stream[:2]:
            strategy.train(experience)
        return [weights(strategy), random_state()]

    vit = tiny_vit()
    vit.pos_drop.p = vit.blocks[1].attn.proj_drop.p = 0.3
    checked = TrainableView(add_lora(vit))
    unchecked = copy.deepcopy(checked)
    skip_check(unchecked)
    assert identical(run(checked), run(unchecked))
    assert not forward_hooks(checked)  # it runs once


def test_evaluation_and_other_models_are_not_checked(tiny_vit, tiny_benchmark):
    adapted = add_lora(tiny_vit())
    adapted.merge_adapter()
    avalanches("Naive", adapted).eval(tiny_benchmark.test_stream)
    assert forward_hooks(adapted) == 1
    plain = TrainableView(tiny_vit())
    avalanches("Naive", plain).train(tiny_benchmark.train_stream[0])
    assert not forward_hooks(plain)


def test_strategies_that_check_themselves_check_once(tiny_vit):
    assert not forward_hooks(make(SeqLoRA, tiny_vit()).model)


def test_compiled_model_is_checked_until_it_passes(tiny_vit, tiny_benchmark, monkeypatch):
    model = TrainableView(add_lora(tiny_vit(depth=1), layers="all"))
    model.module.merge_adapter()
    model.compile(backend="eager")
    checks = []
    check = graph.check_gradients
    monkeypatch.setattr(graph, "check_gradients", lambda *x: checks.append(1) or check(*x))
    strategy = avalanches("Naive", model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        strategy.train(tiny_benchmark.train_stream[0])
    model.module.unmerge_adapter()
    strategy.train(tiny_benchmark.train_stream[0])
    assert len(checks) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_with_what_makes_it_work(dtype, tiny_vit, tiny_benchmark):
    model = add_lora(tiny_vit().to(dtype), layers="all")
    with pytest.raises(ValueError, match="should take images in float32, but its weights are"):
        avalanches("Naive", model).train(tiny_benchmark.train_stream[0])
    train_in_float32(model)
    before = weights_of_adapter(model)
    avalanches("Naive", model).train(tiny_benchmark.train_stream[0])
    assert all(not torch.equal(before[n], p) for n, p in weights_of_adapter(model).items())


def weights_of_adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
