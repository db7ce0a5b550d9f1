"""Precision of the forward pass, compilation, and nothing in a step that waits for the device."""

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from support import FEW_PROJECTIONS
from treelora_avalanche.models.views.precision import autocast_dtype
from treelora_avalanche.models.views.split_vit import SplitViT
from treelora_avalanche.plugins import ActivationCachePlugin
from treelora_avalanche.registry import METHODS, RunSettings
from treelora_avalanche.runs.setup import Ingredients, build_strategy
from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def make(model, kind=TreeLoRAStrategy, **kwargs):
    torch.manual_seed(1)
    defaults = {
        "layers": "last:2",
        "rank": 2,
        "train_mb_size": 8,
        "train_epochs": 2,
        "eval_mb_size": 16,
        "evaluator": EvaluationPlugin(loggers=[]),
    }
    strategy = kind(model, **{**defaults, **kwargs})
    torch.manual_seed(2)
    return strategy


class Watch(SupervisedPlugin):
    """Precision of what goes through the first adapted layer, of the logits, and the losses."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside, self.inputs, self.losses = set(), set(), set(), []

    def before_training_exp(self, strategy, **kwargs):
        layer = strategy.model.transformer.blocks[strategy.model.n_frozen].attn.qkv
        layer.register_forward_hook(lambda _, inputs, output: self.inside.add(output.dtype))

    def after_forward(self, strategy, **kwargs):
        self.inputs.add(strategy.mb_x.dtype)
        self.outside.add(strategy.mb_output.dtype)
        self.losses.append(strategy.loss)

    def after_backward(self, strategy, **kwargs):
        self.losses[-1] = strategy.loss.item()


class Losses(SupervisedPlugin):
    """Losses of all steps, and the precisions of the logits."""

    def __init__(self):
        super().__init__()
        self.losses, self.dtypes = [], set()

    def before_backward(self, strategy, **kwargs):
        self.losses.append(strategy.loss.detach().float().clone())
        self.dtypes.add(strategy.mb_output.dtype)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_bf16_computes_in_half_the_bits_and_keeps_weights_in_all(tiny_vit, tiny_benchmark):
    losses = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        watch = Watch()
        strategy = make(tiny_vit(), precision=precision, plugins=[watch])
        strategy.train(tiny_benchmark.train_stream)
        losses[precision] = torch.tensor(watch.losses)
        assert watch.inside == {dtype}
        assert watch.inputs == {dtype}  # what the frozen blocks have computed is kept so
        assert watch.outside == {torch.float32}
        assert {p.dtype for p in torch.nn.Module.parameters(strategy.model)} == {torch.float32}
        state = strategy.optimizer.state.values()
        assert {s["exp_avg"].dtype for s in state} == {torch.float32}
    # The same training, up to three significant digits of what is computed on the way.
    assert losses["fp32"].std() > 0.1
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.05, atol=0.02)


def test_features_and_answers_are_float32(tiny_vit, tiny_benchmark):
    strategy = make(
        tiny_vit(), precision="bf16", head="task_adaptive", inference="routed", train_epochs=1
    )
    strategy.train(tiny_benchmark.train_stream[:2])
    statistics = [p for p in strategy.plugins if hasattr(p, "statistics")]
    assert len(statistics) == 2
    for plugin in statistics:
        assert {s.mean.dtype for s in plugin.statistics} == {torch.float32}
    images = torch.stack([x for x, *_ in tiny_benchmark.test_stream[0].dataset])
    strategy.model.eval()
    with torch.no_grad():
        assert strategy.model(images).dtype == torch.float32


METHODS_AT_WORK = [
    (kind, name)
    for name, method in METHODS.items()
    for kind in sorted(method.models)
    if not method.frozen
]


@pytest.mark.parametrize(("kind", "name"), METHODS_AT_WORK)
def test_every_method_learns_nearly_the_same_in_bf16(
    kind, name, tiny_vit, tiny_benchmark, make_language_model, tiny_texts
):
    on_text = kind == "language"
    stream = (tiny_texts if on_text else tiny_benchmark).train_stream[:2]
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = (
            RunSettings(
                scenario="text_tasks", data="-", model="tiny", precision=precision, lr=0.001
            )
            if on_text
            else RunSettings(
                scenario="domains",
                data="-",
                precision=precision,
                rank=2,
                lr=0.001,
                batch_size=16,
                eval_batch_size=16,
                method_options=FEW_PROJECTIONS,
            )
        )
        torch.manual_seed(1)
        seen = Losses()
        model = (
            make_language_model(max_length=40, context=72, n_layers=5)
            if on_text
            else tiny_vit(depth=5)
        )
        strategy = build_strategy(
            name,
            settings,
            Ingredients(0, None, model),
            device="cpu",
            plugins=[seen],
            evaluator=EvaluationPlugin(loggers=[]),
        )
        assert strategy.model.autocast == (torch.bfloat16 if precision == "bf16" else None)
        torch.manual_seed(2)
        strategy.train(stream)
        strategy.eval(stream)
        assert {p.dtype for p in strategy.model.parameters()} == {torch.float32}
        if not on_text:
            assert seen.dtypes == {torch.float32}
        losses[precision] = torch.stack(seen.losses)
    assert losses["bf16"].isfinite().all()
    assert not torch.equal(losses["bf16"], losses["fp32"])
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.1, atol=0.1)


def test_bf16_attention_on_a_cpu_is_that_of_float64(tiny_vit):
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    exact = make(tiny_vit().double(), precision="fp32").model
    model = make(tiny_vit(), precision="bf16").model
    attention = model.transformer.blocks[-2].attn
    assert not attention.fused_attn
    assert exact.transformer.blocks[-2].attn.fused_attn
    hidden = exact.frozen_output(images.double())
    expected = exact.transformer.blocks[-2].attn(hidden)
    with model.autocasting():
        answer = attention(hidden.float())
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_asks_the_processor(monkeypatch, has_it, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    assert autocast_dtype("auto", "cpu") == expected
    assert autocast_dtype("fp32", "cpu") is None
    assert autocast_dtype("bf16", "cpu") == torch.bfloat16


def test_an_unknown_precision_is_refused_before_the_model_is_touched(tiny_vit):
    model = tiny_vit()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"`precision` .*fp32.*'fp16'"):
        make(model, precision="fp16")
    assert [name for name, _ in model.named_parameters()] == names


def test_a_compiled_model_learns_the_same(tiny_vit, tiny_benchmark, monkeypatch):
    compiled = []

    def compile(self):
        compiled.append(self)
        torch.nn.Module.compile(self, backend="aot_eager")  # without a compiler of C++

    monkeypatch.setattr(SplitViT, "compile", compile)
    weights = []
    for flag in (False, True):
        strategy = make(tiny_vit(), kind=SeqLoRA, compile=flag, train_epochs=1)
        strategy.train(tiny_benchmark.train_stream[:2])
        weights.append(dict(strategy.model.named_parameters()))
    assert compiled == [strategy.model]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)


class NoWaiting(SupervisedPlugin):
    """Raises where something in a step waits for the device."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def before_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations:  # the first step makes buffers
            torch.cuda.set_sync_debug_mode("error")
            self.steps += 1

    def after_training_iteration(self, strategy, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("selection", ["lcb", "nearest", "random"])
@pytest.mark.parametrize("cache", [None, "auto"])
def test_no_step_waits_for_the_gpu(tiny_vit, tiny_benchmark, selection, cache):
    watch = NoWaiting()
    strategy = make(
        tiny_vit(),
        device="cuda",
        precision="bf16",
        selection=selection,
        cache=cache,
        head="task_adaptive",
        plugins=[watch],
    )
    strategy.train(tiny_benchmark.train_stream)
    assert watch.steps > 0
    assert next(strategy.model.parameters()).is_cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_kept_comes_from_pinned_memory(tiny_vit, tiny_benchmark):
    pinned = []

    class Seen(ActivationCachePlugin):
        def before_training_epoch(self, strategy, **kwargs):
            pinned.append(next(iter(strategy.dataloader))[0].is_pinned())

    strategy = make(tiny_vit(), device="cuda", plugins=[Seen(None)])
    strategy.train(tiny_benchmark.train_stream[0])
    assert all(pinned)
