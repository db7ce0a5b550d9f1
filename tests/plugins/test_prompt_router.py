"""The router of prompts: which adapter a prompt gets, before, during and after a stream."""

import json

import pytest
import torch
from avalanche.training import Naive

from support import plugin_of, train
from treelora_avalanche.adapters import AdapterBank, LoRAFactors, add_lora
from treelora_avalanche.models import TokenCrossEntropy
from treelora_avalanche.models.features.discriminant import leave_one_out_distances
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel
from treelora_avalanche.plugins import PromptRouterPlugin, TreeBuilderPlugin
from treelora_avalanche.scenarios import TextTasks
from treelora_avalanche.strategies import SeqLoRA, TreeLoRAStrategy
from treelora_avalanche.tree import AdapterTree

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.fixture
def make_stream(make_language_model, tmp_path):
    """Returns a maker of a model and a stream of texts, from prompts and answers by task."""

    def make(tasks):
        for name, pairs in tasks.items():
            folder = tmp_path / name
            folder.mkdir()
            records = [{"prompt": p, "answer": a} for p, a in pairs]
            (folder / "train.json").write_text(json.dumps(records))
            (folder / "test.json").write_text(
                json.dumps([{"prompt": "x" + p, "answer": a} for p, a in pairs])
            )
        model = make_language_model(n_layers=4)
        return model, TextTasks(tmp_path, model, tasks=list(tasks))

    return make


ANIMALS = [(f"animal {n * n % 17}?", "cat") for n in range(12)]
SUMS = [(f"{n} + {n % 5} =", str(n + n % 5)) for n in range(12)]
MORE_SUMS = [(f"{n} + {n % 4} =", str(n + n % 4)) for n in range(12, 24)]


def options():
    return {"layers": "last:2", "rank": 2, "train_epochs": 1, "evaluator": None, "lr": 0.01}


def test_training_prompts_get_the_adapter_of_their_task(make_stream):
    model, stream = make_stream({"animals": ANIMALS, "sums": SUMS})
    strategy = train(TreeLoRAStrategy(model, **options()), stream)
    assert strategy.inference == "routed"
    for experience in stream.train_stream:
        routes = strategy.route(experience.prompts)
        own = [route.task_name == experience.task_name for route in routes]
        assert sum(own) >= 11, routes


def test_share_of_the_quantile_is_within_the_threshold(make_stream):
    model, stream = make_stream({"animals": ANIMALS, "sums": SUMS})
    strategy = train(TreeLoRAStrategy(model, foreign_quantile=0.5, **options()), stream)
    features = [task.features for task in plugin_of(strategy, PromptRouterPlugin).tasks]
    nearest = leave_one_out_distances(features).amin(1)
    assert (nearest > strategy.model.router.threshold).sum() == 12  # of 24
    routes = strategy.route([*(p for p, _ in ANIMALS), *(f"Z{n}?!" for n in range(8))])
    assert {route.task is None for route in routes} == {True, False}
    for route in routes:
        assert (route.task is None) == (route.distance > route.threshold)


def products(shapes, rows):
    """What the adapter of each layer adds to the weights, B A."""
    parts = (shape.split(row) for shape, row in zip(shapes, rows, strict=True))
    return [b @ a for a, b in parts]


def test_a_task_that_returns_gets_the_mean_of_its_adapters(make_stream):
    """Against the best approximation of the mean of the products, by a truncated SVD."""
    model, stream = make_stream({"a sums": SUMS, "b animals": ANIMALS, "c sums": MORE_SUMS})
    strategy = train(TreeLoRAStrategy(model, foreign_quantile=None, **options()), stream)
    router = plugin_of(strategy, PromptRouterPlugin)
    assert [(task.task, task.n_tasks) for task in router.tasks] == [(1, 1), (2, 2)]
    assert {route.task for route in strategy.route([p for p, _ in SUMS + MORE_SUMS])} == {2}
    assert {route.task for route in strategy.route([p for p, _ in ANIMALS])} == {1}
    factors = LoRAFactors(strategy.model)  # as trained by the last task
    own, first, found = (
        products(factors.shapes, rows)
        for rows in (factors.stack.detach(), strategy.bank[0], strategy.bank[2])
    )
    for one, other, mean in zip(own, first, found, strict=True):
        u, s, vh = torch.linalg.svd((one + other) / 2)
        torch.testing.assert_close(mean, u[:, :2] * s[:2] @ vh[:2], rtol=1e-4, atol=1e-6)


