"""In an online stream, which cuts every task into parts, the parts of a task are one task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    split_continuous_linear_decay_stream,
    split_online_stream,
)
from avalanche.evaluation.metrics import bwt_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from peft.utils.merge_utils import ties

from support import identical, make, plugin_of, same, weights
from treelora_avalanche import TreeLoRAStrategy
from treelora_avalanche.adapters import LoRAFactors, SignatureSketch
from treelora_avalanche.experiences import (
    classes_of,
    is_part,
    n_parts,
    origin_of,
    stream_length,
    task_number,
)
from treelora_avalanche.metrics import (
    AccuracyMatrix,
    BackwardTransfer,
    OverallPerformance,
    backward_transfer,
)
from treelora_avalanche.plugins import (
    ContrastivePlugin,
    TaskAdaptersPlugin,
    TaskPromptsPlugin,
    WithinTaskLossPlugin,
)
from treelora_avalanche.strategies import HiDeLoRA, HiDePrompt, InfLoRA, OLoRA, SDLoRA, SeqLoRA

pytestmark = pytest.mark.filterwarnings("ignore")

N_TASKS = 3
TREES: dict[str, dict[str, Any]] = {
    "last": {},
    "nearest": {"selection": "nearest"},
    "random": {"selection": "random"},
    "merging": {"max_adapters": 2},
    "merged": {"head": "task_adaptive"},
    "routed": {"head": "task_adaptive", "inference": "routed"},
}


def parts_of(benchmark: Any, size: int = 8, **options: Any) -> list[Any]:
    """The parts of all tasks: four of each, of 32 images."""
    return list(split_online_stream(benchmark.train_stream, size, seed=0, **options))


def tree_strategy(tiny_vit: Any, variant: str, **options: Any) -> Any:
    return make(TreeLoRAStrategy, tiny_vit(), **{**TREES[variant], "train_epochs": 1, **options})


def train_on(strategy: Any, experiences: Any, **options: Any) -> Any:
    for experience in experiences:
        torch.manual_seed(task_number(experience))
        strategy.train(experience, **options)
    return strategy


class Ends(SupervisedPlugin):
    """Records the adapter before the first and after the last step of every part."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[Any] = []
        self.ended: list[Any] = []

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.begun.append(LoRAFactors(strategy.model).stack.clone())

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.ended.append(LoRAFactors(strategy.model).stack.clone())


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("variant", [v for v in TREES if v != "merging"])
def test_the_tree_has_the_tasks_of_the_stream(tiny_vit, tiny_benchmark, variant, boundaries):
    ends = Ends()
    strategy = tree_strategy(tiny_vit, variant, plugins=[ends])
    train_on(strategy, parts_of(tiny_benchmark, access_task_boundaries=boundaries))
    assert strategy.tree.tasks == [[0], [1], [2]]
    assert len(strategy.bank) == N_TASKS
    factors = LoRAFactors(strategy.model)
    sketch = SignatureSketch(factors.shapes)
    for task in range(N_TASKS):
        first, last = 4 * task, 4 * task + 3
        assert torch.equal(strategy.bank[task], ends.ended[last])
        if variant != "routed":  # there the task moves to a past adapter before the first step
            whole = sketch.direction(ends.ended[last], sketch(ends.begun[first]))
            torch.testing.assert_close(strategy.tree.signatures[task], whole)
        for part in range(first + 1, last + 1):
            assert torch.equal(ends.begun[part], ends.ended[part - 1])
    if variant == "merged":
        mean = torch.stack([ends.ended[4 * task + 3] for task in range(N_TASKS)]).mean(0)
        torch.testing.assert_close(factors.stack, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("merge", ["ties", "magmax"])
def test_task_vectors_are_those_of_tasks(tiny_vit, tiny_benchmark, merge):
    ends = Ends()
    strategy = make(SeqLoRA, tiny_vit(), merge=merge, train_epochs=1, plugins=[ends])
    train_on(strategy, parts_of(tiny_benchmark))
    start = ends.begun[0].flatten()
    vectors = [ends.ended[4 * task + 3].flatten() - start for task in range(N_TASKS)]
    if merge == "ties":
        expected = ties(vectors, torch.ones(N_TASKS), 0.2)
    else:
        expected = torch.tensor([max(v, key=abs) for v in zip(*map(list, vectors), strict=True)])
    stack = LoRAFactors(strategy.model).stack
    torch.testing.assert_close(stack.flatten() - start, expected, rtol=0, atol=1e-6)
    assert all(torch.equal(ends.begun[n], ends.ended[n - 1]) for n in (1, 2, 3, 5, 9, 11))


@pytest.mark.parametrize("variant", TREES)
def test_parts_are_pulled_to_past_tasks_alone(tiny_vit, tiny_benchmark, variant):
    strategy = tree_strategy(tiny_vit, variant)
    for number, part in enumerate(parts_of(tiny_benchmark)):
        train_on(strategy, [part])
        picks = strategy.selector.picks
        if number < 4:
            assert picks is None
        else:
            n_past = min(number // 4, TREES[variant].get("max_adapters", N_TASKS))
            assert set(picks.tolist()) <= set(range(n_past))
    assert strategy.tree.n_tasks == N_TASKS
    assert len(strategy.bank) == len(strategy.tree) == TREES[variant].get("max_adapters", N_TASKS)


@pytest.mark.parametrize(
    ("strategy_class", "options"),
    [
        (SeqLoRA, {}),
        (OLoRA, {}),
        (TreeLoRAStrategy, {"selection": "nearest"}),
        (TreeLoRAStrategy, {"selection": "nearest", "max_adapters": 1}),
        (TreeLoRAStrategy, {"selection": "nearest", "inference": "merged"}),
    ],
)
def test_parts_in_order_equal_the_whole_tasks(tiny_vit, tiny_benchmark, strategy_class, options):
    strategies = []
    for stream in (tiny_benchmark.train_stream, parts_of(tiny_benchmark, shuffle=False)):
        strategy = make(strategy_class, tiny_vit(), train_epochs=1, **options)
        strategies.append(train_on(strategy, stream, shuffle=False))
    whole, in_parts = strategies
    assert same(weights(in_parts), weights(whole))
    if strategy_class is TreeLoRAStrategy:
        assert identical(in_parts.tree.state_dict(), whole.tree.state_dict())
        assert identical(in_parts.bank.state_dict(), whole.bank.state_dict())


def test_the_search_lasts_for_the_whole_task(tiny_vit, tiny_benchmark):
    strategy = tree_strategy(tiny_vit, "last")
    parts = parts_of(tiny_benchmark)
    train_on(strategy, parts[:5])
    search = strategy.selector.search
    assert search.horizon == 4
    train_on(strategy, parts[5:8])
    assert strategy.selector.search is search
    assert (search.counts.amax(1) == 4).all(), "one pull per step of the task"
    train_on(strategy, parts[8:9])
    assert strategy.selector.search is not search


@pytest.mark.parametrize("variant", TREES)
def test_continued_within_a_task(tiny_vit, tiny_benchmark, tmp_path, variant):
    parts = parts_of(tiny_benchmark)
    whole = train_on(tree_strategy(tiny_vit, variant), parts[:10])
    whole.save(tmp_path)
    resumed = tree_strategy(tiny_vit, variant, seed=1)
    resumed.load(tmp_path)
    for strategy in (whole, resumed):
        train_on(strategy, parts[10:])
    assert identical(resumed.state_dict(), whole.state_dict())
    assert resumed.tree.n_tasks == N_TASKS


@pytest.mark.parametrize("strategy_class", [OLoRA, InfLoRA, SDLoRA])
def test_past_adapters_are_those_of_tasks(tiny_vit, tiny_benchmark, strategy_class):
    strategy = make(strategy_class, tiny_vit(), train_epochs=1)
    train_on(strategy, parts_of(tiny_benchmark))
    past = next(plugin.past for plugin in strategy.plugins if hasattr(plugin, "past"))
    assert len(past) == N_TASKS - 1


class PastClasses(SupervisedPlugin):
    """Records, in every part, the classes from which HiDe's contrastive loss moves away."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[int]] = []

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        head = plugin_of(strategy, ContrastivePlugin).head
        self.seen.append({statistics.label for statistics in head.past_statistics()})


@pytest.mark.parametrize(
    ("strategy_class", "options"), [(HiDeLoRA, {}), (HiDePrompt, {"prompt_layers": [0, 1]})]
)
def test_hide_has_an_adapter_or_a_prompt_per_task(
    tiny_vit, tiny_benchmark, strategy_class, options
):
    past = PastClasses()
    strategy = make(strategy_class, tiny_vit(), train_epochs=1, plugins=[past], **options)
    train_on(strategy, parts_of(tiny_benchmark))
    stored = (
        plugin_of(strategy, TaskAdaptersPlugin).bank
        if strategy_class is HiDeLoRA
        else plugin_of(strategy, TaskPromptsPlugin).prompts
    )
    assert len(stored) == N_TASKS
    assert past.seen == [set(range(2 * task)) for task in range(N_TASKS) for _ in range(4)]
    assert set(strategy.model.router.adapter.tolist()) == set(range(N_TASKS))


def test_a_stream_split_again_begins_a_task_again(tiny_vit, tiny_benchmark):
    strategy = tree_strategy(tiny_vit, "last")
    for _ in range(2):
        train_on(strategy, split_online_stream([tiny_benchmark.train_stream[0]], 16))
    assert strategy.tree.n_tasks == 2
    train_on(strategy, [tiny_benchmark.train_stream[0]] * 2)
    assert strategy.tree.n_tasks == 4, "whole experiences are tasks of their own"


# ----------------------------------------------------------------------------------------- metrics


def test_the_matrix_has_a_row_per_task(tiny_vit, tiny_benchmark):
    matrix, op, bwt = AccuracyMatrix(), OverallPerformance(), BackwardTransfer()
    evaluator = EvaluationPlugin(matrix, op, bwt, bwt_metrics(stream=True), loggers=[])
    strategy = make(SeqLoRA, tiny_vit(), evaluator=evaluator, lr=0.05)
    for part in parts_of(tiny_benchmark):
        train_on(strategy, [part])
        results = strategy.eval(tiny_benchmark.test_stream)
    assert matrix.trained == [0, 1, 2]
    assert matrix.matrix().shape == (N_TASKS, N_TASKS)
    assert op.result() == pytest.approx(matrix.matrix()[-1].mean().item())
    ours = results["BackwardTransfer_PositiveIsForgetting/eval_phase/test_stream"]
    assert ours == bwt.result() == pytest.approx(backward_transfer(matrix.matrix()))
    assert ours > 0


def test_parts_of_several_tasks_are_none_of_the_evaluated_ones(tiny_vit, tiny_benchmark):
    stream = split_continuous_linear_decay_stream(tiny_benchmark.train_stream, 8, 1, 4, True)
    matrix, op = AccuracyMatrix(), OverallPerformance()
    strategy = make(SeqLoRA, tiny_vit(), evaluator=EvaluationPlugin(matrix, op, loggers=[]))
    for part in stream:
        strategy.train(part)
        strategy.eval(tiny_benchmark.test_stream)
    assert matrix.matrix().shape == (3, 3 + 3)
    assert matrix.matrix()[:, :3].isnan().all()
    assert not matrix.matrix()[:, 3:].isnan().any()
    assert op.result() is None


# ------------------------------------------------------------------------------- the experiences


def test_what_an_experience_says_of_its_task(tiny_benchmark):
    whole, part = tiny_benchmark.train_stream[1], parts_of(tiny_benchmark)[5]
    assert (is_part(whole), is_part(part)) == (False, True)
    assert origin_of(whole) is whole
    assert origin_of(part).current_experience == 1
    assert (part.current_experience, task_number(part), task_number(whole)) == (5, 1, 1)
    assert (n_parts(part), n_parts(whole)) == (4, 1)
    assert stream_length(part) == stream_length(whole) == N_TASKS
    assert classes_of(part) == classes_of(whole) == [2, 3]
    hidden = part.train()  # Avalanche hides the origin there
    assert not is_part(hidden)
    assert set(classes_of(hidden)) <= {2, 3}
    mixed = next(
        iter(split_continuous_linear_decay_stream(tiny_benchmark.train_stream, 8, 1, 4, True))
    )
    assert (is_part(mixed), task_number(mixed), stream_length(mixed)) == (False, None, None)


def test_an_experience_outside_a_stream(tiny_benchmark):
    from avalanche.benchmarks import DatasetExperience

    alone = DatasetExperience(dataset=tiny_benchmark.train_stream[1].dataset)
    assert classes_of(alone) == [2, 3]
    assert task_number(alone) is None
    assert stream_length(alone) is None
    assert stream_length(benchmark_from_datasets(train=[alone.dataset]).train_stream[0]) == 1


def test_the_loss_of_a_single_image_compares_the_classes_of_its_task(tiny_vit, tiny_benchmark):
    strategy = make(SeqLoRA, tiny_vit(), plugins=[WithinTaskLossPlugin()], train_epochs=1)
    before = weights(strategy)
    train_on(strategy, parts_of(tiny_benchmark, size=1)[:1])
    assert not same(before, weights(strategy)), "a loss over one class would be 0"
