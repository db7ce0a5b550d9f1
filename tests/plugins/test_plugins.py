"""Tree builder, selectors and sparse update, alone and in Avalanche's own strategies."""

import math

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import EWC, Naive
from hypothesis import given
from hypothesis import strategies as st

from treelora_avalanche.adapters import (
    AdapterBank,
    LoRAFactors,
    SignatureSketch,
    TrainableView,
    add_lora,
)
from treelora_avalanche.adapters.factors import LayerShape
from treelora_avalanche.bandit import LCBSearch
from treelora_avalanche.plugins import (
    FiniteLossPlugin,
    LCBSelectorPlugin,
    NearestSelectorPlugin,
    NonFiniteLossError,
    RandomSelectorPlugin,
    SparseUpdatePlugin,
    TreeBuilderPlugin,
    proximal_step,
)
from treelora_avalanche.plugins.sparse_update import proximal_step_
from treelora_avalanche.tree import AdapterTree

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

finite = st.floats(-10, 10)


def lora_model(tiny_vit):
    torch.manual_seed(3)
    return TrainableView(add_lora(tiny_vit(), rank=2, alpha=2))


def built_in(strategy_class, model, plugins, lr=0.01, **options):
    return strategy_class(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=lr),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=2,
        eval_mb_size=8,
        plugins=plugins,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
        **options,
    )


def parts(tree_lambda=0.1, selector_class=LCBSelectorPlugin, **tree_options):
    tree, bank = AdapterTree(**tree_options), AdapterBank()
    selector = selector_class(tree)
    return (
        TreeBuilderPlugin(tree, bank),
        selector,
        SparseUpdatePlugin(selector, bank, tree_lambda),
    )


