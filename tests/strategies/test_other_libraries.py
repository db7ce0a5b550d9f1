"""Image models of transformers and torchvision are refused with the name of timm's."""

import re

import pytest
import timm
import torchvision
import transformers

from treelora_avalanche.adapters import add_lora
from treelora_avalanche.adapters.other_libraries import timm_equivalent
from treelora_avalanche.strategies import FrozenNCM, SeqLoRA, TreeLoRAStrategy

WIDTH = {"num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}


def of_transformers(name, **options):
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


TRANSFORMERS = {
    "vit_tiny_patch16_224": ("ViT", {"hidden_size": 192, **WIDTH}),
    "vit_small_patch14_dinov2": ("Dinov2", {**WIDTH, "hidden_size": 384}),
    "deit_tiny_patch16_224": ("DeiT", {"hidden_size": 192, **WIDTH}),
    "beit_base_patch16_224": ("Beit", {"hidden_size": 192, **WIDTH}),
    "swin_tiny_patch4_window7_224": (
        "Swin",
        {"embed_dim": 12, "depths": [1], "num_heads": [1], "image_size": 32, "window_size": 4},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers_are_refused_before_they_change(name):
    family, options = TRANSFORMERS[name]
    model = of_transformers(family, **options)
    names = list(model.state_dict())
    for strategy in (SeqLoRA, TreeLoRAStrategy, FrozenNCM):
        error = rf"return logits, but .*{family}For.*timm.create_model\('{name}'"
        with pytest.raises(ValueError, match=error):
            strategy(model)
    assert name in timm.list_models()
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_the_wrapper_of_timm_models_is_unwrapped():
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"Pass the model of timm that it holds"):
        SeqLoRA(transformers.TimmWrapperForImageClassification(config))


def torchvision_vit(**options):
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 8}
    return torchvision.models.VisionTransformer(**{**sizes, "hidden_dim": 768, **options})


@pytest.mark.parametrize("head", ["linear", "task_adaptive"])
def test_the_transformer_of_torchvision_is_refused(head):
    error = re.escape("timm.create_model('vit_base_patch16_224'")
    model = torchvision_vit()
    with pytest.raises(ValueError, match=f"VisionTransformer reads only their weights.*{error}"):
        SeqLoRA(model, head=head)
    with pytest.raises(ValueError, match=error):
        add_lora(model, layers="all", target_modules=["0"])


def test_the_swin_of_torchvision_is_refused_unless_layers_are_chosen():
    model = torchvision.models.SwinTransformer([4, 4], 8, [2], [1], [4, 4], num_classes=2)
    with pytest.raises(ValueError, match=r"SwinTransformer.*'swin_tiny_patch4_window7_224'"):
        SeqLoRA(model)
    assert add_lora(model, layers="all", target_modules=["mlp.0", "mlp.3"])


def test_the_size_is_part_of_the_name_where_timm_has_it():
    assert timm_equivalent(torchvision_vit(image_size=224)) == "vit_base_patch16_224"
    assert timm_equivalent(torchvision_vit(hidden_dim=1024, image_size=224, patch_size=32)) == (
        "vit_large_patch32_224"
    )
    assert timm_equivalent(torchvision_vit(hidden_dim=10)) == "vit_base_patch16_224"
