"""Gradients reach every adapter and the classifier, or the strategy refuses before training."""

import copy
import logging
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.models import as_multitask
from peft import LoraConfig, get_peft_model
from timm.models.gcvit import GlobalContextVit
from timm.models.metaformer import Attention as TokenAttention
from timm.models.metaformer import LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.volo import VOLO
from torch import nn
from torch.utils.data import TensorDataset

from support import identical, images_of, make, train, weights
from treelora_avalanche.adapters import (
    add_lora,
    find_classifier,
    load_adapter,
    lora_layers,
    save_adapter,
)
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.adapters.graph import trace
from treelora_avalanche.models.views.split_vit import SplitViT
from treelora_avalanche.state import random_state
from treelora_avalanche.strategies import (
    L2P,
    OGD,
    SAPT,
    InfLoRA,
    OLoRA,
    SeqLoRA,
    TreeLoRAStrategy,
)

LORA = [SeqLoRA, TreeLoRAStrategy, OLoRA, OGD, InfLoRA]
N_CLASSES = 4
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def stream(size, n_channels=3):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(N_CLASSES)
    dataset = TensorDataset(
        torch.randn(N_CLASSES, n_channels, size, size, generator=generator), targets
    )
    dataset.targets = targets.tolist()
    return nc_benchmark(dataset, dataset, n_experiences=1, task_labels=False).train_stream


def still_factors(strategy, steps=1):
    """Names of trained parameters, but factors A, that training leaves as they are."""
    before = weights(strategy)
    size = strategy.image_size
    for _ in range(steps):
        strategy.train(stream(size)[0])
    after = weights(strategy)
    return [n for n in before if "lora_A" not in n and torch.equal(before[n], after[n])]


def build(model, size, strategy_class=SeqLoRA, **options):
    options = {"layers": "all", "train_epochs": 1, "lr": 0.01, "train_mb_size": 4, **options}
    strategy = make(strategy_class, model, **options)
    strategy.image_size = size
    return strategy


# ------------------------------------------------------------------------------ families of timm


class Family(NamedTuple):
    name: str
    options: dict[str, Any]
    n_layers: int = 2
    size: int = 32
    target_modules: tuple[str, ...] | None = None
    n_heads: int = 1
    create: Callable[..., nn.Module] | None = None

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        options = {k: v for k, v in self.options.items() if v is not None}
        create = self.create or partial(timm.create_model, self.name)
        model = create(num_classes=N_CLASSES, **options)
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and self.name.startswith(("swinv2", "csatv2")):
                nn.init.ones_(module.weight)  # scales of 0 before pretraining
                nn.init.ones_(module.bias)  # the norm of one channel is its bias
            if isinstance(module, nn.Linear) and "head" in name and not module.weight.any():
                nn.init.normal_(module.weight)  # 0 before training
        return model


def swin(name, n_layers=2, **options):
    small = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    return Family(name, {**small, "img_size": 32, **options}, n_layers)


def of_patches_14(name, n_layers=2, **options):
    return Family(name, {**VIT, "img_size": 28, **options}, n_layers, 28)


def of_patches_16(name, n_layers=2, n_heads=1, target_modules=None, **options):
    options = {**VIT, "img_size": 32, **options}
    return Family(name, options, n_layers, target_modules=target_modules, n_heads=n_heads)


def of_stages(name, n_layers=4, size=64, target_modules=None, create=None, **options):
    """Models of four stages with a block each."""
    small = {"embed_dims": (16,) * 4, "depths": (1,) * 4, "num_heads": (2,) * 4}
    return Family(name, {**small, **options}, n_layers, size, target_modules, create=create)


