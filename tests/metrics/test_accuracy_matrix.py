"""Metrics: hand-worked matrices, a brute-force matrix, and Avalanche's own numbers."""

import csv
import math

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    loss_metrics,
)
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.utils.data import TensorDataset

from treelora_avalanche.metrics import (
    AccuracyMatrix,
    BackwardTransfer,
    EpochAccuracy,
    EpochLoss,
    OverallPerformance,
    backward_transfer,
    continual_metrics,
    forgetting,
    overall_performance,
)

# Rows: after training; columns: experience. Worked by hand below.
HAND = [
    [0.9, 0.1, 0.0],
    [0.6, 0.8, 0.2],
    [0.3, 0.7, 1.0],
]


def test_hand_worked_matrix():
    assert overall_performance(HAND) == pytest.approx((0.3 + 0.7 + 1.0) / 3)
    assert backward_transfer(HAND) == pytest.approx(((0.9 - 0.3) + (0.8 - 0.7) + 0) / 3)
    assert forgetting(HAND) == pytest.approx(((0.9 - 0.3) + (0.8 - 0.7)) / 2)


def test_partial_stream_ignores_unseen_columns():
    after_two = HAND[:2]
    assert overall_performance(after_two) == pytest.approx((0.6 + 0.8) / 2)
    assert backward_transfer(after_two) == pytest.approx((0.9 - 0.6) / 2)
    assert forgetting(after_two) == pytest.approx(0.9 - 0.6)


def test_one_experience_forgets_nothing():
    assert overall_performance([[0.7]]) == pytest.approx(0.7)
    assert backward_transfer([[0.7]]) == 0.0
    assert forgetting([[0.7]]) == 0.0


def test_improvement_is_negative_forgetting():
    assert backward_transfer([[0.5, 0.0], [0.7, 0.9]]) == pytest.approx(-0.1)


def test_missing_entry_gives_nan():
    assert math.isnan(overall_performance([[0.5, 0.0], [math.nan, 0.9]]))
    assert math.isnan(backward_transfer([[math.nan, 0.0], [0.7, 0.9]]))


@pytest.mark.parametrize("matrix", [[], [[0.1], [0.2]], [0.1, 0.2]])
def test_wrong_shape_is_refused(matrix):
    with pytest.raises(ValueError, match="`matrix` should have one row per trained"):
        overall_performance(matrix)


