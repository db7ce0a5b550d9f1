"""Routed inference: each sample uses one of the finished adapters."""

import copy

import pytest
import torch
from torch import nn

from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.models.views.router import RoutedView, Router
from treelora_avalanche.plugins import RouterPlugin
from treelora_avalanche.strategies import TreeLoRAStrategy

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.fixture
def trained(tiny_vit, tiny_benchmark):
    """A routed strategy after three tasks, whose adapters differ."""
    torch.manual_seed(1)
    strategy = TreeLoRAStrategy(
        tiny_vit(),
        inference="routed",
        layers="last:2",
        head="task_adaptive",
        train_mb_size=8,
        train_epochs=3,
        eval_mb_size=16,
        evaluator=None,
    )
    strategy.train(tiny_benchmark.train_stream)
    strategy.model.eval()
    return strategy


@pytest.fixture
def images(tiny_benchmark):
    return torch.stack([x for e in tiny_benchmark.test_stream for x, *_ in e.dataset])


def always(router: Router, adapter: int) -> Router:
    """A router that sends every sample to one adapter."""
    return router._replace(adapter=torch.full_like(router.adapter, adapter))


@torch.no_grad()
def test_routing_with_the_true_adapter_equals_that_adapters_own_output(trained, images):
    router = trained.model.router
    factors = LoRAFactors(trained.model)
    active = factors.stack.clone()
    for adapter in range(3):
        trained.model.router = always(router, adapter)
        routed = trained.model(images)
        factors.stack.copy_(trained.bank[adapter])
        assert torch.equal(routed, trained.model.forward_active(images))
        factors.stack.copy_(active)


@torch.no_grad()
def test_each_sample_gets_the_output_of_its_own_adapter(trained, images):
    router = trained.model.router
    chosen = router(trained.model.frozen_features(images))
    assert len(chosen.unique()) > 1
    routed = trained.model(images)
    for adapter in range(3):
        trained.model.router = always(router, adapter)
        own = trained.model(images)
        rows = chosen == adapter
        torch.testing.assert_close(routed[rows], own[rows], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prediction_does_not_depend_on_the_batch(trained, images):
    together = trained.model(images)
    alone = torch.cat([trained.model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_frozen_features_are_those_of_the_model_without_adapter(trained, tiny_vit, images):
    bare = tiny_vit().eval()
    expected = bare.forward_head(bare.forward_features(images), pre_logits=True)
    torch.testing.assert_close(trained.model.frozen_features(images), expected)


@torch.no_grad()
def test_active_adapter_is_restored_after_routing_and_used_in_training_mode(trained, images):
    active = LoRAFactors(trained.model).stack.clone()
    trained.model(images)
    assert torch.equal(LoRAFactors(trained.model).stack, active)
    trained.model.train()
    assert torch.equal(trained.model(images), trained.model.forward_active(images))


def test_router_adds_up_the_classes_of_an_adapter_by_hand():
    # Two classes of adapter 0 at 0.3 each beat one class of adapter 1 at 0.4.
    probabilities = torch.tensor([[0.3, 0.4, 0.3]])
    router = Router(torch.eye(3), torch.zeros(3), torch.tensor([0, 1, 0]))
    assert router(probabilities.log()).tolist() == [0]


def test_routing_follows_merged_adapters(tiny_vit, tiny_benchmark, images):
    strategy = TreeLoRAStrategy(
        tiny_vit(),
        inference="routed",
        head="task_adaptive",
        max_adapters=2,
        train_mb_size=8,
        train_epochs=2,
        evaluator=None,
    )
    strategy.train(tiny_benchmark.train_stream)
    adapters = strategy.model.router.adapter.tolist()
    router = next(p for p in strategy.plugins if isinstance(p, RouterPlugin))
    for statistics, adapter in zip(router.statistics, adapters, strict=True):
        assert statistics.task in strategy.tree.tasks[adapter]


def test_a_copy_routes_too(trained, images):
    twin = copy.deepcopy(trained.model)
    assert isinstance(twin, RoutedView)
    with torch.no_grad():
        assert torch.equal(twin(images), trained.model(images))


def test_a_model_that_is_no_vision_transformer_is_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"timm VisionTransformer.*inference='last'"):
        TreeLoRAStrategy(model, inference="routed", layers="all", target_modules=["0"])