TRAINED = [
    of_patches_16("vit_tiny_patch16_224"),
    of_patches_16("deit_tiny_patch16_224"),
    of_patches_16("deit_tiny_distilled_patch16_224", n_heads=2),
    of_patches_16("deit3_small_patch16_224"),
    of_patches_16("beit_base_patch16_224"),
    of_patches_16("beitv2_base_patch16_224"),
    of_patches_14("eva_giant_patch14_224"),
    of_patches_14("eva02_tiny_patch14_224"),
    of_patches_14("eva02_base_patch14_224", n_layers=6),
    of_patches_14("vit_small_patch14_dinov2"),
    of_patches_14("vit_small_patch14_reg4_dinov2"),
    of_patches_16("vit_small_patch16_dinov3"),
    of_patches_16("vit_small_patch16_dinov3_qkvb"),
    of_patches_16("vit_base_patch16_siglip_224"),
    of_patches_16("vit_base_patch16_clip_224"),
    of_patches_16("vit_relpos_small_patch16_224"),
    of_patches_16("vit_small_patch16_rope_224"),
    of_patches_16("vit_pe_core_tiny_patch16_384"),
    of_patches_14("aimv2_large_patch14_224"),
    of_patches_16("cait_xxs24_224", depth_token_only=1),
    of_patches_16("xcit_nano_12_p16_224"),
    of_patches_16("samvit_base_patch16_224", window_size=2, global_attn_indexes=()),
    of_patches_16("convit_tiny", n_layers=1, local_up_to_layer=1),
    swin("swin_tiny_patch4_window7_224"),
    swin("swinv2_tiny_window8_256"),
    swin("swinv2_cr_tiny_224"),
    Family(
        "maxvit_tiny_tf_224",
        {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1), "stem_width": 16},
        n_layers=4,
        size=64,
    ),
    Family("naflexvit_base_patch16_gap", VIT),
    Family("pit_ti_distilled_224", {"img_size": 64}, n_layers=12, size=64, n_heads=2),
    Family(
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "conv_mlp": False},
        n_layers=8,
        target_modules=("fc1", "fc2"),
    ),
    of_patches_16("beit3_base_patch16_224"),
    of_patches_16("flexivit_small"),
    of_patches_16("vit_srelpos_small_patch16_224"),
    of_patches_16("vit_small_patch16_rope_mixed_224"),
    of_patches_16("naflexvit_base_patch16_siglip", img_size=None),
    of_patches_16("vit_base_patch16_xp_224", target_modules=("in_proj",)),
    of_patches_14("vit_intern300m_patch14_448"),
    of_patches_14("vit_pe_lang_large_patch14_448"),
    of_patches_14("deepseek_vit_412m"),
    of_patches_16("qwen3_vit_88m", embed_dim=32),
    Family("vit_tiny_r_s16_p8_224", {**VIT, "img_size": 64}, size=64),
    of_patches_16(
        "tnt_s_patch16_224",
        n_layers=8,
        target_modules=("qk", "v"),
        inner_dim=8,
        num_heads_inner=2,
        num_heads_outer=2,
        num_heads=None,
    ),
    Family(
        "gemma4_vit_167m",
        {"embed_dim": 16, "depth": 1, "num_heads": 2},
        n_layers=7,
        target_modules=("linear",),
    ),
    of_stages("davit_tiny", 8, size=32),
    of_stages("tiny_vit_5m_224", 3, window_sizes=(7,) * 4),
    of_stages("twins_svt_small", img_size=64),
    of_stages("twins_pcpvt_small", 8, target_modules=("q", "kv"), img_size=64),
    of_stages("pvt_v2_b0", 8, target_modules=("q", "kv")),
    Family(
        "coat_mini",
        {
            "img_size": 64,
            "embed_dims": (16,) * 4,
            "serial_depths": (1,) * 4,
            "parallel_depth": 1,
            "num_heads": 8,
        },
        n_layers=7,
        size=64,
    ),
    Family(
        "csatv2",
        {"dims": (16,) * 4, "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
        n_layers=6,
        size=64,
    ),
    Family(
        "edgenext_xx_small",
        {
            "dims": (16,) * 4,
            "depths": (1,) * 4,
            "global_block_counts": (0, 1, 1, 1),
            "heads": (2,) * 4,
        },
        n_layers=3,
        size=64,
    ),
    Family(
        "efficientformer_l1",
        {"depths": (1, 1, 1, 2), "embed_dims": (8, 8, 8, 16)},
        n_layers=1,
        size=224,
        n_heads=2,
    ),
    Family(
        "hiera_tiny_224",
        {"embed_dim": 16, "stages": (1,) * 4, "num_heads": 1, "img_size": (64, 64)},
        n_layers=4,
        size=64,
    ),
    Family(
        "hieradet_small",
        {"embed_dim": 16, "stages": (1,) * 4, "num_heads": 1, "global_att_blocks": ()},
        n_layers=4,
        size=64,
    ),
    Family("mobilevit_xxs", {}, n_layers=9, size=64),
    Family("vitamin_small_224", {"img_size": 64, "depth": 1}, n_layers=1, size=64),
    Family(
        "volo",
        {"img_size": 32, "layers": (1,) * 4, "embed_dims": (16,) * 4, "num_heads": (2,) * 4},
        n_layers=3,
        n_heads=2,
        create=VOLO,
    ),
    of_stages(
        "gcvit",
        embed_dims=None,
        embed_dim=16,
        img_size=64,
        window_ratio=(16, 16, 16, 32),
        create=GlobalContextVit,
    ),
    Family(
        "caformer",
        {
            "depths": (1,) * 4,
            "dims": (32,) * 4,
            "token_mixers": [SepConv] * 2 + [TokenAttention] * 2,
            "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        },
        n_heads=3,  # two layers and a norm
        create=MetaFormer,
    ),
    Family(
        "mvitv2",
        {
            "cfg": MultiScaleVitCfg(embed_dim=(16,) * 4, depths=(1,) * 4, num_heads=1),
            "img_size": 32,
        },
        n_layers=4,
        create=MultiScaleVit,
    ),
    Family(
        "nest",
        {"embed_dims": (16,) * 3, "num_heads": (2,) * 3, "depths": (1,) * 3, "img_size": 64},
        n_layers=3,
        size=64,
        create=Nest,
    ),
]


@pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.name)
def test_family_of_timm_moves_every_adapter(family, caplog):
    strategy = build(family.make(), family.size, target_modules=family.target_modules)
    assert len(lora_layers(strategy.model)) == family.n_layers
    heads = {n for n, _ in strategy.model.named_parameters() if "lora" not in n}
    assert len(heads) == 2 * family.n_heads
    with caplog.at_level(logging.WARNING, logger="treelora_avalanche"):
        assert still_factors(strategy) == []
    assert not caplog.records


