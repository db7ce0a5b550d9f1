"""Split vision transformers: equal to timm's own forward pass, with less computation."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from treelora_avalanche.adapters import TrainableView, add_lora, lora_layers
from treelora_avalanche.models.views.split_vit import (
    SplitViT,
    frozen_blocks,
    head_reads_class_token,
    trainable_view,
)

BASE = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 3,
}
KINDS = {
    "plain": {},
    "norms everywhere": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "layer scale": {"init_values": 0.3},
    "norm first": {"pre_norm": True, "final_norm": False, "fc_norm": True},
    "registers": {"reg_tokens": 2},
    "mean of the patches": {"global_pool": "avg"},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "no class token": {"class_token": False, "global_pool": "avg"},
}


def lora_vit(kind="plain", layers="last:2", make=VisionTransformer):
    """A ViT with random weights and LoRA whose B is not zero."""
    torch.manual_seed(0)
    model = make(**{**BASE, **KINDS[kind]})
    with torch.no_grad():  # as trained: initial biases and scales would hide what is left out
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model = add_lora(model, layers=layers, rank=2, alpha=2)
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
    return model


@pytest.fixture
def images():
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", ["all", "last:1", "last:2", "first:2", (1, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_timm(kind, layers, images):
    model = lora_vit(kind, layers)
    targets = torch.tensor([0, 1, 2, 0, 1])
    expected = model(images)
    nn.functional.cross_entropy(expected, targets).backward()
    truth = gradients(model)
    model.zero_grad()
    view = trainable_view(model)
    assert isinstance(view, SplitViT)
    logits = view(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    nn.functional.cross_entropy(logits, targets).backward()
    own = gradients(model)
    assert own.keys() == truth.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-4, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    blocks=st.sets(st.integers(0, 3), min_size=1),
    kind=st.sampled_from(["plain", "registers", "mean of the patches"]),
)
def test_hidden_states_stand_for_the_images(blocks, kind):
    model = lora_vit(kind, sorted(blocks))
    view = SplitViT(model)
    images = torch.randn(3, 1, 8, 8)
    assert view.n_frozen == min(blocks)
    hidden = view.frozen_output(images)
    assert torch.equal(view(hidden), view(images))
    # By timm's own blocks, one after the other.
    vit = view.transformer
    truth = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    truth = vit.blocks[: min(blocks)](truth)
    assert torch.equal(hidden, truth)


def test_the_last_block_computes_the_class_token_alone(images):
    for kind, expected in (("plain", 1), ("mean of the patches", 5)):
        view = SplitViT(lora_vit(kind)).eval()
        seen = []
        view.transformer.blocks[-1].mlp.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].shape[1])
        )
        view(images)
        assert seen == [expected]
        assert head_reads_class_token(view.transformer) == (expected == 1)


def test_frozen_blocks_have_no_gradients(images):
    view = SplitViT(lora_vit(layers="last:2"))
    asked = images.clone().requires_grad_()  # as gradient checkpointing asks embeddings to be
    assert not view.frozen_output(asked).requires_grad
    view(asked).sum().backward()
    assert asked.grad is None


def test_frozen_blocks_are_those_below_the_lowest_trainable_one():
    assert [frozen_blocks(SplitViT(lora_vit(layers=c)).transformer) for c in ("all", "last:3")] == [
        0,
        1,
    ]
    vit = VisionTransformer(**BASE)
    assert frozen_blocks(vit) is None  # the embedding is trained
    vit.requires_grad_(False)
    assert frozen_blocks(vit) == 4
    vit.head.requires_grad_()
    assert frozen_blocks(vit) == 4
    vit.blocks[2].norm1.bias.requires_grad_()
    assert frozen_blocks(vit) == 2


def test_a_trained_embedding_gets_its_gradient(images):
    model = lora_vit(layers="last:2")
    view = SplitViT(model)
    view.transformer.pos_embed.requires_grad_()
    view.train()
    assert view.n_frozen is None
    view(images).sum().backward()
    own = view.transformer.pos_embed.grad.clone()
    view.transformer.pos_embed.grad = None
    model(images).sum().backward()
    assert own.abs().sum() > 0
    torch.testing.assert_close(own, view.transformer.pos_embed.grad, rtol=1e-4, atol=1e-6)


def test_checkpointing_computes_the_same(images):
    view = SplitViT(lora_vit(layers="last:3"))
    view(images).square().sum().backward()
    truth = gradients(view)
    view.zero_grad()
    view.transformer.set_grad_checkpointing()
    view(images).square().sum().backward()
    for name, gradient in gradients(view).items():
        torch.testing.assert_close(gradient, truth[name])


def test_models_with_a_forward_pass_of_their_own_are_not_split(images):
    distilled = lora_vit(make=VisionTransformerDistilled)
    # Its blocks are run by timm's own pass, but its head reads two tokens.
    assert isinstance(trainable_view(distilled), SplitViT)
    expected = distilled(images)
    torch.testing.assert_close(trainable_view(distilled)(images), expected, rtol=1e-5, atol=1e-6)

    class Other(VisionTransformer):
        def forward_features(self, x):
            return 2 * super().forward_features(x)

    other = lora_vit(make=Other)
    assert type(trainable_view(other)) is TrainableView
    with pytest.raises(ValueError, match=r"no timm VisionTransformer.*TrainableView"):
        SplitViT(other)
    assert type(trainable_view(nn.Linear(2, 2))) is TrainableView


def test_a_copy_of_a_compiled_view_is_its_own(images):
    view = SplitViT(lora_vit())
    before = view(images)
    view.compile(backend="eager")
    torch.testing.assert_close(view(images), before)
    twin = copy.deepcopy(view)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(twin(images), torch.zeros(5, 3))
    torch.testing.assert_close(view(images), before)
    frozen = "module.base_model.model.blocks.0.norm1.weight"
    names = dict(nn.Module.named_parameters(view)), dict(nn.Module.named_parameters(twin))
    assert names[0][frozen] is names[1][frozen]
