"""Streams whose prompts do not tell the tasks apart, under each inference of TreeLoRA.

Routed inference selects the adapter by the prompt. Each of these streams of two or three tasks
takes that away, with one template for all its tasks:

* ``halves``: the same task twice, on other texts (AG News);
* ``renamed``: the labels have other names in the second task (AG News, ``A`` to ``D``);
* ``contradicted``: the labels of the second task are exchanged (SST-2, good for bad);
* ``drift``: the domain drifts, from phrases on films (SST-2) to reviews of products (Amazon,
  without the neutral ones) and of films (IMDB, its first 300 characters).

Under ``renamed`` and ``contradicted`` no inference without the task's name can solve both tasks:
the newest is what a user means today, so that its accuracy (``newest``) counts too.

``routed``, ``last`` and ``merged`` share all but the inference. ``±`` is the half-width of the 95%
interval of Op, of a binomial. The routes say which tasks' adapters the prompts of all tasks got.

    python benchmarks/ambiguous_prompts.py --check --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from _command import DATA, print_table, required_path, run

from treelora_avalanche.compare import compare
from treelora_avalanche.registry import RunSettings

Task = tuple[list[dict[str, str]], list[dict[str, str]]]
"""Records for training and for testing."""

METHODS = {"routed": "TreeLoRA", "last": "TreeLoRA-last", "merged": "TreeLoRA-merged"}
SENTIMENT, TOPIC = "What is the sentiment of this text?", "What is the topic of this text?"
GOOD, BAD = "Good", "Bad"
LETTERS = {"World": "A", "Sports": "B", "Business": "C", "Science or Technology": "D"}
TO_TWO = {"very negative": BAD, "negative": BAD, "positive": GOOD, "very positive": GOOD}


def records(
    root: Path, task: str, question: str, labels: dict[str, str], n: tuple[int, int], skip: int = 0
) -> Task:
    """Returns the first records of a task under another template.

    :param root: the folder ``CL_Benchmark``.
    :param task: family and task.
    :param question: the first line of each prompt.
    :param labels: new name of each label; records of other labels are left out.
    :param n: number of records for training and for testing.
    :param skip: records to leave out at the start of both.
    """
    parts = []
    for split, size in zip(("train", "test"), n, strict=True):
        read = json.loads((root / task / f"{split}.json").read_text(encoding="utf-8"))
        kept = [record for record in read if record["label"] in labels][skip : skip + size]
        parts.append(
            [
                {
                    "prompt": f"{question}\n{record['sentence'].strip()[:300]}\nAnswer:",
                    "answer": labels[record["label"]],
                }
                for record in kept
            ]
        )
    return parts[0], parts[1]


def streams(root: Path, n: tuple[int, int]) -> dict[str, dict[str, Task]]:
    """Returns the tasks of every stream.

    :param root: the folder ``CL_Benchmark``.
    :param n: number of records per task for training and for testing.
    """
    topics, same = {label: label for label in LETTERS}, {GOOD: GOOD, BAD: BAD}
    news = ("TC/agnews", TOPIC)
    films = ("SC/SST-2", SENTIMENT)
    half = max(n)
    return {
        "halves": {
            "first": records(root, *news, topics, n),
            "second": records(root, *news, topics, n, skip=half),
        },
        "renamed": {
            "names": records(root, *news, topics, n),
            "letters": records(root, *news, LETTERS, n, skip=half),
        },
        "contradicted": {
            "right": records(root, *films, same, n),
            "exchanged": records(root, *films, {GOOD: BAD, BAD: GOOD}, n, skip=half),
        },
        "drift": {
            "phrases": records(root, *films, same, n),
            "products": records(root, "SC/amazon", SENTIMENT, TO_TWO, n),
            "films": records(root, "SC/IMDB", SENTIMENT, same, n),
        },
    }


def write(folder: Path, tasks: dict[str, Task]) -> None:
    """Writes the tasks as a folder for the scenario ``text_tasks``.

    :param folder: the folder.
    :param tasks: the records of each.
    """
    for name, parts in tasks.items():
        (folder / name).mkdir(parents=True)
        for split, part in zip(("train", "test"), parts, strict=True):
            (folder / name / f"{split}.json").write_text(json.dumps(part), encoding="utf-8")


def routes_of(results: dict[str, Any]) -> str:
    """Returns the share of the prompts of all tasks that each task's adapter got.

    :param results: of a run.
    """
    counts: Counter[str] = Counter()
    for of_task in (results["routes"] or {}).values():
        counts.update(of_task)
    return ", ".join(f"{name} {n / counts.total():.0%}" for name, n in counts.most_common())


def ambiguous_prompts(
    model: str | None = None,
    only: tuple[str, ...] | None = None,
    n_train: int = 48,
    n_test: int = 48,
    epochs: int = 3,
    lr: float = 0.003,
    layers: str = "last:10",
    seed: int = 0,
    data: str = DATA,
) -> list[str]:
    """Trains every stream under every inference.

    :param model: folder or hub name of a language model; by default ``stories260K``, which learns
        too little for the accuracies to mean anything.
    :param only: the streams to run; by default all.
    :param n_train: training texts per task.
    :param n_test: test texts per task.
    :param epochs: epochs per task.
    :param lr: learning rate.
    :param layers: layers to adapt.
    :param seed: seed of the runs.
    :param data: folder with ``CL_Benchmark``.
    :return: the streams in which routed inference is worse than another by more than the interval.
    """
    root = required_path(Path(data), "CL_Benchmark")
    missed = []
    for name, tasks in streams(root, (n_train, n_test)).items():
        if only is not None and name not in only:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            write(Path(temporary) / "tasks", tasks)
            settings = RunSettings(
                scenario="text_tasks",
                data=str(Path(temporary) / "tasks"),
                tasks=list(tasks),
                model=model or str(required_path(Path(data), "stories260K")),
                dtype="bfloat16",
                max_length=128,
                epochs=epochs,
                lr=lr,
                layers=layers,
                tree_lambda=0.0,  # the routed default, for all three
                scenario_options={"allow_overlap": True},
            )
            cells = compare(list(METHODS.values()), [seed], settings, Path(temporary) / "runs")
        missed += _report(name, list(tasks), [cell.results or {} for cell in cells], n_test)
    return missed


def _report(name: str, tasks: list[str], results: list[dict[str, Any]], n_test: int) -> list[str]:
    rows: list[tuple[str, ...]] = []
    ops: dict[str, float] = {}
    widths: dict[str, float] = {}
    for inference, result in zip(METHODS, results, strict=True):
        final = result["accuracy_matrix"]["generated"][-1]
        op = ops[inference] = sum(final) / len(final)
        width = widths[inference] = 1.96 * math.sqrt(op * (1 - op) / (n_test * len(tasks)))
        each = ", ".join(f"{100 * score:.0f}" for score in final)
        scores = (f"{100 * op:.1f} ± {100 * width:.1f}", each, f"{100 * final[-1]:.0f}")
        rows.append((inference, *scores, routes_of(result)))
    print_table(
        f"{name}: {', '.join(tasks)}", ("inference", "Op %", "each", "newest", "routes"), rows
    )
    best = max(ops, key=ops.__getitem__)
    if ops[best] - ops["routed"] <= widths[best]:
        return []
    return [f"{name}: routed has {ops['routed']:.3f}, {best} {ops[best]:.3f} ± {widths[best]:.3f}"]


if __name__ == "__main__":
    run(ambiguous_prompts)
