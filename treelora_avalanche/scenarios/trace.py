"""TRACE (Wang et al. 2023, arXiv 2310.06762): eight tasks of text, from stances to summaries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from avalanche.benchmarks import CLScenario

from treelora_avalanche.choices import TRACE_VARIANTS, check_known
from treelora_avalanche.scenarios.data.text_records import read_records
from treelora_avalanche.scenarios.text_tasks import TextTask, arranged, text_benchmark


class _TaskOfTrace(NamedTuple):
    metric: str
    max_new_tokens: int


# A generation is stopped where no longer one could score differently (accuracy compares whole
# strings, and of ScienceQA the first character), else at the release's 512 tokens.
_TASKS = {
    "C-STANCE": _TaskOfTrace("accuracy", 16),
    "FOMC": _TaskOfTrace("accuracy", 16),
    "MeetingBank": _TaskOfTrace("rouge_l", 512),
    "Py150": _TaskOfTrace("edit_similarity", 512),
    "ScienceQA": _TaskOfTrace("accuracy", 16),
    "NumGLUE-cm": _TaskOfTrace("accuracy", 64),
    "NumGLUE-ds": _TaskOfTrace("accuracy", 64),
    "20Minuten": _TaskOfTrace("sari", 512),
}

TRACE_TASKS = tuple(_TASKS)
"""The tasks in the order of TRACE, and of TreeLoRA's experiments on it."""

MATH_TASKS = ("ScienceQA", "NumGLUE-cm", "NumGLUE-ds")
"""Those of science and mathematics (TreeLoRA, Table 7)."""

TREELORA_EPOCHS = dict(zip(TRACE_TASKS, (2, 1, 3, 2, 1, 2, 2, 3), strict=True))
"""Epochs of each task in TreeLoRA's experiments, for TreeLoRA; 16 in sum."""

LORA_EPOCHS = dict(zip(TRACE_TASKS, (5, 3, 7, 5, 3, 5, 5, 7), strict=True))
"""The same for the other methods with LoRA; 40 in sum. Report equal epochs beside these."""

FULL_EPOCHS = dict(zip(TRACE_TASKS, (1, 1, 5, 5, 1, 5, 5, 5), strict=True))
"""The same for the methods that train every weight; 28 in sum."""


def TRACE(
    data_root: str | Path,
    model: Any,
    variant: str = "500",
    *,
    tasks: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    limit: int | None = None,
    max_length: int = 1024,
) -> CLScenario:
    """The eight tasks of TRACE, one experience each.

    Read is the layout of the release, ``LLM-CL-Benchmark_<variant>/<task>/{train,test}.json``. For
    what an experience carries see
    :func:`~treelora_avalanche.scenarios.text_tasks.text_benchmark`; the epochs of the TreeLoRA
    paper are :data:`TREELORA_EPOCHS`, :data:`LORA_EPOCHS` and :data:`FULL_EPOCHS`.

    :param data_root: the folder that holds ``TRACE-Benchmark``, or that folder itself.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` that is to learn it, or a
        tokenizer.
    :param variant: records per task: ``"500"``, as in TreeLoRA, ``"1000"`` or ``"5000"``.
    :param tasks: names of the tasks to use, in the order in which they arrive; by default all, in
        TRACE's order.
    :param order: another order, as places in that list, from 0.
    :param limit: the first so many records of each file; None for all.
    :param max_length: most tokens of a prompt and its answer, where ``model`` is a tokenizer.
    :return: the benchmark; it carries ``task_names``.
    :raises FileNotFoundError: if the variant lacks a task.
    :raises ValueError: if a file does not hold ``{"prompt", "answer"}`` records; file and record
        are named.
    """
    built = trace_tasks(data_root, variant, arranged(tasks or TRACE_TASKS, order))
    return text_benchmark(built, model, limit=limit, max_length=max_length)


def MathLLM(
    data_root: str | Path,
    model: Any,
    variant: str = "500",
    *,
    order: Sequence[int] | None = None,
    limit: int | None = None,
    max_length: int = 1024,
) -> CLScenario:
    """The three tasks of :func:`TRACE` on science and mathematics: :data:`MATH_TASKS`.

    The arguments are those of :func:`TRACE`.
    """
    return TRACE(
        data_root,
        model,
        variant,
        tasks=MATH_TASKS,
        order=order,
        limit=limit,
        max_length=max_length,
    )


def trace_tasks(data_root: str | Path, variant: str, names: Sequence[str]) -> list[TextTask]:
    """Tasks of TRACE as they are on disk; the arguments are those of :func:`TRACE`.

    :param data_root: see :func:`TRACE`.
    :param variant: see :func:`TRACE`.
    :param names: the tasks.
    :raises FileNotFoundError: if the variant lacks a task.
    """
    variant = str(variant)
    check_known("`variant`", variant, TRACE_VARIANTS)
    for name in names:
        check_known("task in `tasks`", name, TRACE_TASKS)
    root = Path(data_root).expanduser()
    folder = f"LLM-CL-Benchmark_{variant}"
    places = [root / "TRACE-Benchmark" / folder, root / folder]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise FileNotFoundError(
            f"`data_root` {str(root)!r} holds no TRACE of variant {variant}: neither "
            f"TRACE-Benchmark/{folder} nor {folder} is a folder there. Get the release from "
            "https://github.com/BeyonderXX/TRACE."
        )
    lacking = [
        f"{name}/{part}.json"
        for name in names
        for part in ("train", "test")
        if not (found / name / f"{part}.json").is_file()
    ]
    if lacking:
        whole = [
            name
            for name in TRACE_TASKS
            if all((found / name / f"{part}.json").is_file() for part in ("train", "test"))
        ]
        raise FileNotFoundError(
            f"variant {variant} in {found} lacks {', '.join(lacking)}; name the tasks that are "
            f"there in `tasks` ({', '.join(whole) or 'none is whole'}), or choose another variant."
        )
    return [
        TextTask(
            name,
            read_records(found / name / "train.json"),
            read_records(found / name / "test.json"),
            *_TASKS[name],
        )
        for name in names
    ]
