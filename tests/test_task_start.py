"""Signatures of activations, and the start of a task at a past adapter."""

import pytest
import torch
from avalanche.training.supervised import Naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, TrainableView, add_lora
from treelora_avalanche.models.activations import (
    activation_signature,
    features_of,
    nearest_to_own_class,
)
from treelora_avalanche.plugins import TreeBuilderPlugin
from treelora_avalanche.plugins.task_start import (
    TaskSignaturePlugin,
    TaskStartPlugin,
    clearly_better,
)
from treelora_avalanche.tree import AdapterTree

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def lora_model(tiny_vit, factors_seed=None):
    torch.manual_seed(3)
    model = TrainableView(add_lora(tiny_vit(), rank=2, alpha=2))
    if factors_seed is not None:
        scramble(model, factors_seed)
    return model


def scramble(model, seed):
    """Factors under which nothing can be told from the features."""
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


# -------------------------------------------------------------------------- which start is better


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 12), classes=st.integers(1, 4))
def test_nearest_to_own_class_against_loops(seed, n, classes):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(10, 10 + classes, (n,), generator=generator)
    unit = features / features.norm(dim=1, keepdim=True)
    expected = []
    for i in range(n):
        scores = {}
        for label in set(targets.tolist()):
            rest = [j for j in range(n) if targets[j] == label and j != i]
            if rest:
                mean = unit[rest].sum(0)
                scores[label] = float(unit[i] @ mean / mean.norm())
        expected.append(max(scores, key=scores.get) == targets[i])
    assert nearest_to_own_class(features, targets).tolist() == expected


@pytest.mark.parametrize(
    ("only_candidate", "only_other", "expected"),
    [(0, 0, False), (1, 0, False), (2, 0, True), (5, 2, True), (4, 2, False), (2, 5, False)],
)
def test_clearly_better_is_more_than_a_standard_error(only_candidate, only_other, expected):
    candidate = torch.tensor([True] * only_candidate + [False] * only_other + [True, False])
    other = torch.tensor([False] * only_candidate + [True] * only_other + [True, False])
    assert clearly_better(candidate, other) is expected


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


def parts():
    signature, tree, bank = TaskSignaturePlugin(32), AdapterTree(), AdapterBank()
    start = TaskStartPlugin(signature, tree, bank)
    return signature, start, TreeBuilderPlugin(tree, bank, signature)


def test_the_tree_holds_the_signatures_of_the_tasks(tiny_vit, tiny_benchmark):
    model = lora_model(tiny_vit)
    signature, start, builder = parts()
    strategy = strategy_with(model, [signature, start, builder])
    for experience in tiny_benchmark.train_stream:
        strategy.train(experience)
    assert start.tree.signatures.shape == (3, 3, 16)
    for k, experience in enumerate(tiny_benchmark.train_stream):
        x = torch.stack([sample[0] for sample in experience.dataset])
        # All 32 images were looked at, so the samples are no matter of chance.
        assert len(x) == 32
        assert torch.allclose(start.tree.signatures[k], activation_signature(model, x), atol=1e-6)


def ready(tiny_vit, tiny_benchmark, live_seed, past_seed):
    """A strategy with one finished task, about to learn that task again."""
    model = lora_model(tiny_vit)
    signature, start, _ = parts()
    experience = tiny_benchmark.train_stream[0]
    x = torch.stack([sample[0] for sample in experience.dataset])
    start.tree.insert(activation_signature(model, x))
    if past_seed is not None:
        scramble(model, past_seed)
    start.bank.append(LoRAFactors(model))
    model = lora_model(tiny_vit, live_seed)
    strategy = strategy_with(model, [])
    strategy.experience = experience
    signature.before_training_exp(strategy)
    for parameter in model.parameters():
        strategy.optimizer.state[parameter] = {"step": torch.tensor(1.0)}
    return strategy, start


def test_the_task_begins_at_the_past_adapter_that_is_better(tiny_vit, tiny_benchmark):
    strategy, start = ready(tiny_vit, tiny_benchmark, live_seed=1, past_seed=None)
    start.before_training_exp(strategy)
    factors = LoRAFactors(strategy.model)
    assert start.starts == [0]
    assert torch.equal(factors.stack, start.bank[0])
    moved = {id(parameter) for pair in factors.parameters for parameter in pair}
    kept = {id(parameter) for parameter in strategy.optimizer.state}
    assert not moved & kept
    assert len(kept) == 2  # weight and bias of the classifier


def test_the_task_goes_on_from_the_live_adapter_that_is_better(tiny_vit, tiny_benchmark):
    strategy, start = ready(tiny_vit, tiny_benchmark, live_seed=None, past_seed=1)
    live = LoRAFactors(strategy.model).stack.clone()
    start.before_training_exp(strategy)
    assert start.starts == [None]
    assert torch.equal(LoRAFactors(strategy.model).stack, live)
    assert len(strategy.optimizer.state) == len(list(strategy.model.parameters()))


def test_the_nearest_task_is_the_nearest_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    tree = AdapterTree()
    signatures = torch.randn(9, 4, 6, generator=generator)
    for row in signatures:
        tree.insert(row)
    start = TaskStartPlugin(TaskSignaturePlugin(), tree, AdapterBank())
    for query in torch.randn(20, 4, 6, generator=generator):
        distances = [sum((a - b).abs().sum() for a, b in zip(query, s)) for s in signatures]  # noqa: B905
        assert start.nearest(query) == min(range(9), key=lambda k: distances[k])


def test_features_are_what_the_classifier_is_given(tiny_vit):
    model, x = lora_model(tiny_vit), images()
    plain = tiny_vit().eval()
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(x), pre_logits=True)
    assert torch.allclose(features_of(model, x), expected, atol=1e-5)


def test_the_stream_goes_on_from_a_saved_state():
    signature, start, _ = parts()
    start.starts = [None, 0, None]
    twin_signature, twin, _ = parts()
    twin.load_state_dict(start.state_dict())
    twin_signature.load_state_dict(signature.state_dict())
    assert twin.starts == [None, 0, None]
    with pytest.raises(ValueError, match=r"`n_samples` is 32 in the state, and 64 here"):
        TaskSignaturePlugin().load_state_dict(signature.state_dict())
    with pytest.raises(ValueError, match="`n_samples` must be at least 1, and is 0"):
        TaskSignaturePlugin(0)
