"""L2P: a pool of prompts, matched per sample by cosine."""

from functools import partial

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import support
from support import images_of
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.models.prompts.pools import PromptPool
from treelora_avalanche.plugins import KeyLossPlugin
from treelora_avalanche.state import clone_state
from treelora_avalanche.strategies import L2P, SeqLoRA

make = partial(support.make, L2P, lr=0.01)


pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


# ---------------------------------------------------------------------------------------- the pool


@given(
    pool_size=st.integers(1, 9),
    top_k=st.integers(1, 4),
    batch=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_picks_what_brute_force_cosine_picks(pool_size, top_k, batch, seed):
    top_k = min(top_k, pool_size)
    torch.manual_seed(seed)
    pool = PromptPool(pool_size=pool_size, length=2, top_k=top_k, dim=6)
    queries = torch.randn(batch, 6)
    picks = pool.pick(queries)
    prompts = pool.take(picks)
    assert prompts.shape == (batch, top_k * 2, 6)
    distance = 0.0
    for row, query in enumerate(queries):
        cosines = [float(query @ key / (query.norm() * key.norm())) for key in pool.keys.detach()]
        nearest = sorted(range(pool_size), key=lambda i: -cosines[i])[:top_k]
        assert picks[row].tolist() == nearest
        assert torch.equal(prompts[row], torch.cat([pool.prompts[i] for i in nearest]))
        distance += sum(1 - cosines[i] for i in nearest) / batch
    assert pool.distance(queries, picks).item() == pytest.approx(distance, abs=1e-5)


def test_key_loss_reaches_the_picked_keys_alone():
    torch.manual_seed(0)
    pool = PromptPool(pool_size=6, length=2, top_k=2, dim=4)
    queries = torch.randn(3, 4)
    picks = pool.pick(queries)
    pool.distance(queries, picks).backward()
    moved = pool.keys.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == sorted(set(picks.flatten().tolist()))
    assert pool.prompts.grad is None


# --------------------------------------------------------------------------------------- the model


@torch.no_grad()
def test_forward_equals_the_transformer_by_hand(tiny_vit, tiny_benchmark):
    model = make(tiny_vit(), pool_size=7, prompt_length=3, top_k=2).model.eval()
    images = images_of(tiny_benchmark.test_stream[:1])
    vit, bare = model.module.vit, tiny_vit().eval()
    query = bare.forward_features(images)[:, 0]
    picks = (
        torch.nn.functional.cosine_similarity(query[:, None], model.module.pool.keys[None], dim=2)
        .topk(2)
        .indices
    )
    tokens = bare._pos_embed(bare.patch_embed(images))
    hidden = torch.cat((model.module.pool.prompts[picks].flatten(1, 2), tokens), 1)
    for block in bare.blocks:
        hidden = block(hidden)
    features = bare.norm(hidden)[:, :6].mean(1)
    torch.testing.assert_close(model(images), vit.head(features))


def test_prediction_does_not_depend_on_the_batch(tiny_vit, tiny_benchmark):
    strategy = make(tiny_vit())
    strategy.train(tiny_benchmark.train_stream[:2])
    strategy.model.eval()
    images = images_of(tiny_benchmark.test_stream)
    with torch.no_grad():
        picks = strategy.model.module.pool.pick(strategy.model.module.query(images))
        together = strategy.model(images)
        alone = torch.cat([strategy.model(image[None]) for image in images])
    assert len(picks.unique(dim=0)) > 1  # samples of a batch do pick differently
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ the strategy


@pytest.mark.parametrize("head", ["linear", "task_adaptive"])
def test_trains_prompts_keys_and_classifier_and_nothing_else(tiny_vit, tiny_benchmark, head):
    strategy = make(tiny_vit(), head=head)
    parameters = dict(strategy.model.module.named_parameters())
    trained = {"vit.head.weight", "vit.head.bias", "pool.prompts", "pool.keys"}
    assert {name for name, p in parameters.items() if p.requires_grad} == trained
    before = {name: p.detach().clone() for name, p in parameters.items()}
    strategy.train(tiny_benchmark.train_stream[:2])
    same = {name for name, p in parameters.items() if torch.equal(before[name], p)}
    assert same == set(parameters) - trained
    assert not strategy.model.module.vit.training


def test_rows_of_absent_classes_do_not_move(tiny_vit, tiny_benchmark):
    strategy = make(tiny_vit())
    classifier = classifier_of(strategy.model)
    before = classifier.weight.detach().clone()
    strategy.train(tiny_benchmark.train_stream[0])
    moved = (classifier.weight != before).any(1)
    assert moved.tolist() == [True, True, False, False, False, False]
    assert isinstance(strategy._criterion, nn.CrossEntropyLoss)


def test_key_loss_is_added_with_its_coefficient(tiny_vit, tiny_benchmark):
    class Losses(KeyLossPlugin):
        seen = ()

        def before_backward(self, strategy, **kwargs):
            without, distance = strategy.loss.item(), self._keyed.key_distance.item()
            super().before_backward(strategy, **kwargs)
            self.seen = (*self.seen, (without, distance, strategy.loss.item()))

    strategy = make(tiny_vit(), sim_coefficient=0.7)
    index = next(i for i, p in enumerate(strategy.plugins) if type(p) is KeyLossPlugin)
    assert strategy.plugins[index].sim_coefficient == 0.7
    strategy.plugins[index] = losses = Losses(0.7)
    strategy.train(tiny_benchmark.train_stream[0])
    assert len(losses.seen) == 8
    for without, distance, total in losses.seen:
        assert distance > 0
        assert total == pytest.approx(without + 0.7 * distance, rel=1e-5)
    assert strategy.model.module.key_distance is None


def test_nothing_is_stored_per_task(tiny_vit, tiny_benchmark):
    strategy = make(tiny_vit())
    for experience in tiny_benchmark.train_stream:
        strategy.train(experience)
        assert stored_bytes(strategy) == 0
    pool = strategy.model.module.pool
    assert sum(p.numel() for p in pool.parameters()) == 30 * (5 + 1) * 16


def test_learning_rate_is_that_of_the_default_optimizer(tiny_vit):
    assert make(tiny_vit(), lr=0.02).optimizer.param_groups[0]["lr"] == 0.02
    assert support.make(L2P, tiny_vit()).optimizer.param_groups[0]["lr"] == 0.03
    given = support.make(L2P, tiny_vit(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    assert given.optimizer.param_groups[0]["lr"] == 0.5


# --------------------------------------------------------------------------- refused arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 0}, "`pool_size` should be at least 1, but is 0"),
        ({"prompt_length": 0}, "`prompt_length` should be at least 1"),
        ({"pool_size": 3}, "`top_k` should be at most 3, the size of the pool, but is 5"),
        ({"sim_coefficient": -1.0}, "`sim_coefficient` should be at least 0, but is"),
        ({"head": "taskadaptive"}, "`head`"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(tiny_vit, options, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        make(model, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_other_models_are_refused(tiny_vit):
    resnet = timm.create_model("resnet10t", num_classes=4)
    with pytest.raises(ValueError, match="a VisionTransformer of timm for L2P, but is a ResNet"):
        make(resnet)
    with pytest.raises(ValueError, match="should have a linear classifier"):
        make(tiny_vit(num_classes=0))


def test_key_loss_needs_keys(tiny_vit, tiny_benchmark):
    strategy = SeqLoRA(
        tiny_vit(), train_mb_size=8, train_epochs=1, evaluator=None, plugins=[KeyLossPlugin(0.5)]
    )
    with pytest.raises(ValueError, match="should have keyed prompts, but is a"):
        strategy.train(tiny_benchmark.train_stream[0])


def test_another_coefficient_is_refused(tiny_vit, tiny_benchmark):
    state = clone_state(make(tiny_vit()).state_dict())
    with pytest.raises(
        ValueError, match=r"`sim_coefficient` should be 0\.5, as in the state, but is 1\.0"
    ):
        make(tiny_vit(), sim_coefficient=1.0).load_state_dict(state)
