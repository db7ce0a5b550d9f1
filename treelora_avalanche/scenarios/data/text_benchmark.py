"""Text tasks as an Avalanche benchmark: token sequences to train on, raw texts to generate from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.benchmarks import CLScenario, benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset
from torch import Tensor
from torch.utils.data import Dataset

from treelora_avalanche.adapters import find_host
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.token_loss import IGNORED
from treelora_avalanche.models.tokenization import EncodedSample, encode_sample
from treelora_avalanche.models.tokens import PADDING
from treelora_avalanche.scenarios.data.text_records import Records, check_limits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextTask:
    """One task of a stream.

    Example::

        sums = read_records(Path("sums.json"))
        TextTask("sums", train=sums, test=sums, metric="accuracy", max_new_tokens=8)

    :param name: name of the task.
    :param train: its records for training, with their file.
    :param test: the same for testing.
    :param metric: scores generated answers: a name in
        :data:`~treelora_avalanche.choices.TEXT_METRICS`.
    :param max_new_tokens: limit of a generated answer.
    """

    name: str
    train: Records
    test: Records
    metric: str
    max_new_tokens: int


class TokenSequences(Dataset[tuple[Tensor, Tensor]]):
    """Samples ``(x, y)`` of one width: tokens without the last, and the answer shifted by one.

    With tokens t_1 ... t_n, of which the first p are the prompt, x_i = t_i for i < n, and
    y_i = t_(i+1) for p <= i < n; all else is padding (-1 in x, -100 in y).

    Example::

        x, y = TokenSequences([EncodedSample([5, 6, 7], n_prompt=2, n_cut=0)], width=4)[0]
        x.tolist()  # [5, 6, -1, -1]
        y.tolist()  # [-100, 7, -100, -100]

    :param samples: the samples.
    :param width: of the padded sequences; at least the number of tokens of any sample.
    """

    def __init__(self, samples: Sequence[EncodedSample], width: int):
        self.samples = [(torch.tensor(s.tokens, dtype=torch.int32), s.n_prompt) for s in samples]
        self.width = width

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, n_prompt = self.samples[index]
        x = torch.full((self.width,), PADDING)
        y = torch.full((self.width,), IGNORED)
        x[: len(tokens) - 1] = tokens[:-1]
        y[n_prompt - 1 : len(tokens) - 1] = tokens[n_prompt:]
        return x, y


class TokenTargets(DataAttribute):
    """Avalanche's ``targets`` of a dataset: for each sample the token ids of its answer.

    >>> sorted(TokenTargets([(3, 4), (4,)]).uniques)
    [3, 4]

    :param data: for each sample the token ids of its answer.
    :param name: name of the attribute.
    :param use_in_getitem: whether samples contain it.
    """

    def __init__(self, data: Any, name: str = "targets", use_in_getitem: bool = False):
        super().__init__(data, name, use_in_getitem)

    @property
    def uniques(self) -> set[int]:
        """The ids that occur as labels, which LwF reads as the classes seen."""
        return {token for tokens in self.data for token in tokens}

    def subset(self, indices: Any) -> TokenTargets:
        """Returns the targets of some samples.

        :param indices: their positions.
        """
        return TokenTargets(self.data.subset(indices), self.name, self.use_in_getitem)

    def concat(self, other: DataAttribute) -> TokenTargets:
        """Returns the targets of two datasets, one after the other.

        :param other: the targets of the second.
        """
        return TokenTargets(self.data.concat(other.data), self.name, self.use_in_getitem)


def as_avalanche_dataset(
    samples: Sequence[EncodedSample], width: int
) -> TaskAwareSupervisedClassificationDataset:
    """Returns encoded samples as a dataset of Avalanche; the task label is 0 everywhere.

    :param samples: the samples.
    :param width: of the padded sequences; at least the number of tokens of any sample.
    """
    return TaskAwareSupervisedClassificationDataset(
        [TokenSequences(samples, width)],
        data_attributes=[
            TokenTargets([tuple(s.tokens[s.n_prompt :]) for s in samples]),
            DataAttribute([len(s.tokens) - 1 for s in samples], "lengths"),
            DataAttribute([0] * len(samples), "targets_task_labels", use_in_getitem=True),
        ],
    )


def text_benchmark(
    tasks: Sequence[TextTask],
    model: Any,
    *,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    max_length: int = 1024,
) -> CLScenario:
    """Returns an Avalanche benchmark of text tasks, one experience each.

    A sample is ``(x, y, 0)``: token ids padded with -1, targets that are -100 outside the answer,
    and the same task label everywhere, so that a strategy cannot read the task from it. Every
    experience carries ``task_name``, ``metric`` and ``max_new_tokens``, and the raw texts:
    ``prompts``, ``answers``, and ``sources`` if the metric is SARI (the whole prompts, as in
    TRACE), else None.

    Example::

        benchmark = text_benchmark([sums, poems], create_language_model("gpt2"))
        benchmark.train_stream[0].task_name

    :param tasks: the tasks, in order of arrival.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :return: the benchmark; it carries ``task_names``.
    :raises ValueError: if there is nothing to learn, or the tokenizer cannot be used.
    """
    limits = dict(zip(("train", "test"), check_limits(limit, eval_limit), strict=True))
    if not tasks:
        raise ValueError("`tasks` should name at least one task, but is empty.")
    tokenizer, max_length = tokenizer_of(model, max_length)
    datasets: dict[str, list[Any]] = {"train": [], "test": []}
    for task in tasks:
        for name, records in (("train", task.train), ("test", task.test)):
            datasets[name].append(_encoded(records.first(limits[name]), tokenizer, max_length))
    benchmark = with_task_labels(benchmark_from_datasets(**datasets))
    for stream, name in ((benchmark.train_stream, "train"), (benchmark.test_stream, "test")):
        for experience, task in zip(stream, tasks, strict=True):
            records = getattr(task, name).first(limits[name]).records
            experience.task_name = task.name
            experience.prompts = [record.prompt for record in records]
            experience.answers = [record.answer for record in records]
            experience.metric = task.metric
            experience.sources = experience.prompts if task.metric == "sari" else None
            # A model with a short context must keep room for the prompt.
            experience.max_new_tokens = min(task.max_new_tokens, max_length // 2)
    benchmark.task_names = [task.name for task in tasks]
    return benchmark


def tokenizer_of(model: Any, max_length: int) -> tuple[Any, int]:
    """Returns the tokenizer and the limit of the tokens of a prompt and its answer.

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, which has its own limit, or
        a tokenizer.
    :param max_length: the limit if ``model`` is a tokenizer.
    :raises ValueError: if it is neither.
    """
    host = find_host(model) if isinstance(model, torch.nn.Module) else None
    if isinstance(host, LanguageModel):
        return host.tokenizer, host.max_length
    if isinstance(model, torch.nn.Module) or not callable(model):
        raise ValueError(
            "`model` should be a LanguageModel or a tokenizer, but is a "
            f"{type(model).__name__}. Make one with "
            "`treelora_avalanche.models.create_language_model`."
        )
    return model, max_length


def _encoded(
    records: Records, tokenizer: Any, max_length: int
) -> TaskAwareSupervisedClassificationDataset:
    samples = [encode_sample(tokenizer, r.prompt, r.answer, max_length) for r in records.records]
    n_shortened = sum(sample.n_dropped > 0 for sample in samples)
    if n_shortened:
        logger.info(
            "%s: the prompts of %d of %d records lose their beginnings, to fit into %d tokens",
            records.file,
            n_shortened,
            len(samples),
            max_length,
        )
    cut = [number for number, sample in enumerate(samples) if sample.n_cut]
    if cut:
        worst = max(cut, key=lambda number: samples[number].n_cut)
        logger.warning(
            "%s: the answers of %d of %d records do not fit into %d tokens and lose their ends "
            "(the first is record %d; the longest, record %d, loses %d tokens); raise max_length "
            "if the model allows it",
            records.file,
            len(cut),
            len(samples),
            max_length,
            cut[0],
            worst,
            samples[worst].n_cut,
        )
    # One column more than any sample needs: it marks sequences that are not cropped yet.
    return as_avalanche_dataset(samples, max_length)
