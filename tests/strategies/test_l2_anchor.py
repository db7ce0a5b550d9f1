"""L2Anchor: the squared L2 penalty towards the previous adapter."""

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from support import make, plugin_of, same, train, weights
from treelora_avalanche.adapters import LoRAFactors, add_lora
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.models.views.split_vit import trainable_view
from treelora_avalanche.plugins import L2AnchorPlugin
from treelora_avalanche.strategies import L2Anchor, SeqLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


class Watch(SupervisedPlugin):
    """The penalty as returned by the plugin, as part of the loss, and by hand."""

    def __init__(self):
        super().__init__()
        self.penalties, self.by_hand, self.in_loss, self.gradients = [], [], [], []

    def before_training_exp(self, strategy, *args, **kwargs):
        self.start = LoRAFactors(strategy.model).stack.clone()

    def before_backward(self, strategy, *args, **kwargs):
        if strategy.clock.train_exp_counter == 0:
            return
        penalty = plugin_of(strategy, L2AnchorPlugin).penalty()
        factors = LoRAFactors(strategy.model)
        parameters = [p for pair in factors.parameters for p in pair]
        gradients = torch.autograd.grad(penalty, parameters)
        moved = factors.stack - self.start
        expected = [
            3 * 2 * part
            for row, shape in zip(moved, factors.shapes, strict=True)
            for part in shape.split(row)
        ]
        self.gradients.append((gradients, expected))
        self.penalties.append(penalty.item())
        self.by_hand.append(3 * sum(value**2 for value in moved.flatten().tolist()))
        loss = nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y)
        self.in_loss.append((strategy.loss - loss).item())


def test_penalty_is_the_squared_distance_from_the_second_experience_on(tiny_vit, tiny_benchmark):
    strategy = make(L2Anchor, tiny_vit(), strength=3.0)
    watch = Watch()
    strategy.plugins.append(watch)  # after the plugin, so that the loss has its penalty
    train(strategy, tiny_benchmark, 0, 1)
    assert len(watch.penalties) == 8
    assert watch.penalties[0] == 0
    assert min(watch.penalties[1:]) > 0
    assert watch.penalties == pytest.approx(watch.by_hand, rel=1e-4)
    assert watch.in_loss == pytest.approx(watch.by_hand, rel=1e-3, abs=1e-5)
    for gradients, expected in watch.gradients:
        for gradient, by_hand in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-6)


def test_without_strength_it_is_plain_lora_bit_for_bit(tiny_vit, tiny_benchmark):
    plain = train(make(SeqLoRA, tiny_vit()), tiny_benchmark, 0, 1)
    assert same(
        weights(plain), weights(train(make(L2Anchor, tiny_vit(), strength=0), tiny_benchmark, 0, 1))
    )


def test_first_experience_is_that_of_plain_lora(tiny_vit, tiny_benchmark):
    plain = train(make(SeqLoRA, tiny_vit()), tiny_benchmark, 0)
    anchored = train(make(L2Anchor, tiny_vit(), strength=1e6), tiny_benchmark, 0)
    assert same(weights(plain), weights(anchored))


def test_pull_holds_the_adapter(tiny_vit, tiny_benchmark):
    def moved(strength):
        strategy = make(L2Anchor, tiny_vit(), strength=strength, train_epochs=6)
        train(strategy, tiny_benchmark, 0)
        before = LoRAFactors(strategy.model).stack.clone()
        train(strategy, tiny_benchmark, 1)
        return (LoRAFactors(strategy.model).stack - before).norm().item()

    free, pulled, held = moved(0.0), moved(1.0), moved(1000.0)
    assert held < 0.5 * pulled < 0.5 * free


def test_plugin_attached_to_naive_is_the_strategy(tiny_vit, tiny_benchmark):
    torch.manual_seed(1)
    model = trainable_view(add_lora(tiny_vit()))
    attached = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
        train_mb_size=8,
        train_epochs=2,
        evaluator=None,
        plugins=[L2AnchorPlugin(2.0)],
    )
    own = make(L2Anchor, tiny_vit(), strength=2.0)
    for strategy in (attached, own):
        train(strategy, tiny_benchmark, 0, 1)
    assert same(weights(attached), weights(own))


def test_stores_nothing_from_task_to_task(tiny_vit, tiny_benchmark):
    strategy = train(make(L2Anchor, tiny_vit()), tiny_benchmark, 0, 1)
    assert stored_bytes(strategy) == 0
    assert not any(
        isinstance(v, torch.Tensor) for v in vars(plugin_of(strategy, L2AnchorPlugin)).values()
    )
    with pytest.raises(RuntimeError, match="penalty needs a past adapter"):
        plugin_of(strategy, L2AnchorPlugin).penalty()


def test_saved_and_loaded_it_goes_on_as_if_uninterrupted(tiny_vit, tiny_benchmark, tmp_path):
    whole = train(make(L2Anchor, tiny_vit()), tiny_benchmark, 0, 1)
    whole.save(tmp_path / "state")
    model = tiny_vit()
    nn.init.normal_(model.head.weight)
    resumed = make(L2Anchor, model)
    resumed.load(tmp_path / "state")
    assert same(weights(whole), weights(resumed))
    for strategy in (whole, resumed):
        train(strategy, tiny_benchmark, 2)
    assert same(weights(whole), weights(resumed))
    with pytest.raises(ValueError, match=r"`strength` should be 1.0, as in the state, but is 2.0"):
        make(L2Anchor, tiny_vit(), strength=2.0).load(tmp_path / "state")


def test_negative_strength_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="`strength` should be at least 0, but is -1"):
        make(L2Anchor, tiny_vit(), strength=-1)