def mixer(img_size):
    model = MlpMixer(
        img_size=img_size, patch_size=16, embed_dim=16, num_blocks=2, num_classes=N_CLASSES
    )
    nn.init.normal_(model.head.weight)  # 0 before training
    return model


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


REFUSED = [
    (partial(mixer, img_size=32), "no layer qkv or q_proj+k_proj+v_proj, but is None"),
    (partial(timm.create_model, "resnet10t"), "should have linear layers in numbered blocks"),
    (
        partial(timm.create_model, "convnext_atto", depths=(1,) * 4, dims=(8,) * 4, conv_mlp=False),
        "Choose among fc1, fc2",
    ),
    (partial(timm.create_model, "pvt_v2_b0"), "Choose among q, kv, proj, fc1, fc2"),
    (partial(timm.create_model, "levit_128s"), "`target_modules` should be given"),
    (partial(on_meta, "twins_pcpvt_small", depths=(1,) * 4), "Choose among q, kv, proj, fc1, fc2"),
    (partial(on_meta, "tnt_s_patch16_224", depth=1), "Choose among qk, v, proj, fc1, fc2"),
    (partial(on_meta, "nextvit_small"), "Choose among q, k, v, proj"),
    (partial(on_meta, "mambaout_femto", depths=(1,) * 4), "Choose among fc1, fc2"),
    (partial(on_meta, "vit_base_patch16_xp_224", depth=1), "Choose among in_proj, attn_out_proj"),
    (partial(on_meta, "gemma4_vit_167m", depth=1), "Choose among linear"),
    (partial(on_meta, "focalnet_tiny_srf"), "linear layers in numbered blocks"),
    (partial(on_meta, "coatnet_0_rw_224", depths=(1,) * 4), "linear layers in numbered blocks"),
    (partial(on_meta, "poolformer_s12"), "linear layers in numbered blocks"),
    (partial(on_meta, "efficientformerv2_s0"), "linear layers in numbered blocks"),
]


