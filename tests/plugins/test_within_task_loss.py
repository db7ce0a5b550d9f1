"""A training accuracy of 0 under a loss within the task is explained, once."""

import logging

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from treelora_avalanche.metrics import EpochAccuracy
from treelora_avalanche.plugins import TaskAdaptiveHeadPlugin, WithinTaskLossPlugin

METRICS = {"ours": EpochAccuracy, "Avalanche's": lambda: accuracy_metrics(epoch=True)}


def warnings_of(caplog, tiny_vit, benchmark, *, bias, plugin=WithinTaskLossPlugin, metrics="ours"):
    """Trains a model whose last class, of the last task, has the largest logit or the smallest."""
    torch.manual_seed(0)
    model = tiny_vit()
    model.head.bias.data[:] = torch.tensor([0.0] * 5 + [bias])
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        evaluator=EvaluationPlugin(METRICS[metrics](), loggers=[]),
        plugins=[plugin()] if plugin else [],
    )
    with caplog.at_level(logging.WARNING, logger="treelora_avalanche"):
        strategy.train(list(benchmark.train_stream[:2]))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("plugin", [WithinTaskLossPlugin, TaskAdaptiveHeadPlugin])
@pytest.mark.parametrize("metrics", METRICS)
def test_accuracy_of_zero_is_explained_once(caplog, tiny_vit, tiny_benchmark, plugin, metrics):
    (text,) = warnings_of(
        caplog, tiny_vit, tiny_benchmark, bias=100.0, plugin=plugin, metrics=metrics
    )
    assert text.startswith("Top1_Acc_Epoch is 0 because it compares all classes")


@pytest.mark.parametrize(("bias", "plugin"), [(-100.0, WithinTaskLossPlugin), (100.0, None)])
def test_nothing_to_explain(caplog, tiny_vit, tiny_benchmark, bias, plugin):
    assert not warnings_of(caplog, tiny_vit, tiny_benchmark, bias=bias, plugin=plugin)
