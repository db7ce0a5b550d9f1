"""Activation signatures, and tasks that start from a past adapter."""

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, TrainableView, add_lora
from treelora_avalanche.models.features.extraction import features_of
from treelora_avalanche.models.features.signature import activation_signature
from treelora_avalanche.plugins import TaskStartPlugin, TreeBuilderPlugin
from treelora_avalanche.tree import AdapterTree

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def lora_model(tiny_vit, factors_seed=None):
    torch.manual_seed(3)
    model = TrainableView(add_lora(tiny_vit(), rank=2, alpha=2))
    if factors_seed is not None:
        scramble(model, factors_seed)
    return model


def scramble(model, seed):
    """Sets factors that make the features useless."""
    stack = LoRAFactors(model).stack
    stack.copy_(30 * torch.randn(stack.shape, generator=torch.Generator().manual_seed(seed)))


def images(n=7, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------- the signatures


def test_signature_is_the_mean_input_of_each_adapted_layer_of_the_frozen_model(tiny_vit):
    model, plain, x = lora_model(tiny_vit, factors_seed=1), tiny_vit().eval(), images()
    with torch.no_grad():
        hidden = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(x))))
        expected = []
        for block in plain.blocks:
            mean = block.norm1(hidden).mean((0, 1))
            expected.append(mean / mean.abs().sum())
            hidden = block(hidden)
    assert torch.allclose(activation_signature(model, x), torch.stack(expected), atol=1e-6)


def test_signature_leaves_factors_mode_and_random_state_as_they_were(tiny_vit):
    model = lora_model(tiny_vit, factors_seed=1).train()
    before, state = LoRAFactors(model).stack.clone(), torch.get_rng_state()
    activation_signature(model, images())
    assert torch.equal(LoRAFactors(model).stack, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_wide_layer_is_sampled_and_the_same_coordinates_are_taken_again(tiny_vit):
    model = lora_model(tiny_vit)
    whole, some = (activation_signature(model, images(), size=size) for size in (256, 5))
    assert some.shape == (3, 5)
    assert some.abs().sum(1).tolist() == pytest.approx([1.0] * 3)
    for row, values in zip(whole, some, strict=True):
        # Five values of the row, in their order, scaled to an L1 norm of 1.
        samples = torch.combinations(row, 5)
        samples = samples / samples.abs().sum(1, keepdim=True)
        assert (samples - values).abs().amax(1).min() < 1e-5
    assert torch.equal(activation_signature(model, images(), size=5), some)


class Tokens(nn.Module):
    """An embedding and one block; padding has the first token's embedding, as in our wrapper."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"qkv": nn.Linear(4, 4)})])

    def forward(self, tokens):
        return self.blocks[0]["qkv"](self.embedding(tokens.clamp(min=0)))


def test_padding_has_no_part_in_the_mean():
    model = add_lora(Tokens(), rank=1, alpha=1)
    tokens = torch.tensor([[1, 2, -1, -1], [3, 3, 4, -1]])
    embedding = model.get_submodule("base_model.model.embedding").weight.detach()
    mean = embedding[[1, 2, 3, 3, 4]].mean(0)
    found = activation_signature(model, tokens)
    assert torch.allclose(found, (mean / mean.abs().sum())[None], atol=1e-6)


# -------------------------------------------------------------------------------------- the plugins


def strategy_with(model, plugins, **options):
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        train_mb_size=8,
        train_epochs=1,
        plugins=plugins,
        evaluator=None,
        **options,
    )


def parts(n_samples=32):
    tree, bank = AdapterTree(), AdapterBank()
    return TaskStartPlugin(tree, bank, n_samples), TreeBuilderPlugin(tree, bank)


def images_of(experience):
    return torch.stack([sample[0] for sample in experience.dataset])


def test_it_keeps_the_signatures_of_the_tasks(tiny_vit, tiny_benchmark):
    model = lora_model(tiny_vit)
    start, builder = parts()
    strategy = strategy_with(model, [start, builder])
    for experience in tiny_benchmark.train_stream:
        strategy.train(experience)
    for signature, experience in zip(start.signatures, tiny_benchmark.train_stream, strict=True):
        x = images_of(experience)
        # The signature uses all 32 images, so the choice of samples does not matter.
        assert len(x) == 32
        assert torch.allclose(signature, activation_signature(model, x), atol=1e-6)


class Begun(SupervisedPlugin):
    """Records the adapter and the optimizer state at the first step of an experience."""

    def __init__(self):
        super().__init__()
        self.stacks, self.remembered = [], []

    def before_training_iteration(self, strategy, *args, **kwargs):
        if strategy.clock.train_exp_iterations == 0:
            self.stacks.append(LoRAFactors(strategy.model).stack.clone())
            self.remembered.append(len(strategy.optimizer.state))


def test_a_task_that_returns_begins_at_its_own_adapter(tiny_vit, tiny_benchmark):
    start, builder = parts()
    begun = Begun()
    strategy = strategy_with(lora_model(tiny_vit), [start, builder, begun])
    tasks = list(tiny_benchmark.train_stream)
    for task in (0, 1, 2, 1):
        strategy.train(tasks[task])
    assert start.starts[0] is None
    assert start.starts[3] == 1
    assert torch.equal(begun.stacks[3], start.bank[1])
    assert not torch.equal(start.bank[1], start.bank[2])
    assert begun.remembered[3] == 2, "the optimizer goes on for the classifier's two tensors alone"


def test_other_plugins_see_the_adapter_of_the_predictions(tiny_vit, tiny_benchmark):
    start, builder = parts()
    strategy = strategy_with(lora_model(tiny_vit), [start, builder])
    tasks = list(tiny_benchmark.train_stream)
    for task in (0, 1):
        strategy.train(tasks[task])
    strategy.experience = tasks[0]
    live = LoRAFactors(strategy.model).stack.clone()
    start.before_training_exp(strategy)
    assert torch.equal(LoRAFactors(strategy.model).stack, live)


def test_the_nearest_task_is_the_nearest_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    start = TaskStartPlugin(AdapterTree(), AdapterBank())
    start.signatures = list(torch.randn(9, 4, 6, generator=generator))
    for query in torch.randn(20, 4, 6, generator=generator):
        distances = [float((query - s).abs().sum()) for s in start.signatures]
        assert start.nearest(query) == distances.index(min(distances))


def test_features_are_the_inputs_of_the_classifier(tiny_vit):
    model, x = lora_model(tiny_vit), images()
    plain = tiny_vit().eval()
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(x), pre_logits=True)
    assert torch.allclose(features_of(model, x), expected, atol=1e-5)


def test_the_stream_goes_on_from_a_saved_state():
    start, _ = parts()
    start.starts = [None, 0]
    start.signatures = [torch.zeros(2, 3), torch.ones(2, 3)]
    twin, _ = parts()
    twin.load_state_dict(start.state_dict())
    assert twin.starts == [None, 0]
    assert twin.nearest(torch.full((2, 3), 0.9)) == 1
    with pytest.raises(ValueError, match=r"`n_samples` should be 32, as in the state, but is 64"):
        TaskStartPlugin(AdapterTree(), AdapterBank()).load_state_dict(start.state_dict())
    with pytest.raises(ValueError, match="`n_samples` should be at least 1, but is 0"):
        TaskStartPlugin(AdapterTree(), AdapterBank(), n_samples=0)