@pytest.fixture
def benchmark():
    """Six noisy classes as three experiences, in a shuffled class order."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator) * 1.5

    def samples(per_class):
        y = torch.arange(6).repeat_interleave(per_class)
        x = centres[y] + torch.randn(len(y), 8, generator=generator)
        dataset = TensorDataset(x, y)
        dataset.targets = y.tolist()
        return dataset

    return nc_benchmark(samples(24), samples(17), n_experiences=3, task_labels=False, seed=3)


def naive(evaluator, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=8,
        train_epochs=2,
        eval_mb_size=5,
        evaluator=evaluator,
        **kwargs,
    )


@torch.no_grad()
def accuracy_by_hand(model, experience, within_task):
    correct = 0
    for x, y, *_ in experience.dataset:
        output = model(x[None])[0]
        if within_task:
            others = [c for c in range(6) if c not in experience.classes_in_this_experience]
            output[others] = -math.inf
        correct += int(output.argmax()) == int(y)
    return correct / len(experience.dataset)


def stream_metric(results, name):
    return results[f"{name}/eval_phase/test_stream"]


def test_matrix_is_brute_force_and_agrees_with_avalanche(benchmark):
    matrices = [AccuracyMatrix(), AccuracyMatrix(within_task=True)]
    evaluator = EvaluationPlugin(
        *matrices,
        continual_metrics(),
        accuracy_metrics(experience=True),
        forgetting_metrics(stream=True),
        bwt_metrics(stream=True),
        loggers=[],
    )
    strategy = naive(evaluator)
    expected: dict[bool, list[list[float]]] = {False: [], True: []}
    for n, experience in enumerate(benchmark.train_stream, start=1):
        strategy.train(experience)
        results = strategy.eval(benchmark.test_stream)
        for matrix in matrices:
            within = matrix.within_task
            expected[within].append(
                [accuracy_by_hand(strategy.model, e, within) for e in benchmark.test_stream]
            )
            torch.testing.assert_close(
                matrix.matrix(), torch.tensor(expected[within], dtype=torch.float64)
            )
            suffix = "_WithinTask" if within else ""
            assert stream_metric(results, "OverallPerformance" + suffix) == pytest.approx(
                overall_performance(expected[within])
            )
            assert stream_metric(
                results, "BackwardTransfer_PositiveIsForgetting" + suffix
            ) == pytest.approx(backward_transfer(expected[within]))
        ours = stream_metric(results, "BackwardTransfer_PositiveIsForgetting")
        theirs = stream_metric(results, "StreamForgetting")
        assert ours == pytest.approx((n - 1) / n * theirs)
        assert ours == pytest.approx(-(n - 1) / n * stream_metric(results, "StreamBWT"))
        assert forgetting(expected[False]) == pytest.approx(theirs)
        for i in range(3):
            own = "eval_phase/test_stream/Task000/Exp"
            assert results[f"Top1_Acc_Exp/{own}{i:03}"] == pytest.approx(expected[False][-1][i])
            assert results[f"AccuracyMatrix/{own}{i:03}"] == pytest.approx(expected[False][-1][i])
    assert ours > 0, "a fine-tuned network forgets: the sign would be wrong otherwise"


def test_order_of_training_is_recorded(benchmark):
    matrix = AccuracyMatrix()
    strategy = naive(EvaluationPlugin(matrix, loggers=[]))
    for i in (2, 0):
        strategy.train(benchmark.train_stream[i])
        strategy.eval(benchmark.test_stream)
    assert matrix.trained == [2, 0]
    # Columns: experiences 2 and 0 in the order of training, then the unseen one.
    last = [accuracy_by_hand(strategy.model, benchmark.test_stream[i], False) for i in (2, 0, 1)]
    assert matrix.matrix()[1].tolist() == pytest.approx(last)


def test_evaluating_again_overwrites_the_row(benchmark):
    matrix = AccuracyMatrix()
    strategy = naive(EvaluationPlugin(matrix, loggers=[]))
    strategy.eval(benchmark.test_stream)
    assert matrix.matrix().shape == (0, 0)
    assert set(matrix.untrained["test"]) == {0, 1, 2}
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream)
    with torch.no_grad():
        strategy.model[2].weight.zero_()
        strategy.model[2].bias.zero_()
    strategy.eval(benchmark.test_stream)
    assert matrix.matrix().shape == (1, 3)
    now = [accuracy_by_hand(strategy.model, e, False) for e in benchmark.test_stream]
    assert matrix.matrix()[0].tolist() == pytest.approx(now)
    matrix.reset()
    assert matrix.matrix().shape == (0, 0)


def test_part_of_the_stream_emits_only_what_is_known(benchmark):
    matrix, performance, transfer = AccuracyMatrix(), OverallPerformance(), BackwardTransfer()
    strategy = naive(EvaluationPlugin(matrix, performance, transfer, loggers=[]))
    strategy.train(benchmark.train_stream[0])
    results = strategy.eval(benchmark.test_stream[1])
    assert not any(name.startswith(("Overall", "Backward")) for name in results)
    strategy.train(benchmark.train_stream[1])
    results = strategy.eval([benchmark.test_stream[0], benchmark.test_stream[1]])
    # f_0(w_0) was never evaluated, so Bwt_2 is unknown; Op_2 is known.
    assert stream_metric(results, "OverallPerformance") == pytest.approx(
        overall_performance(matrix.matrix())
    )
    assert transfer.result() is None
    assert not any(name.startswith("Backward") for name in results)


@pytest.mark.parametrize("eval_every", [0, 1])
def test_periodic_evaluation_keeps_streams_apart(benchmark, eval_every):
    matrix = AccuracyMatrix()
    strategy = naive(EvaluationPlugin(matrix, loggers=[]), eval_every=eval_every)
    for experience in benchmark.train_stream:
        strategy.train(experience)  # evaluates the training experience itself
        strategy.eval(benchmark.test_stream)
    on_test = [accuracy_by_hand(strategy.model, e, False) for e in benchmark.test_stream]
    assert matrix.matrix("test")[-1].tolist() == pytest.approx(on_test)
    assert matrix.matrix("train").isnan().any(), "past training experiences were not evaluated"


def test_epoch_metrics_are_those_of_avalanche(benchmark):
    evaluator = EvaluationPlugin(EpochLoss(), EpochAccuracy(), loggers=[], collect_all=True)
    reference = EvaluationPlugin(
        loss_metrics(epoch=True), accuracy_metrics(epoch=True), loggers=[], collect_all=True
    )
    for plugin in (evaluator, reference):
        strategy = naive(plugin)
        strategy.train(benchmark.train_stream[0])
    ours, theirs = evaluator.get_all_metrics(), reference.get_all_metrics()
    assert set(ours) == set(theirs)
    for name, (steps, values) in theirs.items():
        assert ours[name][0] == steps
        assert ours[name][1] == pytest.approx(values, rel=1e-5)


def test_avalanche_loggers_show_them_unchanged(benchmark, tmp_path, capsys):
    loggers = [
        InteractiveLogger(),
        TensorboardLogger(str(tmp_path / "tensorboard")),
        CSVLogger(str(tmp_path)),
    ]
    strategy = naive(
        EvaluationPlugin(
            continual_metrics(), EpochLoss(), accuracy_metrics(experience=True), loggers=loggers
        )
    )
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream)
    for logger in loggers[1:]:
        getattr(logger, "close", lambda: None)()
    printed = capsys.readouterr().out
    for name in (
        "OverallPerformance",
        "OverallPerformance_WithinTask",
        "BackwardTransfer_PositiveIsForgetting",
    ):
        assert f"{name}/eval_phase/test_stream = " in printed
    assert list((tmp_path / "tensorboard").glob("events.*"))
    rows = list(csv.DictReader((tmp_path / "training_results.csv").open()))
    assert len(rows) == 2
    assert float(rows[0]["training_loss"]) > 0
