"""Streams of text tasks: prompts and answers, as the rows of tokens that language models train on.

What the benchmarks of texts share, and :func:`TextTasks` for a user's own folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import CLScenario, benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset
from torch import Tensor
from torch.utils.data import Dataset

from treelora_avalanche.adapters import find_host
from treelora_avalanche.choices import TEXT_METRICS, check_known
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.token_loss import IGNORED
from treelora_avalanche.models.tokenization import EncodedSample, encode_sample
from treelora_avalanche.models.tokens import PADDING
from treelora_avalanche.scenarios.data.text_records import SUFFIXES, Records, read_records

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextTask:
    """One task of a stream.

    :param name: the task's name.
    :param train: its records for training, and where they are from.
    :param test: the same for testing.
    :param metric: how generated answers are scored: a name in
        :data:`~treelora_avalanche.choices.TEXT_METRICS`.
    :param max_new_tokens: where a generated answer that does not end is stopped.
    """

    name: str
    train: Records
    test: Records
    metric: str
    max_new_tokens: int


class TokenRows(Dataset[tuple[Tensor, Tensor]]):
    """Samples as rows of one width: the tokens but for the last, and the answers one token later.

    :param samples: the samples.
    :param width: of the rows, more than the tokens of any sample but one.
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
    """Avalanche's ``targets`` of a dataset: of each sample the ids of its answer's tokens.

    Its ``uniques`` are the ids that occur as labels, which LwF reads as the classes seen.
    """

    def __init__(self, data: Any, name: str = "targets", use_in_getitem: bool = False):
        super().__init__(data, name, use_in_getitem)

    @property
    def uniques(self) -> set[int]:
        return {token for tokens in self.data for token in tokens}

    def subset(self, indices: Any) -> TokenTargets:
        return TokenTargets(self.data.subset(indices), self.name, self.use_in_getitem)

    def concat(self, other: DataAttribute) -> TokenTargets:
        return TokenTargets(self.data.concat(other.data), self.name, self.use_in_getitem)


def text_benchmark(
    tasks: Sequence[TextTask], model: Any, *, limit: int | None = None, max_length: int = 1024
) -> CLScenario:
    """An Avalanche benchmark of text tasks, one experience each.

    A sample is ``(x, y, 0)``: token ids padded with -1, targets that are -100 but on the answer,
    and the same task label everywhere, so that nothing tells a strategy which task it is. Every
    experience carries ``task_name``, ``metric`` and ``max_new_tokens``, and the raw texts:
    ``prompts``, ``answers``, and ``sources`` where the metric is SARI (the whole prompts, as in
    TRACE), else None.

    :param tasks: the tasks, in the order in which they arrive.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` that is to learn them, or a
        tokenizer.
    :param limit: the first so many records of each file; None for all.
    :param max_length: most tokens of a prompt and its answer, where ``model`` is a tokenizer.
    :return: the benchmark; it carries ``task_names``.
    :raises ValueError: if there is nothing to learn, or the tokenizer cannot be used.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, and is {limit}.")
    if not tasks:
        raise ValueError("there are no tasks; name at least one.")
    tokenizer, max_length = _tokenizer_of(model, max_length)
    datasets: dict[str, list[Any]] = {"train": [], "test": []}
    for task in tasks:
        for name, records in (("train", task.train), ("test", task.test)):
            datasets[name].append(_dataset(records.first(limit), tokenizer, max_length))
    benchmark = with_task_labels(benchmark_from_datasets(**datasets))
    for stream, name in ((benchmark.train_stream, "train"), (benchmark.test_stream, "test")):
        for experience, task in zip(stream, tasks, strict=True):
            records = getattr(task, name).first(limit).records
            experience.task_name = task.name
            experience.prompts = [record.prompt for record in records]
            experience.answers = [record.answer for record in records]
            experience.metric = task.metric
            experience.sources = experience.prompts if task.metric == "sari" else None
            # A model with a short context must keep room for the prompt.
            experience.max_new_tokens = min(task.max_new_tokens, max_length // 2)
    benchmark.task_names = [task.name for task in tasks]
    return benchmark


def _tokenizer_of(model: Any, max_length: int) -> tuple[Any, int]:
    host = find_host(model) if isinstance(model, torch.nn.Module) else None
    if isinstance(host, LanguageModel):
        return host.tokenizer, host.max_length
    if isinstance(model, torch.nn.Module) or not callable(model):
        raise ValueError(
            f"`model` is a {type(model).__name__}; pass what "
            "`treelora_avalanche.models.create_language_model` gives, or a tokenizer."
        )
    return model, max_length


def _dataset(
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
    return TaskAwareSupervisedClassificationDataset(
        # A column wider than any sample: the model knows by it that rows are not cropped yet.
        [TokenRows(samples, max_length)],
        data_attributes=[
            TokenTargets([tuple(s.tokens[s.n_prompt :]) for s in samples]),
            DataAttribute([len(s.tokens) - 1 for s in samples], "lengths"),
            DataAttribute([0] * len(samples), "targets_task_labels", use_in_getitem=True),
        ],
    )


def arranged(names: Sequence[str], order: Sequence[int] | None) -> list[str]:
    """Names of tasks in the order in which they arrive.

    :param names: the names.
    :param order: their places in that list, each once; None leaves them as they are.
    :raises ValueError: if it is not a permutation.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"`tasks` is {names!r}; it must be a list of different task names.")
    if order is None:
        return list(names)
    if sorted(order) != list(range(len(names))):
        raise ValueError(
            f"`order` is {list(order)}; it must hold every number from 0 to {len(names) - 1} once, "
            f"the places of {', '.join(names)}."
        )
    return [names[place] for place in order]