def test_one_task_routes_to_it(make_stream):
    model, stream = make_stream({"animals": ANIMALS})
    strategy = train(TreeLoRAStrategy(model, foreign_quantile=None, **options()), stream)
    assert [route.task for route in strategy.route(["anything at all"])] == [0]
    assert strategy.route(["x"])[0].probability == 1


def test_a_task_of_one_prompt_has_no_foreign_ones(make_stream):
    model, stream = make_stream({"animals": ANIMALS[:1]})
    strategy = train(TreeLoRAStrategy(model, **options()), stream)
    assert [route.task for route in strategy.route(["anything at all"])] == [0]


def test_no_route_before_any_task(make_stream):
    model, _ = make_stream({"animals": ANIMALS})
    strategy = TreeLoRAStrategy(model, **options())
    with pytest.raises(RuntimeError, match="Train a task first"):
        strategy.route(["animal 3?"])


def test_routing_is_refused_where_the_last_adapter_predicts(make_stream):
    model, stream = make_stream({"animals": ANIMALS})
    strategy = train(TreeLoRAStrategy(model, inference="last", **options()), stream)
    with pytest.raises(RuntimeError, match=r"`inference` should be 'routed'.* but it is 'last'"):
        strategy.route(["animal 3?"])


@pytest.mark.parametrize("quantile", [0.0, 1.0, -1, 2])
def test_quantiles_out_of_range_are_refused(make_language_model, quantile):
    with pytest.raises(ValueError, match=f"`quantile` should be above 0 .* but is {quantile}"):
        TreeLoRAStrategy(make_language_model(), foreign_quantile=quantile)


def test_state_restores_the_router(make_stream):
    model, stream = make_stream({"animals": ANIMALS, "sums": SUMS})
    strategy = train(TreeLoRAStrategy(model, **options()), stream)
    plugin = plugin_of(strategy, PromptRouterPlugin)
    other = PromptRouterPlugin(strategy.tree)
    other.load_state_dict(plugin.state_dict())
    before = strategy.route(stream.test_stream[0].prompts)
    strategy.model.router = None
    other.prepare_loaded(strategy)
    assert strategy.route(stream.test_stream[0].prompts) == before
    with pytest.raises(ValueError, match="quantile"):
        PromptRouterPlugin(strategy.tree, quantile=0.5).load_state_dict(plugin.state_dict())


@pytest.mark.parametrize("strategy_class", [SeqLoRA, Naive])
def test_the_plugin_works_with_other_strategies(make_stream, strategy_class):
    model, stream = make_stream({"animals": ANIMALS, "sums": SUMS})
    tree, bank = AdapterTree(), AdapterBank()
    view = RoutedLanguageModel(add_lora(model, layers="last:2", rank=2), bank)
    strategy = strategy_class(
        model=view,
        optimizer=torch.optim.Adam(view.parameters(), lr=0.01),
        criterion=TokenCrossEntropy(),
        train_mb_size=4,
        plugins=[TreeBuilderPlugin(tree, bank), PromptRouterPlugin(tree)],
        evaluator=None,
    )
    train(strategy, stream)
    for k, experience in enumerate(stream.train_stream):
        tasks = [route.task for route in strategy.model.route(experience.prompts)]
        assert tasks.count(k) >= 11
