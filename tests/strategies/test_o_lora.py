"""O-LoRA, and the past adapters that it shares with InfLoRA."""

import copy

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from peft import LoraConfig, get_peft_model
from torch import nn

from support import make, plugin_of, same, train, weights
from treelora_avalanche.adapters import (
    LoRAFactors,
    PastAdapters,
    TrainableView,
    add_lora,
    load_adapter,
    lora_layers,
    save_adapter,
)
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.models.views.split_vit import trainable_view
from treelora_avalanche.plugins import NonFiniteLossError, OLoRAPlugin
from treelora_avalanche.plugins.baselines.o_lora import overlap
from treelora_avalanche.state import backbone_fingerprint
from treelora_avalanche.strategies import OLoRA, SeqLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

BOTH = {"target_modules": ("qkv", "fc2")}  # of 16 and of 64 inputs


def logits(model, seed=5):
    images = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    model.eval()
    with torch.no_grad():
        return model(images)


def randomize(model, seed):
    """Random factors, like trained ones."""
    stack = LoRAFactors(model).stack
    stack.copy_(torch.randn(stack.shape, generator=torch.Generator().manual_seed(seed)) / 10)


# ------------------------------------------------------------------------------------ past adapters


@pytest.mark.parametrize("rank", [2, 10], ids=["stacked", "as a product"])
def test_past_adapters_act_as_if_merged_into_the_weights(tiny_vit, rank):
    model = add_lora(tiny_vit(), rank=rank, alpha=3, **BOTH)
    past = PastAdapters(model)
    merged = tiny_vit()
    for seed in range(3):
        randomize(model, seed)
        factors = LoRAFactors(model)
        for name, (a, b) in zip(factors.names, factors.parameters, strict=True):
            layer = merged.get_submodule(name.removeprefix("base_model.model."))
            layer.weight.data += 3 / rank * b.detach() @ a.detach()
        before = logits(model)
        torch.testing.assert_close(before, logits(merged), rtol=1e-4, atol=1e-5)
        past.fold()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
        assert len(past) == seed + 1
        assert not any(b.any() for _, b in LoRAFactors(model).parameters)
        assert all(a.any() for a, _ in LoRAFactors(model).parameters)
    products = [layer.past_product is not None for layer in lora_layers(model).values()]
    assert any(products) == (rank == 10)


def test_without_adapters_the_backbone_is_as_it_was_bit_for_bit(tiny_vit):
    model = add_lora(tiny_vit())
    fingerprint = backbone_fingerprint(model)
    names = list(model.state_dict())
    past = PastAdapters(model)
    for seed in range(2):
        randomize(model, seed)
        past.fold()
    assert not torch.allclose(logits(model), logits(tiny_vit()), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_vit()))
    assert backbone_fingerprint(model) == fingerprint
    assert list(model.state_dict()) == names


def test_a_copy_of_the_model_has_its_own_past(tiny_vit):
    view = TrainableView(add_lora(tiny_vit()))
    past = PastAdapters(view)
    randomize(view, 0)
    past.fold()
    twin = copy.deepcopy(view)
    expected = logits(view)
    assert torch.equal(logits(twin), expected)
    randomize(view, 1)
    past.fold()
    assert torch.equal(logits(twin), expected)
    assert not torch.allclose(logits(view), expected, atol=1e-3)


def test_attaching_again_takes_the_past_over(tiny_vit):
    model = add_lora(tiny_vit())
    randomize(model, 0)
    PastAdapters(model).fold()
    expected = logits(model)
    again = PastAdapters(model)
    assert len(again) == 1
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_saved_folder_alone_reproduces_the_model(tiny_vit, tmp_path, rslora):
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=["qkv", "fc2"],
        rank_pattern={"blocks.1.attn.qkv": 2},
        modules_to_save=["head"],
    )
    model = get_peft_model(tiny_vit(), config)
    past = PastAdapters(model)
    folders = []
    for seed in range(3):
        randomize(model, seed)
        nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
        save_adapter(model, tmp_path / str(seed))
        folders.append((tmp_path / str(seed), logits(model)))
        past.fold()
    for folder, expected in folders:
        loaded = load_adapter(tiny_vit(), folder)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_a_past_of_other_layers_is_refused_and_nothing_changes(tiny_vit):
    def folded(**options):
        model = add_lora(tiny_vit(), **options)
        past = PastAdapters(model)
        randomize(model, 0)
        past.fold()
        return model, past

    model, past = folded(rank=4)
    expected = logits(model)
    for options, message in [
        ({"rank": 3}, r"should fit \(4, 16\) and .* but are \(3, 16\) and \(48, 3\)"),
        ({"layers": [0]}, "should be of 3 layers, but are of 1"),
        ({"rank": 4, "target_modules": ["fc2"]}, r"past factors .* but are \(4, 64\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            past.load_state_dict(folded(**options)[1].state_dict())
        assert torch.equal(logits(model), expected)


def test_a_model_without_lora_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="should carry LoRA layers"):
        PastAdapters(tiny_vit())


# -------------------------------------------------------------------------------------- the penalty


def test_overlap_is_the_hand_computed_one():
    past = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]])
    live = torch.tensor([[[3.0, 1.0, 5.0]], [[0.0, 0.0, 4.0]]])
    # Inner products 3, 2 in the first layer, and 4, 0 in the second.
    assert overlap(past, live).item() == 9 + 4 + 16 + 0
    assert overlap(past, -live, "absolute").item() == 3 + 2 + 4 + 0


