"""Models in half precision: what is trained and measured is float32; nothing fails in a step."""

import copy

import pytest
import timm
import torch
from avalanche.training.plugins import EvaluationPlugin
from peft import LoraConfig, get_peft_model
from torch import nn

from support import FEW_PROJECTIONS, make, train
from treelora_avalanche.adapters import add_lora, find_classifier, load_adapter, save_adapter
from treelora_avalanche.adapters.first_pass import skip_check
from treelora_avalanche.models.views.precision import train_in_float32
from treelora_avalanche.plugins import TrainedHeadPlugin
from treelora_avalanche.registry import METHODS, RunSettings
from treelora_avalanche.runs.setup import Ingredients, build_strategy
from treelora_avalanche.strategies import InfLoRA, OLoRA, SeqLoRA, TreeLoRAStrategy

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified", "ignore:Call to deprecated")


def settings(**options):
    return RunSettings(
        scenario="domains",
        data="-",
        rank=2,
        lr=0.001,
        batch_size=32,
        eval_batch_size=32,
        method_options=FEW_PROJECTIONS,
        **options,
    )


def built(name, model, **options):
    torch.manual_seed(1)
    return build_strategy(
        name,
        settings(**options),
        Ingredients(0, None, model),
        device="cpu",
        plugins=[],
        evaluator=EvaluationPlugin(loggers=[]),
    )


def logits_of(strategy, images):
    strategy.model.eval()
    with torch.no_grad():
        return strategy.model(images)


VISION = [name for name, method in METHODS.items() if "vision" in method.models]


@pytest.mark.parametrize("name", VISION)
def test_every_method_learns_what_it_learns_in_float32(name, tiny_vit, tiny_benchmark):
    images = torch.stack([x for x, *_ in tiny_benchmark.test_stream[0].dataset])
    adaptive = {"head": "task_adaptive_trained"} if "head" in METHODS[name].reads else {}
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        strategy = built(name, tiny_vit(depth=5).to(dtype), epochs=1, **adaptive)
        torch.manual_seed(2)
        stream = tiny_benchmark.train_stream[:2]
        strategy.train(stream)
        assert {p.dtype for p in strategy.model.parameters() if p.requires_grad} <= {torch.float32}
        for plugin in strategy.plugins:
            for statistics in getattr(plugin, "statistics", ()):
                tensors = [v for v in statistics if isinstance(v, torch.Tensor)]
                assert {v.dtype for v in tensors} == {torch.float32}
        if name != "StreamingLDA":  # its logits are not the model's
            outputs[dtype] = logits_of(strategy, images)
            assert outputs[dtype].dtype == torch.float32
    if outputs:
        exact, half = outputs.values()
        seen = exact.isfinite()  # FrozenNCM excludes classes that it has not seen
        assert torch.equal(half.isfinite(), seen)
        assert (half - exact)[seen].abs().max() < 0.15 * exact[seen].abs().max()


@pytest.mark.parametrize("strategy_class", [TreeLoRAStrategy, InfLoRA])
def test_a_strategy_in_float16_is_saved_and_continued(
    strategy_class, tiny_vit, tiny_benchmark, tmp_path
):
    images = torch.stack([x for x, *_ in tiny_benchmark.test_stream[0].dataset])

    def new():
        return make(strategy_class, tiny_vit().half(), head="task_adaptive", train_epochs=1)

    first = train(new(), tiny_benchmark, 0, 1)
    first.save(tmp_path)
    second = new()
    second.load(tmp_path)
    assert torch.equal(logits_of(first, images), logits_of(second, images))
    for strategy in (first, second):
        train(strategy, tiny_benchmark, 2)
    assert torch.equal(logits_of(first, images), logits_of(second, images))


def test_an_adapter_of_a_model_in_bfloat16_loads(tiny_vit, tiny_benchmark, tmp_path):
    images = torch.stack([x for x, *_ in tiny_benchmark.test_stream[0].dataset])
    first = train(make(SeqLoRA, tiny_vit().bfloat16(), train_epochs=1), tiny_benchmark, 0)
    save_adapter(first.model, tmp_path)
    second = make(SeqLoRA, load_adapter(tiny_vit().bfloat16(), tmp_path))
    # The saved classifier is rounded to the precision of the model that it is loaded into.
    torch.testing.assert_close(
        logits_of(first, images), logits_of(second, images), rtol=0.01, atol=0.002
    )