def TextTasks(
    folder: str | Path,
    model: Any,
    *,
    tasks: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    metric: str | Mapping[str, str] = "rouge_l",
    max_new_tokens: int | Mapping[str, int] = 128,
    limit: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    max_length: int = 1024,
) -> CLScenario:
    """A folder of ``{"prompt": ..., "answer": ...}`` records as a stream of text tasks.

    Two layouts are accepted, also side by side: ``<folder>/<task>/train.json`` with
    ``<folder>/<task>/test.json``; and ``<folder>/<task>.json``, of which a test set is drawn. Files
    are JSON, a list of records, or JSONL, one record per line.

    :param folder: the folder.
    :param model: see :func:`text_benchmark`.
    :param tasks: names of the tasks to use, in the order in which they arrive; by default all, in
        alphabetical order.
    :param order: another order, as places in that list.
    :param metric: how generated answers are scored, see
        :data:`~treelora_avalanche.choices.TEXT_METRICS`; one for all tasks, or by the name of the
        task.
    :param max_new_tokens: where a generated answer is stopped, likewise.
    :param limit: the first so many records of each file; None for all.
    :param test_fraction: share of a task's records that is drawn for testing where it has one file.
    :param seed: seed of that drawing.
    :param max_length: see :func:`text_benchmark`.
    :return: the benchmark, see :func:`text_benchmark`.
    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if a file does not hold such records; file and record are named.
    """
    built = []
    for name, train, test in read_tasks(folder, tasks, order, test_fraction, seed):
        one_metric = metric if isinstance(metric, str) else metric.get(name, "rouge_l")
        check_known("`metric`", one_metric, TEXT_METRICS)
        length = (
            max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens.get(name, 128)
        )
        built.append(TextTask(name, train, test, one_metric, length))
    return text_benchmark(built, model, limit=limit, max_length=max_length)


def read_tasks(
    folder: str | Path,
    tasks: Sequence[str] | None,
    order: Sequence[int] | None,
    test_fraction: float,
    seed: int,
) -> list[tuple[str, Records, Records]]:
    """Names of a folder's tasks, with their records for training and testing.

    The arguments are those of :func:`TextTasks`.

    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if there are no such tasks, or files do not hold such records.
    """
    root = Path(folder).expanduser()
    found = dict(_task_files(root))
    if not found:
        raise ValueError(
            f"`folder` {str(root)!r} holds no tasks; put <task>.json or <task>.jsonl there, or "
            "<task>/train.json with <task>/test.json."
        )
    names = sorted(found) if tasks is None else list(tasks)
    for name in names:
        check_known("task in `tasks`", name, found)
    return [(name, *_parts(found[name], test_fraction, seed)) for name in arranged(names, order)]


def _task_files(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """Names of tasks with their one file, or their files for training and testing."""
    if not root.is_dir():
        raise FileNotFoundError(f"`folder` is {str(root)!r}, which is not a folder.")
    for path in sorted(root.iterdir()):
        if path.is_file() and path.suffix in SUFFIXES:
            yield path.stem, [path]
        elif path.is_dir():
            parts = {
                part: next(
                    (path / f"{part}{s}" for s in SUFFIXES if (path / f"{part}{s}").is_file()), None
                )
                for part in ("train", "test")
            }
            if any(parts.values()):
                yield path.name, [f or path / f"{part}.json" for part, f in parts.items()]


def _parts(files: list[Path], test_fraction: float, seed: int) -> tuple[Records, Records]:
    if len(files) == 2:
        return read_records(files[0]), read_records(files[1])
    if not 0 < test_fraction < 1:
        raise ValueError(f"`test_fraction` is {test_fraction}; it must lie between 0 and 1.")
    file, records = read_records(files[0])
    if len(records) < 2:
        raise ValueError(f"{file} has a single record; it takes two to draw a test set.")
    n_test = min(max(round(test_fraction * len(records)), 1), len(records) - 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = set(torch.randperm(len(records), generator=generator)[:n_test].tolist())
    return (
        Records(file, [record for i, record in enumerate(records) if i not in drawn]),
        Records(file, [record for i, record in enumerate(records) if i in drawn]),
    )