class Watch(SupervisedPlugin):
    """The penalty as stated, in the loss, and with loops from the factors kept on the way.

    :param value: from an inner product to its part of the penalty.
    :param slope: its derivative.
    """

    def __init__(self, value, slope):
        super().__init__()
        self.value, self.slope = value, slope
        self.stated, self.in_loss, self.by_hand, self.gradients = [], [], [], []
        self.finished = []

    def after_training_exp(self, strategy, *args, **kwargs):
        pairs = LoRAFactors(strategy.model).parameters
        self.finished.append([a.detach().clone() for a, _ in pairs])

    def before_backward(self, strategy, *args, **kwargs):
        loss = nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y)
        live = [a for a, _ in LoRAFactors(strategy.model).parameters]
        by_hand, gradients = 0.0, []
        for layer, a in enumerate(live):
            gradient = torch.zeros_like(a)
            for task in self.finished:
                for row, new in enumerate(a.detach()):
                    for old in task[layer]:
                        by_hand += self.value((old @ new).item())
                        gradient[row] += self.slope((old @ new).item()) * old
            gradients.append(0.5 * gradient)
        self.in_loss.append((strategy.loss - loss).item())
        self.by_hand.append(0.5 * by_hand)
        if self.finished:
            penalty = plugin_of(strategy, OLoRAPlugin).penalty()
            self.stated.append(penalty.item())
            self.gradients.append((torch.autograd.grad(penalty, live), gradients))


@pytest.mark.parametrize(
    ("norm", "value", "slope"),
    [
        ("squared", lambda x: x**2, lambda x: 2 * x),
        ("absolute", abs, lambda x: (x > 0) - (x < 0)),  # the released code's
    ],
)
def test_penalty_is_in_the_loss_and_its_gradient_reaches_every_a(
    tiny_vit, tiny_benchmark, norm, value, slope
):
    strategy = make(OLoRA, tiny_vit(), rank=3, norm=norm, **BOTH)
    watch = Watch(value, slope)
    strategy.plugins.append(watch)  # after the plugin, so that the loss has its penalty
    train(strategy, tiny_benchmark, 0, 1, 2)
    assert watch.in_loss[:8] == [0] * 8
    assert len(watch.stated) == 16
    assert min(watch.stated) > 1e-3
    assert watch.stated == pytest.approx(watch.by_hand[8:], rel=1e-3)
    assert watch.in_loss == pytest.approx(watch.by_hand, rel=1e-3, abs=1e-5)
    for gradients, expected in watch.gradients:
        assert len(gradients) == 6
        for gradient, by_hand in zip(gradients, expected, strict=True):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-6)


def test_strength_makes_new_adapters_orthogonal_to_old_ones(tiny_vit, tiny_benchmark):
    def cosines(orthogonality):
        strategy = make(OLoRA, tiny_vit(), rank=2, train_epochs=25, orthogonality=orthogonality)
        train(strategy, tiny_benchmark, 0, 1)
        past = [nn.functional.normalize(a, dim=1) for a, _ in strategy.past.factors]
        live = [
            nn.functional.normalize(a, dim=1) for a, _ in LoRAFactors(strategy.model).parameters
        ]
        return max((p @ a.T).abs().max().item() for p, a in zip(past, live, strict=True))

    assert cosines(50.0) < 0.05
    assert cosines(0.0) > 0.2


# -------------------------------------------------------------------------------------- in a stream


def test_first_experience_is_that_of_plain_lora(tiny_vit, tiny_benchmark):
    plain = weights(train(make(SeqLoRA, tiny_vit()), tiny_benchmark, 0))
    assert same(plain, weights(train(make(OLoRA, tiny_vit()), tiny_benchmark, 0)))


