"""Everything of a run but its method and seed, as flags; torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from treelora_avalanche.choices import (
    DTYPES,
    HEADS,
    PRECISIONS,
    SELECTIONS,
    TEXT_METRICS,
    TRACE_VARIANTS,
    check_known,
)
from treelora_avalanche.defaults import (
    LANGUAGE_LORA,
    LANGUAGE_TRAINING,
    LAST_TREE_LAMBDA,
    VISION_LORA,
)
from treelora_avalanche.registry.scenarios import SCENARIO_SETTINGS, SCENARIOS, Scenario

IMAGE_MODEL = "vit_base_patch16_224"
EQUAL_EPOCHS, PAPER_EPOCHS = "equal", "paper"

TREE_SETTINGS = frozenset({"tree_lambda", "selection", "depth", "max_adapters"})
LORA_SETTINGS = frozenset({"rank", "alpha", "layers", "target_modules"})
TRAINING_SETTINGS = frozenset({"head", "epochs", "lr", "precision"})
METHOD_SETTINGS = TREE_SETTINGS | LORA_SETTINGS | TRAINING_SETTINGS
"""Settings that some methods do not read, and that may differ between methods."""

# What a setting is where the user gives none; see RunSettings. The numbers of images are those of
# the demonstration, far from the paper's.
VISION_DEFAULTS: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 32,
    "eval_batch_size": 256,
    "rank": VISION_LORA.rank,
    "alpha": float(VISION_LORA.alpha),
    "layers": VISION_LORA.layers,
}
LANGUAGE_DEFAULTS: dict[str, Any] = {
    "epochs": LANGUAGE_TRAINING.train_epochs,
    "batch_size": LANGUAGE_TRAINING.train_mb_size,
    "eval_batch_size": LANGUAGE_TRAINING.eval_mb_size,
    "rank": LANGUAGE_LORA.rank,
    "alpha": float(LANGUAGE_LORA.alpha),
    "layers": LANGUAGE_LORA.layers,
    "tree_lambda": LAST_TREE_LAMBDA,
}
_SMALLEST = {
    "n_experiences": 1,
    "limit": 1,
    "max_new_tokens": 1,
    "img_size": 1,
    "max_length": 2,
    "accumulation_steps": 1,
    "epochs": 1,
    "batch_size": 1,
    "eval_batch_size": 1,
    "rank": 1,
    "depth": 1,
    "max_adapters": 1,
    "tree_lambda": 0,
}


_CHOICES = {
    "selection": SELECTIONS,
    "head": HEADS,
    "variant": TRACE_VARIANTS,
    "metric": TEXT_METRICS,
    "precision": PRECISIONS,
    "dtype": DTYPES,
}


def _about(group: str, text: str) -> dict[str, str]:
    return {"group": group, "help": text}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything of a run but its method and its seed.

    The defaults are the demonstration: a small stream that needs no download. Each field is a flag
    of `treelora train` and `treelora compare`, and a key of their `--config` file. Where a default
    depends on the kind of model (`VISION_DEFAULTS`, `LANGUAGE_DEFAULTS`), None stands for it until
    the settings are made.
    """

    scenario: str = field(
        default="digits", metadata=_about("stream", f"stream of tasks: {', '.join(SCENARIOS)}")
    )
    data: str | None = field(
        default=None, metadata=_about("stream", "folder of the images or texts (not for digits)")
    )
    download: bool = field(
        default=False,
        metadata=_about("stream", "download what is missing there (cifar100, imagenet_r, cub200)"),
    )
    classes: list[str] | None = field(
        default=None,
        metadata=_about("stream", "use these classes only (streams of images but digits)"),
    )
    exclude_classes: list[str] | None = field(
        default=None, metadata=_about("stream", "leave these classes out (image_folder, domains)")
    )
    domains: list[str] | None = field(
        default=None, metadata=_about("stream", "use these domains, in this order (domains)")
    )
    n_experiences: int | None = field(
        default=None,
        metadata=_about(
            "stream",
            "number of tasks that the classes are divided into; default: 5 for digits, else 10 "
            "(domains: one for each)",
        ),
    )
    tasks: list[str] | None = field(
        default=None,
        metadata=_about("stream", "use these tasks, in this order (trace, text_tasks)"),
    )
    variant: str = field(
        default="500",
        metadata=_about(
            "stream",
            f"TRACE's samples per task: {', '.join(TRACE_VARIANTS)} (trace, math_llm, "
            "long_sequence)",
        ),
    )
    order: int = field(
        default=1, metadata=_about("stream", "O-LoRA's order of tasks, 1 to 6 (o_lora_order)")
    )
    skip_missing_tasks: bool = field(
        default=False,
        metadata=_about(
            "stream",
            "go on without the tasks that the data lack, which is another benchmark then "
            "(o_lora_order, long_sequence)",
        ),
    )
    metric: str = field(
        default="rouge_l",
        metadata=_about(
            "stream", f"score of generated answers: {', '.join(TEXT_METRICS)} (text_tasks)"
        ),
    )
    max_new_tokens: int = field(
        default=128, metadata=_about("stream", "where a generated answer is stopped (text_tasks)")
    )
    limit: int | None = field(
        default=None,
        metadata=_about(
            "stream", "use the first samples only of each task's training and test texts"
        ),
    )
    model: str | None = field(
        default=None,
        metadata=_about(
            "model",
            f"timm model, default: {IMAGE_MODEL}, or for digits a small ViT pretrained in the run; "
            "for texts a folder with a language model, or its name on the Hugging Face hub",
        ),
    )
    checkpoint: str | None = field(
        default=None,
        metadata=_about(
            "model", "file with a timm model's weights; default: timm's own, downloaded"
        ),
    )
    img_size: int | None = field(
        default=None,
        metadata=_about("model", "side of the images in pixels; default: the model's own"),
    )
    max_length: int = field(
        default=1024, metadata=_about("model", "tokens of a prompt and its answer, at most (texts)")
    )
    dtype: str | None = field(
        default=None,
        metadata=_about(
            "model",
            f"of a language model's frozen weights: {', '.join(DTYPES)}; default: bfloat16 on a "
            "GPU, else float32",
        ),
    )
    precision: str = field(
        default="fp32",
        metadata=_about(
            "model",
            "of the forward pass: fp32, the weights' own; bf16, while weights and optimizer keep "
            "theirs; auto, bf16 where the device has instructions for it",
        ),
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_about("model", "compute activations twice, to save memory (texts)")
    )
    device: str = field(
        default="auto",
        metadata=_about("model", "cpu, cuda, cuda:1, ...; auto: cuda where there is one"),
    )
    accumulation_steps: int = field(
        default=1,
        metadata=_about(
            "training", "batches whose gradients make one step of the optimizer (texts)"
        ),
    )
    epochs: int | None = field(
        default=None,
        metadata=_about("training", "epochs per task, for every method; default: 4, for texts 1"),
    )
    epochs_per_task: list[int] | str | None = field(
        default=None,
        metadata=_about(
            "training",
            f"in place of --epochs, for texts: a number for each task; {EQUAL_EPOCHS}: the paper's "
            f"for TreeLoRA, for every method (default of trace and math_llm); {PAPER_EPOCHS}: the "
            "paper's for each method",
        ),
    )
    batch_size: int | None = field(
        default=None,
        metadata=_about("training", "samples per training step; default: 32, for texts 4"),
    )
    eval_batch_size: int | None = field(
        default=None,
        metadata=_about("training", "samples per evaluation step; default: 256, for texts 16"),
    )
    lr: float | None = field(
        default=None, metadata=_about("training", "learning rate; default: the method's own")
    )
    head: str = field(
        default="linear",
        metadata=_about(
            "training",
            "linear, or task_adaptive: re-trained after every task on remembered class statistics "
            "(images)",
        ),
    )
    rank: int | None = field(
        default=None, metadata=_about("LoRA", "rank of the LoRA factors; default: 10, for texts 8")
    )
    alpha: float | None = field(
        default=None,
        metadata=_about(
            "LoRA", "LoRA's output is scaled by alpha / rank; default: 10, for texts 32"
        ),
    )
    layers: list[int] | str | None = field(
        default=None,
        metadata=_about(
            "LoRA",
            "blocks with LoRA: first:k, last:k, all, or a list of numbers; default: first:5, for "
            "texts all",
        ),
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata=_about(
            "LoRA",
            "linear layers with LoRA inside a block, e.g. [qkv, attn.proj]; default: qkv, for "
            "texts those of queries and values",
        ),
    )
    tree_lambda: float | None = field(
        default=None,
        metadata=_about(
            "TreeLoRA",
            "strength of TreeLoRA's pull towards the picked task; default: 0.1 where the mean of "
            "all adapters or one adapter per task answers, else 0.5",
        ),
    )
    selection: str = field(
        default="lcb",
        metadata=_about("TreeLoRA", f"how TreeLoRA picks a past task: {', '.join(SELECTIONS)}"),
    )
    depth: int | None = field(
        default=None,
        metadata=_about("TreeLoRA", "levels of TreeLoRA's tree; default: adapted matrices"),
    )
    max_adapters: int | None = field(
        default=None,
        metadata=_about(
            "TreeLoRA",
            "stored adapters beyond which TreeLoRA merges the closest two; default: keep all",
        ),
    )
    method_options: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata=_about(
            "options",
            "options of single methods, see treelora list METHOD: '{EWCLoRA: {ewc_lambda: 1.0e+5, "
            "lr: 0.001}}'; those of training, LoRA and TreeLoRA above may be among them",
        ),
    )
    scenario_options: dict[str, Any] | None = field(
        default=None,
        metadata=_about("options", "options of the scenario, see treelora list SCENARIO"),
    )

    def __post_init__(self) -> None:
        check_known("`--scenario`", self.scenario, SCENARIOS)
        for name, values in _CHOICES.items():
            if getattr(self, name) is not None:
                check_known(f"`--{name}`", getattr(self, name), values)
        self._check_ranges()
        self._check_meaning()
        if self._scenario.needs_data and self.data is None:
            raise ValueError(f"`--scenario {self.scenario}` needs `--data FOLDER`")
        if self.on_language and self.model is None:
            raise ValueError(
                f"`--scenario {self.scenario}` needs `--model`: a folder with a language model, or "
                "its name on the Hugging Face hub, such as meta-llama/Llama-3.2-1B-Instruct"
            )
        self._check_epochs()
        defaults = LANGUAGE_DEFAULTS if self.on_language else VISION_DEFAULTS
        if self.epochs is None and self.epochs_per_task is None and self._scenario.paper_epochs:
            defaults = {**defaults, "epochs": None, "epochs_per_task": EQUAL_EPOCHS}
        elif self.epochs_per_task is not None:
            defaults = {**defaults, "epochs": None}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the dataclass is frozen

    def _check_ranges(self) -> None:
        for name, least in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"`--{name}` should be at least {least}, but is {value}.")
        for name in ("lr", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`--{name}` should be a positive number, but is {value}.")
        if not 1 <= self.order <= 6:
            raise ValueError(f"`--order` should be from 1 to 6, but is {self.order}.")

    def _check_meaning(self) -> None:
        """Raises for a setting that would have no effect."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in sorted(self.without_meaning):
            value = getattr(self, name)
            if value and value != defaults[name]:
                brings = self._scenario.backbone and name in ("data", "model", "checkpoint")
                reason = (
                    f"{self.scenario} brings its own data and model. Set another `--scenario`, or "
                    "leave it out."
                    if brings
                    else f"`--scenario {self.scenario}` does not use it. Leave it out."
                )
                raise ValueError(f"`--{name}` is {value!r}, but {reason}")

    def _check_epochs(self) -> None:
        wanted = self.epochs_per_task
        if wanted is None:
            return
        if self.epochs is not None:
            raise ValueError("`--epochs` and `--epochs_per_task` are both given. Choose one.")
        if isinstance(wanted, str):
            check_known("`--epochs_per_task`", wanted, (EQUAL_EPOCHS, PAPER_EPOCHS))
            if not self._scenario.paper_epochs:
                raise ValueError(
                    f"`--epochs_per_task` is {wanted!r}, but the paper gives no epochs for "
                    f"`--scenario {self.scenario}`. Pass a list of numbers, or `--epochs`."
                )
        elif not wanted or min(wanted) < 1:
            raise ValueError(
                f"`--epochs_per_task` should be at least 1 for each task, but is {wanted}."
            )

    def with_changes(self, **changes: Any) -> RunSettings:
        """Returns the settings with some of them changed.

        :param changes: the new values; ``epochs`` and ``epochs_per_task`` replace each other.
        """
        for name, other in (("epochs", "epochs_per_task"), ("epochs_per_task", "epochs")):
            if changes.get(name) is not None:
                changes.setdefault(other, None)
        return replace(self, **changes)

    @property
    def _scenario(self) -> Scenario:
        return SCENARIOS[self.scenario]

    @property
    def on_digits(self) -> bool:
        """Whether the stream is that of the demonstration."""
        return self.scenario == "digits"

    @property
    def on_language(self) -> bool:
        """Whether a language model learns the stream."""
        return self._scenario.language

    @property
    def without_meaning(self) -> frozenset[str]:
        """Settings that the scenario does not read."""
        return SCENARIO_SETTINGS - self._scenario.takes

    @property
    def number_of_experiences(self) -> int:
        """Number of tasks, with the scenario's default filled in."""
        return self.n_experiences or self._scenario.n_experiences or 1

    @property
    def model_name(self) -> str:
        """The model, with the default filled in."""
        return self.model or IMAGE_MODEL


__all__ = [
    "EQUAL_EPOCHS",
    "LORA_SETTINGS",
    "METHOD_SETTINGS",
    "PAPER_EPOCHS",
    "SCENARIOS",
    "TRAINING_SETTINGS",
    "TREE_SETTINGS",
    "RunSettings",
]
