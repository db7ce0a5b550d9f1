"""Table of scenarios.

torch is not imported until a stream is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from treelora_avalanche.registry.entry_points import Registry, load_object

_IMAGES = frozenset({"data", "classes", "limit", "model", "checkpoint", "img_size", "head"})
_TEXTS = frozenset(
    {
        "data",
        "model",
        "limit",
        "eval_limit",
        "plain_text",
        "epochs_per_task",
        "max_length",
        "dtype",
        "gradient_checkpointing",
        "chat_template",
        "accumulation_steps",
    }
)
SCENARIO_SETTINGS = (
    _IMAGES
    | _TEXTS
    | {"n_experiences", "exclude_classes", "domains", "download", "variant", "tasks", "order"}
    | {"skip_missing_tasks", "metric", "max_new_tokens"}
)
"""Settings that not all scenarios read."""


@dataclass(frozen=True)
class Scenario:
    """One row of the table of scenarios.

    >>> row = Scenario("my_package.streams:MyStream", "my images", takes={"n_experiences"})

    :param generator: the benchmark generator, ``"package.module:function"``; imported on first use.
        It is passed the settings in ``takes``, and, if it has these parameters: ``seed``, the
        run's; ``preprocessing``, the model's
        :class:`~treelora_avalanche.models.ImagePreprocessing`; ``model``, the language model, whose
        weights are loaded after the stream is built; ``dataset_root``, ``data_root`` or ``folder``,
        the folder of the data. Its other parameters are the scenario's options.
    :param description: one line.
    :param takes: settings that it reads, of those that not all scenarios read.
    :param language: whether it is a stream of texts for language models, not of images.
    :param backbone: function from a seed to a pretrained model, ``"package.module:function"``, of a
        scenario with a model of its own.
    :param n_experiences: default number of tasks; None if the data determine it.
    :param class_folders: glob pattern of the class folders in the folder of the data, if classes
        can be excluded.
    :param optional_data: whether the generator has a default folder.
    :param paper_epochs: whether the paper gives the epochs of each task.
    :param seeded: whether the generator's ``seed`` is the run's seed.
    """

    generator: str
    description: str
    takes: frozenset[str] | set[str] = frozenset()
    language: bool = False
    backbone: str | None = None
    n_experiences: int | None = 10
    class_folders: str | None = None
    optional_data: bool = False
    paper_epochs: bool = False
    seeded: bool = True

    @property
    def needs_data(self) -> bool:
        """Whether the folder of the data is required."""
        return "data" in self.takes and not self.optional_data

    def load(self) -> Callable[..., Any]:
        """Imports and returns the benchmark generator."""
        generator: Callable[..., Any] = load_object(self.generator)
        return generator


_OURS = "treelora_avalanche.scenarios:"

SCENARIOS: Registry[Scenario] = Registry(
    "`--scenario`",
    "treelora_avalanche.scenarios",
    Scenario,
    {
        "digits": Scenario(
            _OURS + "SplitDigits",
            "scikit-learn's digits, 8 x 8 pixels, 10 classes; no download",
            {"n_experiences", "head"},
            backbone="treelora_avalanche.models:pretrained_digits_vit",
            n_experiences=5,
        ),
        "image_folder": Scenario(
            _OURS + "SplitImageFolder",
            "a folder with one folder of images per class",
            _IMAGES | {"n_experiences", "exclude_classes"},
            class_folders="*",
        ),
        "cifar100": Scenario(
            _OURS + "SplitCIFAR100",
            "CIFAR-100; 169 MB with --download",
            _IMAGES | {"n_experiences", "download"},
            optional_data=True,
        ),
        "imagenet_r": Scenario(
            _OURS + "SplitImageNetR",
            "ImageNet-R, 200 classes; 2.2 GB with --download",
            _IMAGES | {"n_experiences", "download"},
        ),
        "cub200": Scenario(
            _OURS + "SplitCUB200",
            "CUB-200-2011, 200 species of birds; 1.2 GB with --download",
            _IMAGES | {"n_experiences", "download"},
        ),
        "domains": Scenario(
            _OURS + "DomainImageFolder",
            "domain-incremental: the same classes in several domains, such as PACS",
            _IMAGES | {"exclude_classes", "domains"},
            n_experiences=None,
            class_folders="*/*",
        ),
        "image_tasks": Scenario(
            _OURS + "ImageTasks",
            "your own tasks: a folder with one folder per task, each with classes of its own",
            _IMAGES | {"tasks"},
            n_experiences=None,
        ),
        "trace": Scenario(
            _OURS + "TRACE",
            "TRACE: eight tasks, from stance detection in Chinese to mathematics",
            _TEXTS | {"variant", "tasks"},
            language=True,
            n_experiences=None,
            paper_epochs=True,
            seeded=False,
        ),
        "math_llm": Scenario(
            _OURS + "MathLLM",
            "TRACE's three tasks of science and mathematics",
            _TEXTS | {"variant"},
            language=True,
            n_experiences=None,
            paper_epochs=True,
            seeded=False,
        ),
        "long_sequence": Scenario(
            _OURS + "LongSequence",
            "fifteen tasks: those of TRACE and seven text classifications",
            _TEXTS | {"variant", "skip_missing_tasks"},
            language=True,
            n_experiences=None,
            seeded=False,
        ),
        "o_lora_order": Scenario(
            _OURS + "OLoRAOrder",
            "O-LoRA's text classifications in one of its six orders: four tasks (1-3) or fifteen",
            _TEXTS | {"order", "tasks", "skip_missing_tasks"},
            language=True,
            n_experiences=None,
            seeded=False,
        ),
        "text_tasks": Scenario(
            _OURS + "TextTasks",
            'your own tasks: a folder with {"prompt", "answer"} in JSON, JSONL, CSV or Parquet',
            _TEXTS | {"tasks", "metric", "max_new_tokens"},
            language=True,
            n_experiences=None,
            seeded=False,
        ),
        "tiny_texts": Scenario(
            _OURS + "TinyTexts",
            "seven small instruction tasks, such as sentiment and plurals; no download",
            (_TEXTS - {"data", "limit", "eval_limit"}) | {"tasks"},
            language=True,
            n_experiences=None,
        ),
    },
)
"""Scenarios by name; other packages add theirs by entry points ``treelora_avalanche.scenarios``."""


__all__ = ["SCENARIOS", "SCENARIO_SETTINGS", "Scenario"]
