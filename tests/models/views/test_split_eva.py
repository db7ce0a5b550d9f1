"""Split transformers of timm's class Eva: equal to timm's own forward pass."""

import pytest
import timm
import torch
from timm.models.eva import Eva
from torch import nn

from support import make
from treelora_avalanche.adapters import TrainableView, add_lora, lora_layers
from treelora_avalanche.models.views.class_token import head_reads_class_token
from treelora_avalanche.models.views.split_vit import SplitViT, trainable_view
from treelora_avalanche.plugins import ActivationCachePlugin
from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3, "img_size": 28}
TOKEN = {"global_pool": "token"}
KINDS = {  # a model of timm, the options that make it small or another
    "eva": ("eva_giant_patch14_224", {}),
    "eva token": ("eva_giant_patch14_224", TOKEN),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "eva02 token": ("eva02_tiny_patch14_224", TOKEN),
    "eva02 separate": ("eva02_base_patch14_224", TOKEN),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 32}),
    "dinov3 token": ("vit_small_patch16_dinov3_qkvb", {"img_size": 32, **TOKEN}),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", {"img_size": 32, **TOKEN}),
    "perception": ("vit_pe_core_tiny_patch16_384", {"img_size": 32}),
    "post norm": ("eva_giant_patch14_224", {"use_post_norm": True, **TOKEN}),
    "rope attention, norms, registers": (
        "eva02_tiny_patch14_224",
        {
            "attn_type": "rope",
            "qkv_fused": False,
            "num_heads": 4,
            "num_kv_heads": 2,
            "qk_norm": True,
            "init_values": 0.3,
            "num_reg_tokens": 2,
            **TOKEN,
        },
    ),
}


def lora_eva(kind="eva02 token", layers="last:2", **more):
    """A model with random weights and LoRA whose B is not zero."""
    name, options = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **options, **more})
    with torch.no_grad():  # as trained: initial biases and scales would hide what is left out
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = add_lora(model, layers=layers, rank=2, alpha=2)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].weight.data.normal_()
    return model


def images_for(model, n=4):
    size = model.get_base_model().patch_embed.img_size
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))


def gradients(model, logits):
    model.zero_grad()
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", ["last:2", (0, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_timm(kind, layers):
    model = lora_eva(kind, layers)
    images = images_for(model)
    expected = model(images)
    truth = gradients(model, expected)
    view = trainable_view(model)
    assert isinstance(view, SplitViT)
    assert view.n_frozen == (2 if layers == "last:2" else 0)
    hidden = view.frozen_output(images)
    for logits in (view(images), view(hidden)):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        own = gradients(model, logits)
        assert own.keys() == truth.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, truth[name], rtol=1e-5, atol=1e-5)
    assert max(gradient.abs().max() for gradient in truth.values()) > 0.01


@pytest.mark.parametrize(("kind", "expected"), [("eva02 token", 1), ("eva02", 5)])
def test_the_last_block_computes_the_class_token_alone(kind, expected):
    view = SplitViT(lora_eva(kind)).eval()
    seen = []
    view.transformer.blocks[-1].mlp.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    view(images_for(view.module))
    assert seen == [expected]
    assert head_reads_class_token(view.transformer) == (expected == 1)


def test_a_projection_whose_weight_timm_reads_is_computed_so():
    model = lora_eva("eva token").eval()  # the check of training would refuse it
    attention = model.get_base_model().blocks[-1].attn
    images = images_for(model)
    before = model(images)
    attention.qkv_bias_separate = False  # timm then ignores the adapter
    expected = model(images)
    assert not torch.allclose(before, expected, atol=1e-3)
    view = SplitViT(model).eval()
    torch.testing.assert_close(view(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov3 token", "mixed rope"])
def test_checkpointing_computes_the_same(kind):
    view = SplitViT(lora_eva(kind))
    images = images_for(view.module)
    truth = gradients(view, view(images))
    view.transformer.set_grad_checkpointing()
    for name, gradient in gradients(view, view(images)).items():
        torch.testing.assert_close(gradient, truth[name])


def test_trained_rotary_embeddings_get_their_gradient():
    model = lora_eva("mixed rope")
    frequencies = model.get_base_model().rope.freqs.requires_grad_()
    images = images_for(model)
    gradients(model, model(images))
    truth = frequencies.grad.clone()
    view = SplitViT(model)
    assert view.n_frozen is None
    gradients(view, view(images))
    assert truth.abs().max() > 1e-4
    torch.testing.assert_close(frequencies.grad, truth, rtol=1e-4, atol=1e-6)


def test_images_of_another_size_keep_their_rotary_embeddings_and_are_not_cached():
    view = SplitViT(lora_eva("dinov3 token"))
    wide = torch.randn(2, 3, 16, 64)  # as many patches as 32 x 32
    torch.testing.assert_close(view(wide), view.module(wide), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(view(view.frozen_output(wide)), view(wide), atol=1e-3)
    assert view.agrees(images_for(view.module))
    assert not view.agrees(wide)


@pytest.mark.parametrize("options", [{"rope_rescale_coords": 2.0}, {"patch_drop_rate": 0.5}])
def test_positions_drawn_in_training_keep_the_plain_forward_pass(options):
    model = lora_eva("dinov3 token", **options)
    assert type(trainable_view(model)) is TrainableView
    with pytest.raises(ValueError, match=r"no timm VisionTransformer.*TrainableView"):
        SplitViT(model)


def test_a_subclass_keeps_the_plain_forward_pass():
    class Other(Eva):
        def forward_features(self, x):
            return 2 * super().forward_features(x)

    model = Other(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    assert type(trainable_view(add_lora(model, layers="all"))) is TrainableView


def small_eva():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_small_patch16_dinov3",
        **{**SMALL, "img_size": 8, "patch_size": 4, "num_classes": 6, "in_chans": 1, **TOKEN},
        init_values=0.5,
        head_init_scale=1.0,
    )


@pytest.mark.parametrize("inference", ["last", "routed"])
def test_training_on_the_cache_is_training_without_it(inference, tiny_benchmark):
    images = torch.stack([x for x, *_ in tiny_benchmark.test_stream[0].dataset])
    results = []
    for cache in (None, "auto"):
        strategy = make(
            TreeLoRAStrategy,
            small_eva(),
            layers="last:2",
            inference=inference,
            head="task_adaptive",
            cache=cache,
            train_epochs=1,
            train_mb_size=32,
        )
        torch.manual_seed(2)
        strategy.train(tiny_benchmark.train_stream[:2])
        plugin = next(p for p in strategy.plugins if isinstance(p, ActivationCachePlugin))
        assert not plugin._logged
        strategy.model.eval()
        with torch.no_grad():
            results.append(strategy.model(images))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_cache_learns_what_the_plain_view_learns(tiny_benchmark):
    weights = []
    for view in (trainable_view, TrainableView):
        torch.manual_seed(1)
        model = view(add_lora(small_eva(), layers="last:2", rank=2))
        strategy = make(SeqLoRA, model, train_epochs=1)
        torch.manual_seed(2)
        strategy.train(tiny_benchmark.train_stream[0])
        weights.append([p.detach() for p in strategy.model.parameters()])
    for own, plain in zip(*weights, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-4)
