"""The streams of tasks that the command line knows, as an explicit table."""

from __future__ import annotations

from dataclasses import dataclass

_DIGITS = frozenset({"n_experiences", "model", "head"})
_IMAGES = frozenset({"data", "classes", "model", "checkpoint", "img_size", "head"})
_TEXTS = frozenset(
    {
        "data",
        "model",
        "limit",
        "epochs_per_task",
        "max_length",
        "dtype",
        "gradient_checkpointing",
        "accumulation_steps",
    }
)
SCENARIO_OPTIONS = (
    _DIGITS
    | _IMAGES
    | _TEXTS
    | {"exclude_classes", "domains", "download", "variant", "tasks", "order"}
    | {"skip_missing_tasks", "metric", "max_new_tokens"}
)


@dataclass(frozen=True)
class Scenario:
    """One row of the table of scenarios."""

    description: str
    takes: frozenset[str]
    """ Those of the scenario's settings that have a meaning for it. """
    n_experiences: int | None = 10
    """ Number of tasks where the user gives none; None: the data tell. """
    needs_data: bool = True
    language: bool = False
    """ Whether language models learn it, and not vision transformers. """
    paper_epochs: bool = False
    """ Whether the paper gives the epochs of each of its tasks. """


SCENARIOS: dict[str, Scenario] = {
    "digits": Scenario(
        "scikit-learn's digits, 8 x 8 pixels, 10 classes; no download",
        takes=_DIGITS,
        n_experiences=5,
        needs_data=False,
    ),
    "image_folder": Scenario(
        "any folder with one folder of images per class",
        takes=_IMAGES | {"n_experiences", "exclude_classes"},
    ),
    "cifar100": Scenario(
        "CIFAR-100; downloaded if wanted (169 MB)",
        takes=_IMAGES | {"n_experiences", "download"},
        needs_data=False,
    ),
    "imagenet_r": Scenario(
        "ImageNet-R, 200 classes; downloaded if wanted (2.2 GB)",
        takes=_IMAGES | {"n_experiences", "download"},
    ),
    "cub200": Scenario(
        "CUB-200-2011, 200 species of birds; downloaded if wanted (1.2 GB)",
        takes=_IMAGES | {"n_experiences", "download"},
    ),
    "domains": Scenario(
        "the same classes in one domain after another: a folder of folders of classes, as PACS",
        takes=_IMAGES | {"exclude_classes", "domains"},
        n_experiences=None,
    ),
    "trace": Scenario(
        "TRACE: eight tasks of text, from stance detection in Chinese to mathematics",
        takes=_TEXTS | {"variant", "tasks"},
        n_experiences=None,
        language=True,
        paper_epochs=True,
    ),
    "math_llm": Scenario(
        "TRACE's three tasks of science and mathematics",
        takes=_TEXTS | {"variant"},
        n_experiences=None,
        language=True,
        paper_epochs=True,
    ),
    "long_sequence": Scenario(
        "fifteen tasks of text: those of TRACE and seven text classifications",
        takes=_TEXTS | {"variant", "skip_missing_tasks"},
        n_experiences=None,
        language=True,
    ),
    "o_lora_order": Scenario(
        "O-LoRA's text classifications in one of its six orders: four tasks (1-3) or fifteen (4-6)",
        takes=_TEXTS | {"order", "skip_missing_tasks"},
        n_experiences=None,
        language=True,
    ),
    "text_tasks": Scenario(
        'your own tasks: a folder with one JSON or JSONL of {"prompt", "answer"} for each',
        takes=_TEXTS | {"tasks", "metric", "max_new_tokens"},
        n_experiences=None,
        language=True,
    ),
}


__all__ = ["SCENARIOS", "SCENARIO_OPTIONS", "Scenario"]