def test_past_adapters_do_not_move_bit_for_bit(tiny_vit, tiny_benchmark):
    strategy = make(OLoRA, tiny_vit(), rank=3)
    kept = []
    for index in range(3):
        train(strategy, tiny_benchmark, index)
        kept.append([(a.detach().clone(), b.detach().clone()) for a, b in live_of(strategy)])
    assert len(strategy.past) == 2
    for layer, (a, b) in enumerate(strategy.past.factors):
        assert torch.equal(a, torch.cat([kept[task][layer][0] for task in range(2)]))
        assert torch.equal(b, torch.cat([kept[task][layer][1] for task in range(2)], 1))


def live_of(strategy):
    return LoRAFactors(strategy.model).parameters


def test_optimizer_starts_anew_with_every_adapter(tiny_vit, tiny_benchmark):
    strategy = make(OLoRA, tiny_vit())
    train(strategy, tiny_benchmark, 0, 1)
    steps = {
        name: strategy.optimizer.state[p]["step"].item()
        for name, p in strategy.model.named_parameters()
    }
    assert {steps[name] for name in steps if "lora_" in name} == {8}
    assert {steps[name] for name in steps if "head" in name} == {16}


def test_stores_one_adapter_per_task(tiny_vit, tiny_benchmark):
    strategy = make(OLoRA, tiny_vit(), rank=3, layers=[0, 2], target_modules=["qkv"])
    stored = []
    for index in range(3):
        train(strategy, tiny_benchmark, index)
        stored.append(stored_bytes(strategy))
    assert stored == [n * 4 * 2 * 3 * (16 + 48) for n in range(3)]


def test_an_adapter_that_the_user_brings_along_is_kept(tiny_vit, tiny_benchmark):
    model = add_lora(tiny_vit(), rank=3)
    randomize(model, 0)
    given = [a.detach().clone() for a, _ in LoRAFactors(model).parameters]
    strategy = make(OLoRA, model)
    train(strategy, tiny_benchmark, 0)
    assert len(strategy.past) == 1
    assert all(torch.equal(a, g) for (a, _), g in zip(strategy.past.factors, given, strict=True))


def test_an_experience_that_failed_leaves_no_past(tiny_vit, tiny_benchmark):
    class Breaks(SupervisedPlugin):
        def before_backward(self, strategy, *args, **kwargs):
            if strategy.clock.train_exp_counter == 1 and strategy.clock.train_iterations > 10:
                strategy.loss = strategy.loss * float("nan")

    strategy = make(OLoRA, tiny_vit(), plugins=[Breaks()])
    train(strategy, tiny_benchmark, 0)
    expected = logits(strategy.model)
    for _ in range(2):
        with pytest.raises(NonFiniteLossError):
            train(strategy, tiny_benchmark, 1)
        assert len(strategy.past) == 1
        torch.testing.assert_close(logits(strategy.model), expected, rtol=1e-5, atol=1e-5)
        strategy.clock.train_iterations = 8


def test_plugin_attached_to_naive_is_the_strategy(tiny_vit, tiny_benchmark):
    torch.manual_seed(1)
    model = trainable_view(add_lora(tiny_vit()))
    attached = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
        train_mb_size=8,
        train_epochs=2,
        evaluator=None,
        plugins=[OLoRAPlugin(PastAdapters(model))],
    )
    own = make(OLoRA, tiny_vit())
    for strategy in (attached, own):
        train(strategy, tiny_benchmark, 0, 1)
    assert same(weights(attached), weights(own))
    assert torch.equal(logits(attached.model), logits(own.model))


def test_saved_and_loaded_it_goes_on_as_if_uninterrupted(tiny_vit, tiny_benchmark, tmp_path):
    whole = train(make(OLoRA, tiny_vit(), rank=5), tiny_benchmark, 0, 1)
    whole.save(tmp_path / "state")
    model = tiny_vit()
    nn.init.normal_(model.head.weight)
    resumed = make(OLoRA, model, rank=5)
    randomize(resumed.model, 3)
    resumed.load(tmp_path / "state")
    assert torch.equal(logits(whole.model), logits(resumed.model))
    for strategy in (whole, resumed):
        train(strategy, tiny_benchmark, 2)
    assert same(weights(whole), weights(resumed))
    assert torch.equal(logits(whole.model), logits(resumed.model))
    assert len(resumed.past) == 2
    with pytest.raises(
        ValueError, match=r"`orthogonality` should be 0.5, as in the state, but is 1.0"
    ):
        make(OLoRA, tiny_vit(), rank=5, orthogonality=1.0).load(tmp_path / "state")


def test_negative_strength_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="`orthogonality` should be at least 0, but is -1"):
        make(OLoRA, tiny_vit(), orthogonality=-1)
