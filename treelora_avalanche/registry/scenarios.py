"""The scenarios that the command line knows, as an explicit table.

Nothing heavy is imported until a stream is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from treelora_avalanche.registry.entry_points import Registry, load_object

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
SCENARIO_SETTINGS = (
    _IMAGES
    | _TEXTS
    | {"n_experiences", "exclude_classes", "domains", "download", "variant", "tasks", "order"}
    | {"skip_missing_tasks", "metric", "max_new_tokens"}
)
"""Settings that have a meaning for some scenarios alone."""


@dataclass(frozen=True)
class Scenario:
    """One row of the table of scenarios.

    >>> row = Scenario("my_package.streams:MyStream", "my images", takes={"n_experiences"})

    :param generator: the benchmark generator, ``"package.module:function"``; imported when it is
        used. Of its parameters those get a value that are named in ``takes``; and ``seed``, the
        run's; ``preprocessing``, the model's
        :class:`~treelora_avalanche.models.ImagePreprocessing`; ``model``, the language model;
        ``dataset_root``, ``data_root`` or ``folder``, the folder of the data. The others are the
        scenario's options.
    :param description: one line.
    :param takes: settings with a meaning for it, of those that not all scenarios have.
    :param language: whether it is a stream of texts for language models, and not of images.
    :param backbone: of a scenario that brings its own pretrained model, the function that makes it
        from the seed, ``"package.module:function"``.
    :param n_experiences: number of tasks where the user gives none; None: the data tell.
    :param class_folders: where classes can be excluded, the glob pattern of their folders below the
        folder of the data.
    :param optional_data: whether the generator knows where its data lie.
    :param paper_epochs: whether the paper gives the epochs of each of its tasks.
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
        """Whether the folder of the data has to be given."""
        return "data" in self.takes and not self.optional_data

    def load(self) -> Callable[..., Any]:
        """Imports the benchmark generator."""
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
            "any folder with one folder of images per class",
            _IMAGES | {"n_experiences", "exclude_classes"},
            class_folders="*",
        ),
        "cifar100": Scenario(
            _OURS + "SplitCIFAR100",
            "CIFAR-100; downloaded if wanted (169 MB)",
            _IMAGES | {"n_experiences", "download"},
            optional_data=True,
        ),
        "imagenet_r": Scenario(
            _OURS + "SplitImageNetR",
            "ImageNet-R, 200 classes; downloaded if wanted (2.2 GB)",
            _IMAGES | {"n_experiences", "download"},
        ),
        "cub200": Scenario(
            _OURS + "SplitCUB200",
            "CUB-200-2011, 200 species of birds; downloaded if wanted (1.2 GB)",
            _IMAGES | {"n_experiences", "download"},
        ),
        "domains": Scenario(
            _OURS + "DomainImageFolder",
            "the same classes in several domains: a folder of folders of classes, such as PACS",
            _IMAGES | {"exclude_classes", "domains"},
            n_experiences=None,
            class_folders="*/*",
        ),
        "trace": Scenario(
            _OURS + "TRACE",
            "TRACE: eight tasks of text, from stance detection in Chinese to mathematics",
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
            "fifteen tasks of text: those of TRACE and seven text classifications",
            _TEXTS | {"variant", "skip_missing_tasks"},
            language=True,
            n_experiences=None,
            seeded=False,
        ),
        "o_lora_order": Scenario(
            _OURS + "OLoRAOrder",
            "O-LoRA's text classifications in one of its six orders: four tasks (1-3) or fifteen",
            _TEXTS | {"order", "skip_missing_tasks"},
            language=True,
            n_experiences=None,
            seeded=False,
        ),
        "text_tasks": Scenario(
            _OURS + "TextTasks",
            'your own tasks: a folder with one JSON or JSONL of {"prompt", "answer"} for each',
            _TEXTS | {"tasks", "metric", "max_new_tokens"},
            language=True,
            n_experiences=None,
            seeded=False,
        ),
    },
)
"""All scenarios by name; other packages add theirs by the entry points
``treelora_avalanche.scenarios``."""


__all__ = ["SCENARIOS", "SCENARIO_SETTINGS", "Scenario"]
