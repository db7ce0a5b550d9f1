"""TRACE (Wang et al. 2023, arXiv 2310.06762): eight text tasks, from stances to summaries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from avalanche.benchmarks import CLScenario

from treelora_avalanche.choices import TRACE_VARIANTS, check_known
from treelora_avalanche.scenarios.data.text_benchmark import TextTask, text_benchmark
from treelora_avalanche.scenarios.data.text_parts import ordered_tasks
from treelora_avalanche.scenarios.data.text_records import read_records


class _TraceTask(NamedTuple):
    metric: str
    max_new_tokens: int


# Generation stops at the release's 512 tokens, or earlier if more tokens cannot change the score
# (accuracy compares whole strings, and of ScienceQA the first character).
_TASKS = {
    "C-STANCE": _TraceTask("accuracy", 16),
    "FOMC": _TraceTask("accuracy", 16),
    "MeetingBank": _TraceTask("rouge_l", 512),
    "Py150": _TraceTask("edit_similarity", 512),
    "ScienceQA": _TraceTask("accuracy", 16),
    "NumGLUE-cm": _TraceTask("accuracy", 64),
    "NumGLUE-ds": _TraceTask("accuracy", 64),
    "20Minuten": _TraceTask("sari", 512),
}

TRACE_TASKS = tuple(_TASKS)
"""The tasks in the order of TRACE, and of TreeLoRA's experiments on it."""

MATH_TASKS = ("ScienceQA", "NumGLUE-cm", "NumGLUE-ds")
"""The tasks of science and mathematics (TreeLoRA, Table 7)."""

TREELORA_EPOCHS = dict(zip(TRACE_TASKS, (2, 1, 3, 2, 1, 2, 2, 3), strict=True))
"""The paper's epochs of each task for TreeLoRA; 16 in total."""

LORA_EPOCHS = dict(zip(TRACE_TASKS, (5, 3, 7, 5, 3, 5, 5, 7), strict=True))
"""The paper's epochs for the other LoRA methods; 40 in total. Report equal epochs too."""

FULL_EPOCHS = dict(zip(TRACE_TASKS, (1, 1, 5, 5, 1, 5, 5, 5), strict=True))
"""The paper's epochs for methods that train every weight; 28 in total."""


def TRACE(
    data_root: str | Path,
    model: Any,
    variant: str = "500",
    *,
    tasks: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    max_length: int = 1024,
) -> CLScenario:
    """Returns the eight tasks of TRACE, one experience each.

    Reads the layout of the release, ``LLM-CL-Benchmark_<variant>/<task>/{train,test}.json``. The
    attributes of an experience are listed at
    :func:`~treelora_avalanche.scenarios.data.text_benchmark.text_benchmark`; the epochs of the
    TreeLoRA paper are :data:`TREELORA_EPOCHS`, :data:`LORA_EPOCHS` and :data:`FULL_EPOCHS`.

    Example::

        model = create_language_model("meta-llama/Llama-3.2-1B-Instruct", dtype="bfloat16")
        benchmark = TRACE("data", model)
        for experience in benchmark.train_stream:
            strategy.train_epochs = TREELORA_EPOCHS[experience.task_name]
            strategy.train(experience)

    :param data_root: the folder that contains ``TRACE-Benchmark``, or that folder itself.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param variant: records per task: ``"500"``, as in TreeLoRA, ``"1000"`` or ``"5000"``.
    :param tasks: names of the tasks to use, in order of arrival; by default all, in TRACE's order.
    :param order: positions in that list, from 0, to change the order.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :return: the benchmark; it carries ``task_names``.
    :raises FileNotFoundError: if the variant lacks a task.
    :raises ValueError: if a file does not hold ``{"prompt", "answer"}`` records; the error names
        file and record.
    """
    built = trace_tasks(data_root, variant, ordered_tasks(tasks or TRACE_TASKS, order))
    return text_benchmark(built, model, limit=limit, eval_limit=eval_limit, max_length=max_length)


def MathLLM(
    data_root: str | Path,
    model: Any,
    variant: str = "500",
    *,
    order: Sequence[int] | None = None,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    max_length: int = 1024,
) -> CLScenario:
    """Returns TRACE's three tasks of science and mathematics, :data:`MATH_TASKS` (Table 7).

    Example::

        benchmark = MathLLM("data", create_language_model("gpt2"), "1000")

    :param data_root: the folder that contains ``TRACE-Benchmark``, or that folder itself.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param variant: records per task: ``"500"``, as in TreeLoRA, ``"1000"`` or ``"5000"``.
    :param order: positions in :data:`MATH_TASKS`, from 0, to change the order.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :return: the benchmark, as :func:`TRACE` returns it.
    :raises FileNotFoundError: if the variant lacks a task.
    :raises ValueError: if a file does not hold ``{"prompt", "answer"}`` records.
    """
    return TRACE(
        data_root,
        model,
        variant,
        tasks=MATH_TASKS,
        order=order,
        limit=limit,
        eval_limit=eval_limit,
        max_length=max_length,
    )


def trace_tasks(data_root: str | Path, variant: str, names: Sequence[str]) -> list[TextTask]:
    """Returns tasks of TRACE with their records.

    :param data_root: the folder that contains ``TRACE-Benchmark``, or that folder itself.
    :param variant: records per task, a name in :data:`~treelora_avalanche.choices.TRACE_VARIANTS`.
    :param names: the tasks, in order of arrival.
    :raises FileNotFoundError: if the variant lacks a task.
    """
    variant = str(variant)
    check_known("`variant`", variant, TRACE_VARIANTS)
    for name in names:
        check_known("task in `tasks`", name, TRACE_TASKS)
    folder = _variant_folder(Path(data_root).expanduser(), variant)
    _check_complete(folder, variant, names)
    return [
        TextTask(
            name,
            read_records(folder / name / "train.json"),
            read_records(folder / name / "test.json"),
            *_TASKS[name],
        )
        for name in names
    ]


def _variant_folder(root: Path, variant: str) -> Path:
    name = f"LLM-CL-Benchmark_{variant}"
    for folder in (root / "TRACE-Benchmark" / name, root / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"`data_root` {str(root)!r} holds no TRACE of variant {variant}: neither "
        f"TRACE-Benchmark/{name} nor {name} is a folder there. Get the release from "
        "https://github.com/BeyonderXX/TRACE."
    )


def _check_complete(folder: Path, variant: str, names: Sequence[str]) -> None:
    """Raises an error that names the missing files, and the tasks that are complete."""

    def missing(name: str) -> list[str]:
        parts = (f"{name}/{part}.json" for part in ("train", "test"))
        return [part for part in parts if not (folder / part).is_file()]

    lacking = [part for name in names for part in missing(name)]
    if lacking:
        complete = [name for name in TRACE_TASKS if not missing(name)]
        raise FileNotFoundError(
            f"variant {variant} in {folder} lacks {', '.join(lacking)}; name the tasks that are "
            f"there in `tasks` ({', '.join(complete) or 'none is complete'}), or choose another "
            "variant."
        )