class Recorder(SupervisedPlugin):
    """Calls a function after every update, after the plugins before it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def after_update(self, strategy, *args, **kwargs):
        self.function(strategy)


def test_selection_and_penalty_compile_to_one_graph():
    # A CUDA graph or a compiled step allows no synchronisation and no new buffers.
    generator = torch.Generator().manual_seed(0)
    signatures = torch.randn(20, 4, 8, generator=generator)
    adapters = torch.randn(20, 4, 14, generator=generator)
    noise = 0.05 * torch.randn(12, 4, 14, generator=generator)
    layers = torch.arange(4)
    results = []
    for compiled in (False, True):
        tree = AdapterTree.build(torch.nn.functional.normalize(signatures, p=1.0, dim=-1), depth=2)
        search = LCBSearch(tree.flatten(), 4, horizon=12)
        sketch = SignatureSketch([LayerShape(2, 3, 4)] * 4, size=8)
        factors = adapters.mean(0)
        start = sketch(factors)

        def step(factors, search=search, sketch=sketch, start=start, tree=tree):
            arms = search.select()
            signature = sketch.direction(factors, start)
            search.update((signature - tree.signatures[arms, layers]).abs().sum(-1))
            proximal_step_(factors, adapters[arms, layers], 0.01)
            return arms

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        arms = [run(factors.add_(each)) for each in noise]
        results.append((torch.stack(arms), factors, search.bounds, search.means, search.counts))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# ----------------------------------------------------------------------------- the proximal step


@given(theta=finite, anchor=finite, threshold=st.floats(0, 5))
def test_proximal_step_minimises_the_penalised_distance(theta, anchor, threshold):
    stepped = proximal_step(
        torch.tensor([theta], dtype=torch.float64),
        torch.tensor([anchor], dtype=torch.float64),
        threshold,
    ).item()
    closed = anchor + math.copysign(max(abs(theta - anchor) - threshold, 0.0), theta - anchor)
    assert stepped == pytest.approx(closed, abs=1e-12)

    def objective(x):
        return 0.5 * (x - theta) ** 2 + threshold * abs(x - anchor)

    around = [stepped + offset for offset in (-0.1, -1e-3, 1e-3, 0.1)] + [theta, anchor]
    assert all(objective(stepped) <= objective(x) + 1e-9 for x in around)


def test_proximal_step_puts_near_coordinates_exactly_on_the_anchor():
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(5, 1000, generator=generator)
    theta = anchor + 0.01 * torch.randn(5, 1000, generator=generator)
    distance = (theta - anchor).abs()
    stepped = proximal_step(theta, anchor, 0.01)
    assert 0.5 < (distance <= 0.01).float().mean() < 0.8
    assert torch.equal(stepped[distance <= 0.01], anchor[distance <= 0.01])
    assert (stepped != anchor)[distance > 0.0101].all()


def test_negative_strength_is_refused():
    with pytest.raises(ValueError, match=r"should be at least 0, but is -0\.1"):
        parts(tree_lambda=-0.1)
    with pytest.raises(ValueError, match="should be at least 0, but is nan"):
        parts(tree_lambda=math.nan)


# ------------------------------------------------------- each part attached to another strategy


def test_builder_stores_every_task_and_never_changes_the_training(tiny_vit, tiny_benchmark):
    def run(plugins):
        strategy = built_in(Naive, lora_model(tiny_vit), plugins)
        states = []
        for experience in tiny_benchmark.train_stream:
            torch.manual_seed(experience.current_experience)
            strategy.train(experience)
            states.append(LoRAFactors(strategy.model).stack.clone())
        return states

    builder, *_ = parts()
    watched, plain = run([builder]), run([])
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
    assert torch.equal(builder.bank.factors, torch.stack(plain))
    assert builder.tree.tasks == [[0], [1], [2]]
    # Each layer's signature is the normalised movement over all of its 160 coordinates.
    moved = plain[1] - plain[0]
    expected = moved / moved.abs().sum(1, keepdim=True)
    torch.testing.assert_close(builder.tree.signatures[1], expected)


def test_tree_and_bank_merge_alike(tiny_vit, tiny_benchmark):
    builder, *_ = parts(max_adapters=2)
    strategy = built_in(Naive, lora_model(tiny_vit), [builder])
    strategy.train(tiny_benchmark.train_stream)
    assert len(builder.bank) == len(builder.tree) == 2
    assert sorted(task for tasks in builder.tree.tasks for task in tasks) == [0, 1, 2]


@pytest.mark.parametrize("strategy_class", [Naive, EWC])
def test_penalty_works_in_built_in_strategies(tiny_vit, tiny_benchmark, strategy_class):
    builder, selector, regularizer = parts(tree_lambda=0.2)
    shared = []

    def record(strategy):
        if selector.picks is not None:
            stack = LoRAFactors(strategy.model).stack
            anchor = torch.stack(
                [builder.bank[pick][layer] for layer, pick in enumerate(selector.picks)]
            )
            shared.append((stack == anchor).float().mean().item())

    options = {"ewc_lambda": 1.0} if strategy_class is EWC else {}
    strategy = built_in(
        strategy_class,
        lora_model(tiny_vit),
        [builder, selector, regularizer, Recorder(record)],
        **options,
    )
    strategy.train(tiny_benchmark.train_stream[0])
    assert not shared
    strategy.train(tiny_benchmark.train_stream[1])
    assert len(shared) == 8
    assert 0.05 < sum(shared) / len(shared) < 1


@pytest.mark.parametrize(
    "selector_class", [LCBSelectorPlugin, NearestSelectorPlugin, RandomSelectorPlugin]
)
def test_selectors_pick_past_tasks_only(tiny_vit, tiny_benchmark, selector_class):
    builder, selector, _ = parts(selector_class=selector_class)
    picked = []
    strategy = built_in(
        Naive,
        lora_model(tiny_vit),
        [builder, selector, Recorder(lambda _: picked.append(selector.picks))],
    )
    for experience in tiny_benchmark.train_stream:
        picked.clear()
        strategy.train(experience)
        n_past = experience.current_experience
        if n_past == 0:
            assert picked == [None] * 8
        else:
            assert all(p.shape == (3,) and p.min() >= 0 and p.max() < n_past for p in picked)


def test_nearest_selector_is_the_brute_force_nearest(tiny_vit, tiny_benchmark):
    builder, selector, _ = parts(selector_class=NearestSelectorPlugin)
    strategy = built_in(Naive, lora_model(tiny_vit), [builder, selector])
    strategy.train(tiny_benchmark.train_stream[:2])
    start = LoRAFactors(strategy.model).stack.clone()
    picks, runnings = [], []

    def record(strategy):
        picks.append(selector.picks.tolist())
        moved = LoRAFactors(strategy.model).stack - start
        runnings.append(moved / moved.abs().sum(1, keepdim=True))

    strategy.plugins.insert(2, Recorder(record))
    signatures = builder.tree.signatures.clone()
    strategy.train(tiny_benchmark.train_stream[2])
    for running, pick in zip(runnings[:-1], picks[1:], strict=True):
        for layer in range(3):
            distances = [(s[layer] - running[layer]).abs().sum().item() for s in signatures]
            assert distances[pick[layer]] == pytest.approx(min(distances), abs=1e-6)


def test_lcb_selector_observes_the_distance_to_its_pick(tiny_vit, tiny_benchmark):
    builder, selector, _ = parts()
    strategy = built_in(Naive, lora_model(tiny_vit), [builder, selector])
    strategy.train(tiny_benchmark.train_stream[:2])
    start = LoRAFactors(strategy.model).stack.clone()
    signatures = builder.tree.signatures.clone()
    observed = [[[], []] for _ in range(3)]  # by layer and arm

    def record(strategy):
        moved = LoRAFactors(strategy.model).stack - start
        running = moved / moved.abs().sum(1, keepdim=True)
        for layer, arm in enumerate(selector.picks):
            distance = (running[layer] - signatures[arm, layer]).abs().sum()
            observed[layer][arm].append(distance.item())

    strategy.plugins.insert(2, Recorder(record))
    strategy.train(tiny_benchmark.train_stream[2])
    assert selector.search.horizon == 8
    for layer in range(3):
        for arm in range(2):
            values = observed[layer][arm]
            assert selector.search.counts[layer, arm] == len(values) > 0
            assert selector.search.means[layer, arm] == pytest.approx(sum(values) / len(values))


def test_sparsity_and_penalty_reach_the_evaluator(tiny_vit, tiny_benchmark):
    builder, selector, regularizer = parts(tree_lambda=0.2)
    strategy = built_in(Naive, lora_model(tiny_vit), [builder, selector, regularizer])
    strategy.train(tiny_benchmark.train_stream[:2])
    published = strategy.evaluator.get_all_metrics()
    steps, shared = published["SharedCoordinates/train_phase/train_stream"]
    assert len(steps) == 2  # the epochs of the second experience
    assert all(0 < value < 1 for value in shared)
    anchor = torch.stack([builder.bank[0][layer] for layer in range(3)])
    penalty = 0.2 * (builder.bank[1] - anchor).abs().sum().item()
    assert published["SparsePenalty/train_phase/train_stream"][1][-1] == pytest.approx(penalty)
    assert shared[-1] == pytest.approx((builder.bank[1] == anchor).float().mean().item())


# ------------------------------------------------------------------------------------ NaN losses


def test_nan_loss_stops_and_restores_the_weights(tiny_vit, tiny_benchmark):
    class Poison(SupervisedPlugin):
        def before_backward(self, strategy, *args, **kwargs):
            if strategy.clock.train_exp_counter == 1 and strategy.clock.train_iterations == 11:
                strategy.loss = strategy.loss * float("nan")

    strategy = built_in(Naive, lora_model(tiny_vit), [Poison(), FiniteLossPlugin()])
    strategy.train(tiny_benchmark.train_stream[0])
    before = {name: p.clone() for name, p in strategy.model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match="at step 3 of experience 1"):
        strategy.train(tiny_benchmark.train_stream[1])
    after = dict(strategy.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