@pytest.mark.parametrize(("create", "message"), REFUSED)
def test_family_without_the_default_layers_is_refused_by_name(create, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(create(), 32)


def test_mlp_mixer_is_trained_with_layers_chosen():
    strategy = build(mixer(img_size=32), 32, target_modules=["fc1", "fc2"])
    assert still_factors(strategy) == []


def test_scale_of_zero_is_told(caplog):
    torch.manual_seed(0)
    options = swin("swinv2_tiny_window8_256").options
    strategy = build(
        timm.create_model("swinv2_tiny_window8_256", num_classes=N_CLASSES, **options), 32
    )
    with caplog.at_level(logging.WARNING, logger="treelora_avalanche"):
        strategy.train(stream(32)[0])
    assert "gradient of `layers.0.blocks.0.attn.qkv`, `layers.1" in caplog.text
    assert "pretrained?" in caplog.text


def test_classifier_that_starts_at_zero_is_no_cause_for_a_warning(tiny_vit, caplog, tiny_benchmark):
    model = tiny_vit()
    nn.init.zeros_(model.head.weight)
    with caplog.at_level(logging.WARNING, logger="treelora_avalanche"):
        train(make(SeqLoRA, model), tiny_benchmark, 0)
    assert not caplog.records


# ------------------------------------------------------------------------- adapters out of reach


def beit(**options):
    torch.manual_seed(0)
    return timm.create_model(
        "beit_base_patch16_224", num_classes=N_CLASSES, img_size=32, **VIT, **options
    )


@pytest.mark.parametrize("strategy_class", LORA)
def test_every_lora_strategy_trains_beit(strategy_class):
    assert still_factors(build(beit(), 32, strategy_class)) == []


def test_switch_changes_beit_by_rounding_alone():
    model, images = beit().eval(), torch.randn(2, 3, 32, 32)
    nn.init.normal_(model.blocks[0].attn.q_bias)
    before = model(images)
    torch.testing.assert_close(add_lora(model, layers=[0]).eval()(images), before)
    switches = [block.attn.qkv_bias_separate for block in model.blocks]
    assert switches == [True, False]


def test_saved_adapter_of_beit_is_used_when_loaded(tmp_path):
    strategy = build(beit(), 32)
    strategy.train(stream(32)[0])
    save_adapter(strategy.model, tmp_path / "adapter")
    images = torch.randn(2, 3, 32, 32)
    loaded = load_adapter(beit(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(images), strategy.model.eval()(images))


def users_lora(model, **options):
    options = {"modules_to_save": ["head"], **options}
    return get_peft_model(model, LoraConfig(r=2, target_modules=["qkv"], **options))


@pytest.mark.parametrize("strategy_class", LORA)
def test_adapter_outside_the_graph_is_refused(strategy_class):
    strategy = build(users_lora(beit()), 32, strategy_class)
    before = weights(strategy)
    message = (
        "`model` should pass a gradient to every adapted layer, but `blocks.0.attn.qkv`, "
        "`blocks.1.attn.qkv` (of 2) get none: their adapters would not be trained. The model reads "
        "their weights without calling them: set `qkv_bias_separate = True`"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        strategy.train(stream(32)[0])
    assert identical(before, weights(strategy))


@pytest.mark.parametrize("strategy_class", LORA)
def test_merged_adapter_is_refused_and_its_layers_are_counted(
    tiny_vit, tiny_benchmark, strategy_class
):
    model = users_lora(tiny_vit(depth=5))
    model.merge_adapter()
    message = (
        "`blocks.0.attn.qkv`, `blocks.1.attn.qkv`, `blocks.2.attn.qkv` and 2 more (of 5) get none"
    )
    with pytest.raises(ValueError, match=re.escape(message) + ".*unmerge_adapter"):
        train(make(strategy_class, model), tiny_benchmark, 0)
    model.unmerge_adapter()
    train(make(strategy_class, model), tiny_benchmark, 0)


def test_frozen_and_disabled_adapters_are_refused(tiny_vit, tiny_benchmark):
    frozen, disabled = users_lora(tiny_vit()), users_lora(tiny_vit())
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora" not in name)
    disabled.base_model.disable_adapter_layers()
    for model in (frozen, disabled):
        with pytest.raises(ValueError, match="of all 3 adapted layers are frozen"):
            make(SeqLoRA, model)
    for parameter in disabled.parameters():
        parameter.requires_grad_()
    with pytest.raises(ValueError, match=r"get none.*call enable_adapter_layers\(\)"):
        train(make(SeqLoRA, disabled), tiny_benchmark, 0)


# ------------------------------------------------------------------------------------ no trace


class Noisy(nn.Module):
    """Draws random numbers, updates batch statistics, and counts its training passes."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit
        self.norm = nn.BatchNorm2d(1)
        self.drop = nn.Dropout(0.5)
        self.passes = 0

    def forward(self, x):
        self.passes += self.training
        random.random()
        np.random.rand()
        return self.vit(self.drop(self.norm(x)) + torch.randn(1))

    def get_classifier(self):
        return self.vit.head


@pytest.mark.parametrize("compiled", [False, True])
def test_trace_leaves_no_trace(tiny_vit, compiled):
    model = add_lora(Noisy(tiny_vit()))
    if compiled:
        for module in model.modules():
            if isinstance(module, timm.models.vision_transformer.Block):
                module.compile(backend="eager")
    model.base_model.model.drop.eval()
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, float(number)) if number % 2 else None
    gradients = [p.grad for p in model.parameters()]
    values = [g if g is None else g.clone() for g in gradients]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state, generators = copy.deepcopy(model.state_dict()), random_state()
    traced = trace(model, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert not traced.outside
    assert traced.last == "vit.head"
    assert identical(generators, random_state())
    assert identical(state, model.state_dict())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(g is None or torch.equal(g, v) for g, v in zip(gradients, values, strict=True))
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert model.base_model.model.passes == 0


def run_both(monkeypatch, strategy_class, run):
    """Results of a run with the check and without, and how often the check was called."""
    checked, calls = run(), []
    monkeypatch.setattr(strategy_class, "_check_gradients", lambda *_, **__: calls.append(1))
    return checked, run(), len(calls)


VARIANTS = [
    *((kind, {}) for kind in LORA),
    (SeqLoRA, {"accumulation_steps": 2, "cache": None}),
    (TreeLoRAStrategy, {"head": "task_adaptive", "inference": "routed"}),
]


@pytest.mark.parametrize(("strategy_class", "options"), VARIANTS)
def test_training_is_the_same_bit_for_bit_without_the_check(
    tiny_vit, tiny_benchmark, strategy_class, options, monkeypatch
):
    def run():
        torch.manual_seed(5)
        vit = tiny_vit()
        vit.pos_drop.p = vit.blocks[1].attn.proj_drop.p = 0.3
        strategy = make(strategy_class, vit, layers="last:2", **options)
        train(strategy, tiny_benchmark, 0, 1)
        with torch.no_grad():
            logits = strategy.model.eval()(images_of(tiny_benchmark.test_stream))
        return [weights(strategy), random_state(), logits]

    checked, unchecked, n_calls = run_both(monkeypatch, strategy_class, run)
    assert identical(checked, unchecked)
    assert n_calls == 1  # once a strategy


@pytest.mark.parametrize("strategy_class", [SeqLoRA, TreeLoRAStrategy, SAPT])
def test_training_on_text_is_the_same_bit_for_bit_without_the_check(
    make_language_model, tiny_texts, strategy_class, monkeypatch
):
    def run():
        strategy = make(strategy_class, make_language_model(), train_mb_size=4)
        train(strategy, tiny_texts, 0, 1)
        return [weights(strategy), random_state()]

    checked, unchecked, n_calls = run_both(monkeypatch, strategy_class, run)
    assert identical(checked, unchecked)
    assert n_calls == 1


@pytest.mark.parametrize("strategy_class", [SeqLoRA, SAPT])
def test_merged_adapter_of_a_language_model_is_refused(
    make_language_model, tiny_texts, strategy_class
):
    model = add_lora(make_language_model())
    model.network.merge_adapter()
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn.q_proj`.*unmerge_adapter"):
        train(make(strategy_class, model, train_mb_size=4), tiny_texts, 0)


def test_prompts_are_not_checked(tiny_vit, tiny_benchmark, monkeypatch):
    monkeypatch.setattr(L2P, "_check_gradients", lambda *_, **__: pytest.fail("checked"))
    train(make(L2P, tiny_vit()), tiny_benchmark, 0)


def test_samples_that_are_images_after_the_training_transform_alone(tiny_vit, tiny_benchmark):
    experience = copy.copy(tiny_benchmark.train_stream[0])
    frozen = experience.dataset.replace_current_transform_group((lambda x: x.numpy(), None))
    experience._dataset = frozen
    calls = []

    def collate(samples):
        calls.append(len(samples))
        return [torch.stack([torch.as_tensor(s[0]) for s in samples])] + [
            torch.tensor([s[i] for s in samples]) for i in (1, 2)
        ]

    make(SeqLoRA, tiny_vit()).train(experience, collate_fn=collate)
    assert calls[0] == 2


# ---------------------------------------------------------------------------------- classifiers


def test_both_heads_of_a_distilled_model_are_trained():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=N_CLASSES, img_size=32, **VIT
    )
    strategy = build(model, 32)
    assert still_factors(strategy) == []
    assert "head: Linear(16, 4), Linear(16, 4)" in str(strategy)


@pytest.mark.parametrize("strategy_class", [SeqLoRA, TreeLoRAStrategy])
def test_head_cannot_be_fitted_to_features_where_there_are_two(strategy_class):
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=N_CLASSES, img_size=32, **VIT
    )
    with pytest.raises(ValueError, match=r"`head` \(Linear\) and `head_dist` \(Linear\)"):
        build(model, 32, strategy_class, head="task_adaptive")
    assert not lora_layers(model)


def with_deep_head(tiny_vit):
    model = tiny_vit()
    model.head = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 6))
    return model


@pytest.mark.parametrize("strategy_class", LORA)
def test_head_of_several_layers_is_trained_whole(tiny_vit, tiny_benchmark, strategy_class):
    strategy = make(strategy_class, with_deep_head(tiny_vit))
    before = weights(strategy)
    assert sum("head" in name for name in before) == 4
    train(strategy, tiny_benchmark, 0)
    after = weights(strategy)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert "head: Sequential" in str(strategy)


def test_head_of_several_layers_has_classes_and_is_not_fitted(tiny_vit, tiny_benchmark):
    with pytest.raises(ValueError, match=r"its logits come from `head` \(Sequential\)"):
        make(SeqLoRA, with_deep_head(tiny_vit), head="task_adaptive")
    model = with_deep_head(tiny_vit)
    model.head[2] = nn.Linear(8, 1)
    with pytest.raises(ValueError, match="class 1 of experience 0, but has 1 outputs"):
        train(make(SeqLoRA, model), tiny_benchmark, 0)


def test_model_of_features_is_refused_unless_its_loss_is_the_users(tiny_vit, tiny_benchmark):
    message = r"its logits come from `norm` \(LayerNorm\), which is frozen"
    with pytest.raises(ValueError, match=message):
        train(make(SeqLoRA, tiny_vit(num_classes=0)), tiny_benchmark, 0)

    def spread(features, targets):
        return features.square().mean()

    train(make(SeqLoRA, tiny_vit(num_classes=0), criterion=spread), tiny_benchmark, 0)


def test_users_model_with_a_frozen_classifier_is_refused(tiny_vit, tiny_benchmark):
    model = users_lora(tiny_vit(), modules_to_save=None)
    message = r"its logits come from `head` \(Linear\), which is frozen.*name 'head' in"
    with pytest.raises(ValueError, match=message):
        train(make(SeqLoRA, model), tiny_benchmark, 0)


class Wrapped(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, x):
        return self.vit(x)


@pytest.mark.parametrize("wrap", [Wrapped, lambda vit: nn.Sequential(nn.Identity(), vit)])
def test_head_of_a_wrapped_model_is_trained(tiny_vit, tiny_benchmark, wrap):
    strategy = make(SeqLoRA, wrap(tiny_vit()), head="task_adaptive")
    assert not isinstance(strategy.model, SplitViT)  # which would leave out the rest
    before = weights(strategy)
    assert sum("head" in name for name in before) == 2
    train(strategy, tiny_benchmark, 0)
    after = weights(strategy)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_module_around_a_transformer_is_not_left_out(tiny_vit):
    softened = nn.Sequential(tiny_vit(), nn.Softmax(-1))
    images = torch.randn(2, 1, 8, 8)
    expected = softened.eval()(images)
    assert torch.equal(make(SeqLoRA, softened).model.eval()(images), expected)
    with pytest.raises(ValueError, match="`inference` is 'routed'"):
        make(TreeLoRAStrategy, nn.Sequential(tiny_vit()), inference="routed")


def test_classifier_without_a_usual_name_is_refused_by_its_name(tiny_vit, tiny_benchmark):
    model = nn.Sequential(tiny_vit(num_classes=0), nn.Linear(16, 6))
    with pytest.raises(ValueError, match=r"come from `1` \(Linear\), which is frozen"):
        train(make(SeqLoRA, model), tiny_benchmark, 0)


def test_heads_by_task_label_are_refused(tiny_vit):
    model = as_multitask(tiny_vit(), "head")
    with pytest.raises(ValueError, match=r"one head for all tasks.*without `as_multitask`"):
        make(SeqLoRA, model)
    assert not lora_layers(model)


def test_heads_of_a_list_are_all_trained():
    torch.manual_seed(0)
    model = timm.create_model(
        "crossvit_tiny_240",
        num_classes=N_CLASSES,
        depth=([1, 1, 0],),
        embed_dim=(16, 16),
        num_heads=(2, 2),
    )
    strategy = build(model, 240, target_modules=("qkv",))
    assert sum("head" in name for name in weights(strategy)) == 4
    assert still_factors(strategy) == []


def test_distilled_model_with_one_head_trained_is_refused():
    distilled = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=N_CLASSES, img_size=32, **VIT
    )
    for saved, frozen in (("head", "head_dist"), ("head_dist", "head")):
        model = users_lora(copy.deepcopy(distilled), modules_to_save=[saved])
        with pytest.raises(ValueError, match=f"logits come from `{frozen}`"):
            build(model, 32).train(stream(32)[0])


@pytest.mark.parametrize("head", ["linear", "task_adaptive"])
def test_several_modules_to_save(tiny_vit, tiny_benchmark, head):
    model = users_lora(tiny_vit(), modules_to_save=["norm", "head"])
    assert classifier_of(model).out_features == 6
    assert find_classifier(model) is model.base_model.model.head.modules_to_save["default"]
    strategy = make(SeqLoRA, model, head=head)
    before = weights(strategy)
    train(strategy, tiny_benchmark, 0, 1)
    after = weights(strategy)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_peft_still_takes_a_weight_without_its_layer():
    """Goes when peft adapts weights that are read without calling the layer; then so may the
    switch."""
    model = users_lora(beit()).eval()
    for layer in lora_layers(model).values():
        nn.init.ones_(layer.lora_B["default"].weight)
    images = torch.randn(2, 3, 32, 32)
    with model.disable_adapter():
        without = model(images)
    assert torch.equal(model(images), without)
