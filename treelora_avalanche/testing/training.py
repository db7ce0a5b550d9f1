"""Trains a strategy on a stream and records what the contract's checks compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treelora_avalanche.metrics import find_text_generator
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.testing.factories import Factories, Factory, seeded
from treelora_avalanche.testing.predictions import Predictions, predict
from treelora_avalanche.testing.reads import ReadRecorder, Sample
from treelora_avalanche.testing.tiny import tiny_benchmark, tiny_vit

PROMPTS_PER_EXPERIENCE = 4


@dataclass
class TrainedStrategy:
    """A strategy trained on a whole stream, and what was recorded meanwhile.

    :param factories: the functions that built it.
    :param strategy: the strategy.
    :param benchmark: its benchmark.
    :param frozen: copies of the parameters without gradient, before the training.
    :param trainable: copies of those with one.
    :param inputs: test inputs, those of the experiences in alternation, ``(n, ...)``.
    :param targets: their targets.
    :param prompts: test prompts; empty for models that do not generate text.
    :param samples: for each experience, its training samples.
    :param read: for each experience, the samples that training on it has read.
    :param stored: :func:`~treelora_avalanche.metrics.footprint.stored_bytes` after each experience.
    """

    factories: Factories
    strategy: Any
    benchmark: Any
    frozen: dict[str, Tensor]
    trainable: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor
    prompts: list[str]
    samples: list[set[Sample]]
    read: list[set[Sample]]
    stored: list[int]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns all parameters of the model, also where a view exposes the trainable ones."""
        return model_parameters(self.strategy)

    def predictions(self, batch_size: int = 64) -> Predictions:
        """Returns the strategy's predictions for the test samples and prompts.

        :param batch_size: samples per forward pass.
        """
        return predict(
            self.strategy, self.inputs, self.targets, self.prompts, batch_size=batch_size
        )


def train_and_record(
    make_strategy: Factory, *, make_model: Factory = tiny_vit, benchmark: Any = tiny_benchmark
) -> TrainedStrategy:
    """Builds a strategy, trains it on every experience, and records what the checks compare.

    The global random generators are seeded, and restored afterwards.

    >>> trained = train_and_record("my_methods:make")
    >>> check_frozen_weights(trained)

    :param make_strategy: see :class:`Factories`.
    :param make_model: see :class:`Factories`; default :func:`tiny_vit`.
    :param benchmark: see :class:`Factories`; default :func:`tiny_benchmark`. Samples are
        ``(input, target, ...)``, all inputs of one shape.
    """
    factories = Factories(make_strategy, make_model, benchmark)
    strategy, stream = factories.build()
    before = {
        n: (p.requires_grad, p.detach().clone()) for n, p in model_parameters(strategy).items()
    }
    recorder = ReadRecorder([*stream.train_stream, *stream.test_stream])
    samples, read, stored = [], [], []
    with seeded():
        for experience in stream.train_stream:
            samples.append(recorder.samples_of(experience.dataset))
            with recorder.recording() as of_experience:
                strategy.train(experience)
            read.append(of_experience)
            stored.append(stored_bytes(strategy))
    inputs, targets = _alternating(stream.test_stream)
    return TrainedStrategy(
        factories,
        strategy,
        stream,
        {name: value for name, (trains, value) in before.items() if not trains},
        {name: value for name, (trains, value) in before.items() if trains},
        inputs,
        targets,
        _prompts(strategy, stream.test_stream),
        samples,
        read,
        stored,
    )


def model_parameters(strategy: Any) -> dict[str, nn.Parameter]:
    """Returns all parameters of a strategy's model, also where a view exposes the trainable ones.

    :param strategy: any strategy.
    """
    return dict(nn.Module.named_parameters(strategy.model))  # not the override of a view


def _prompts(strategy: Any, stream: Any) -> list[str]:
    try:
        find_text_generator(strategy.model)
    except TypeError:  # images, or texts that are classified
        return []
    return [p for e in stream for p in getattr(e, "prompts", [])[:PROMPTS_PER_EXPERIENCE]]


def _alternating(stream: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the experiences in alternation, so that a batch mixes them."""
    tests = [_tensors_of(experience.dataset) for experience in stream]
    n = min(len(inputs) for inputs, _ in tests)
    inputs, targets = (
        torch.stack([part[:n] for part in parts], 1).flatten(0, 1)
        for parts in zip(*tests, strict=True)
    )
    return inputs, targets


def _tensors_of(dataset: Any) -> tuple[Tensor, Tensor]:
    inputs, targets, *_ = zip(*dataset, strict=True)
    return torch.stack(inputs), torch.stack([torch.as_tensor(target) for target in targets])