def test_frozen_weights_keep_their_precision_and_converting_twice_changes_nothing(tiny_vit):
    model = add_lora(tiny_vit().bfloat16())
    images = torch.randn(2, 1, 8, 8)
    train_in_float32(model)
    before, hooks = model(images), len(model.get_base_model()._forward_pre_hooks)
    assert before.dtype == torch.float32
    train_in_float32(model)
    assert torch.equal(model(images), before)
    assert len(model.get_base_model()._forward_pre_hooks) == hooks == 1
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert torch.equal(copy.deepcopy(model)(images), before)


def test_a_model_in_float32_is_left_as_it_is(tiny_vit):
    model = add_lora(tiny_vit())
    skip_check(model)  # a hook too
    train_in_float32(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_adapter_and_a_norm_in_bfloat16_are_trained_in_float32(tiny_vit, tiny_benchmark):
    config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["norm", "head"])
    model = get_peft_model(tiny_vit(), config).bfloat16()
    strategy = train(make(SeqLoRA, model, train_epochs=1), tiny_benchmark, 0)
    assert {p.dtype for p in strategy.model.parameters()} == {torch.float32}
    assert find_classifier(strategy.model).weight.dtype == torch.float32


def test_a_parameter_of_no_layer_is_refused(tiny_vit):
    model = add_lora(tiny_vit()).half()
    model.get_base_model().pos_embed.requires_grad_()
    with pytest.raises(ValueError, match=r"float32, but `.*pos_embed` is float16.*`\.float\(\)`"):
        SeqLoRA(model)


def test_a_whole_language_model_in_float16_is_refused(make_language_model):
    with pytest.raises(ValueError, match=r"float32 or bfloat16, but .*float16.*dtype='bfloat16'"):
        built("Naive", make_language_model().half())


def test_the_head_is_fitted_in_float32_whatever_its_own_precision(tiny_vit):
    features = torch.randn(40, 16)
    plugin = TrainedHeadPlugin(epochs=2)
    statistics = plugin.kind.of(features, torch.arange(40) % 2, 0)
    from treelora_avalanche.models.features.gaussians import train_head

    heads = [nn.Linear(16, 2), nn.Linear(16, 2).bfloat16()]
    heads[1].load_state_dict(heads[0].state_dict())
    for head in heads:
        train_head(
            head,
            plugin.kind.draws(statistics),
            epochs=5,
            n_per_class=4,
            learning_rate=0.01,
            generator=torch.Generator().manual_seed(0),
        )
    torch.testing.assert_close(heads[1].weight.float(), heads[0].weight, rtol=0.02, atol=0.01)


# ---------------------------------------------------------------------------- LoRA on convolutions


def convolutions():
    torch.manual_seed(0)
    model = timm.create_model(
        "convnext_atto",
        num_classes=6,
        in_chans=1,
        depths=(1, 1, 1, 1),
        dims=(8, 8, 16, 16),
        patch_size=1,
        ls_init_value=1.0,
    )
    config = LoraConfig(r=2, target_modules=["stages.1.downsample.1"], modules_to_save=["head.fc"])
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", ["TreeLoRA", "SeqLoRA", "L2Anchor", "OGD"])
def test_convolutions_are_adapted(name, tiny_benchmark):
    strategy = built(name, convolutions(), epochs=1)
    factors = [p for n, p in strategy.model.named_parameters() if "lora_B" in n]
    assert [p.ndim for p in factors] == [4]
    strategy.train(tiny_benchmark.train_stream[:2])
    assert all(p.any() for p in factors)


@pytest.mark.parametrize("strategy_class", [OLoRA, InfLoRA])
def test_methods_that_add_up_matrices_refuse_convolutions(strategy_class):
    with pytest.raises(ValueError, match=r"linear layers alone.*`stages.*` is a Conv2d.*SeqLoRA"):
        make(strategy_class, convolutions())


def test_a_convolution_is_no_target_module(tiny_vit):
    with pytest.raises(ValueError, match=r"linear layers, but 'patch_embed.proj' is a Conv2d.*qkv"):
        add_lora(tiny_vit(), target_modules=["patch_embed.proj"])
