"""Settings of a run, each a flag of the command line; torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from treelora_avalanche.choices import (
    DTYPES,
    HEADS,
    MERGES,
    PRECISIONS,
    SELECTIONS,
    TEXT_METRICS,
    TRACE_VARIANTS,
    check_known,
)
from treelora_avalanche.defaults import (
    LANGUAGE_LORA,
    LANGUAGE_TRAINING,
    VISION_LORA,
)
from treelora_avalanche.registry.scenarios import SCENARIO_SETTINGS, SCENARIOS, Scenario

IMAGE_MODEL = "vit_base_patch16_224"
EQUAL_EPOCHS, PAPER_EPOCHS = "equal", "paper"
TUNE_TASKS = 3
"""Number of first tasks that hyper-parameters are chosen on by default, as in A-GEM."""

TREE_SETTINGS = frozenset({"tree_lambda", "selection", "depth", "max_adapters"})
LORA_SETTINGS = frozenset({"rank", "alpha", "dropout", "layers", "target_modules"})
MERGE_SETTINGS = frozenset({"merge"})
TRAINING_SETTINGS = frozenset(
    {"head", "epochs", "lr", "precision", "batch_size", "accumulation_steps"}
)
METHOD_SETTINGS = TREE_SETTINGS | LORA_SETTINGS | MERGE_SETTINGS | TRAINING_SETTINGS
"""Settings that not all methods read, and that may differ between methods."""

# Defaults by kind of model, see RunSettings. Those of images suit the small default stream and
# differ from the paper's.
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
}
_SMALLEST = {
    "n_experiences": 1,
    "limit": 1,
    "tune_tasks": 1,
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
    "merge": MERGES,
    "variant": TRACE_VARIANTS,
    "metric": TEXT_METRICS,
    "precision": PRECISIONS,
    "dtype": DTYPES,
}


DIVISIONS = frozenset({"task_classes", "per_exp_classes"})
"""Options of scenarios that may give the number of experiences."""


def _about(group: str, text: str) -> dict[str, str]:
    return {"group": group, "help": text}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run, apart from its method and seed.

    Each field is a flag of ``treelora train`` and ``treelora compare``, a key of their ``--config``
    file, and documented in its ``help``. By default, the stream is a small one that needs no
    download. Defaults that depend on the kind of model (``VISION_DEFAULTS``,
    ``LANGUAGE_DEFAULTS``) replace None on construction.

    >>> RunSettings(scenario="cifar100", download=True, epochs=5, rank=8)
    >>> RunSettings(rank=0)
    Traceback (most recent call last):
    ValueError: `--rank` should be at least 1, but is 0.

    :raises ValueError: if a value is out of range, a required one is missing, or one has no effect
        on the scenario.
    """

    scenario: str = field(
        default="digits", metadata=_about("stream", f"stream of tasks: {', '.join(SCENARIOS)}")
    )
    data: str | None = field(
        default=None,
        metadata=_about("stream", "folder of the images or texts (not digits, tiny_texts)"),
    )
    download: bool = field(
        default=False,
        metadata=_about(
            "stream", "download missing data to that folder (cifar100, imagenet_r, cub200)"
        ),
    )
    classes: list[str] | None = field(
        default=None,
        metadata=_about("stream", "classes to use (images, not digits); default: all"),
    )
    exclude_classes: list[str] | None = field(
        default=None, metadata=_about("stream", "classes to leave out (image_folder, domains)")
    )
    domains: list[str] | None = field(
        default=None,
        metadata=_about("stream", "domains in order of training (domains); default: all"),
    )
    n_experiences: int | None = field(
        default=None,
        metadata=_about(
            "stream",
            "number of experiences the classes are split into (images, not domains and "
            "image_tasks); default: 5 for digits, else 10, or that of the scenario's option "
            "task_classes or per_exp_classes",
        ),
    )
    tasks: list[str] | None = field(
        default=None,
        metadata=_about(
            "stream",
            "tasks in order of training (trace, o_lora_order, text_tasks, tiny_texts, "
            "image_tasks); default: all",
        ),
    )
    variant: str = field(
        default="500",
        metadata=_about(
            "stream",
            f"training samples per task of TRACE: {', '.join(TRACE_VARIANTS)} (trace, math_llm, "
            "long_sequence)",
        ),
    )
    order: int = field(
        default=1, metadata=_about("stream", "task order of O-LoRA, 1 to 6 (o_lora_order)")
    )
    skip_missing_tasks: bool = field(
        default=False,
        metadata=_about(
            "stream",
            "skip tasks whose data are missing, which changes the benchmark (o_lora_order, "
            "long_sequence)",
        ),
    )
    metric: str | None = field(
        default=None,
        metadata=_about(
            "stream",
            f"score of generated texts: {', '.join(TEXT_METRICS)} (text_tasks); default: accuracy "
            "for tasks with few, short, repeated answers, else rouge_l",
        ),
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata=_about(
            "stream",
            "maximum length of generated texts in tokens (text_tasks); default: the longest "
            "training answer of tasks with few, short, repeated answers, else 128",
        ),
    )
    limit: int | None = field(
        default=None,
        metadata=_about(
            "stream",
            "use only LIMIT training samples of each task, and as many test samples unless "
            "--eval_limit says otherwise: the first ones of texts; of images, drawn by the seed "
            "and balanced over classes (not digits)",
        ),
    )
    eval_limit: int | str | None = field(
        default=None,
        metadata=_about(
            "stream",
            "use only the first EVAL_LIMIT test samples of each task, or all; default: --limit "
            "(texts)",
        ),
    )
    tune_tasks: int | None = field(
        default=None,
        metadata=_about(
            "stream",
            "train on the first TUNE_TASKS tasks alone, and evaluate on held-out training samples "
            "instead of the test stream, see treelora tune; default: all tasks, on the test stream",
        ),
    )
    plain_text: str | None = field(
        default=None,
        metadata=_about(
            "stream",
            "text file, passages separated by empty lines, on which the perplexity before and "
            "after the stream is measured (texts); default: 14 passages of English",
        ),
    )
    model: str | None = field(
        default=None,
        metadata=_about(
            "model",
            f"timm model, default: {IMAGE_MODEL}, for digits a small ViT pretrained in the run; "
            "for texts a folder of a language model, its name on the Hugging Face hub, or a file "
            "*.gguf",
        ),
    )
    checkpoint: str | None = field(
        default=None,
        metadata=_about(
            "model", "file with weights of the timm model; default: timm's, downloaded"
        ),
    )
    img_size: int | None = field(
        default=None,
        metadata=_about("model", "image size in pixels; default: the model's"),
    )
    max_length: int = field(
        default=1024,
        metadata=_about("model", "maximum tokens of a sample, prompt and target (texts)"),
    )
    dtype: str | None = field(
        default=None,
        metadata=_about(
            "model",
            f"dtype of a language model's frozen weights: {', '.join(DTYPES)}; default: bfloat16 "
            "on a GPU, else float32",
        ),
    )
    precision: str = field(
        default="fp32",
        metadata=_about(
            "model",
            "precision of the forward pass: fp32 (that of the weights), bf16 (autocast; weights "
            "and optimizer keep theirs), auto (bf16 if the device supports it natively)",
        ),
    )
    chat_template: bool = field(
        default=True,
        metadata=_about(
            "model",
            "put prompts into the tokenizer's chat template, where there is one (texts); false: "
            "raw prompts, as in TRACE's release",
        ),
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata=_about(
            "model", "recompute activations in the backward pass to save memory (texts)"
        ),
    )
    device: str = field(
        default="auto",
        metadata=_about("model", "cpu, cuda, cuda:1, ..., or auto: cuda if available"),
    )
    accumulation_steps: int = field(
        default=1,
        metadata=_about("training", "batches per optimizer step (gradient accumulation; texts)"),
    )
    epochs: int | None = field(
        default=None,
        metadata=_about("training", "epochs per task of every method; default: 4, for texts 1"),
    )
    epochs_per_task: list[int] | str | None = field(
        default=None,
        metadata=_about(
            "training",
            f"instead of --epochs, for texts: one number per task; {EQUAL_EPOCHS}: the paper's "
            f"numbers for TreeLoRA, for every method (default of trace and math_llm); "
            f"{PAPER_EPOCHS}: the paper's numbers for each method",
        ),
    )
    batch_size: int | None = field(
        default=None,
        metadata=_about("training", "training batch size; default: 32, for texts 4"),
    )
    eval_batch_size: int | None = field(
        default=None,
        metadata=_about("training", "evaluation batch size; default: 256, for texts 16"),
    )
    lr: float | None = field(
        default=None, metadata=_about("training", "learning rate; default: the method's")
    )
    head: str = field(
        default="linear",
        metadata=_about(
            "training",
            "classification head: linear; or, fitted after every task to stored class statistics "
            "(images), task_adaptive: regularised discriminant analysis (RDA), "
            "task_adaptive_ensemble: RDA averaged with RDA on frozen features, "
            "task_adaptive_trained: retrained by gradient descent",
        ),
    )
    rank: int | None = field(
        default=None, metadata=_about("LoRA", "rank of LoRA; default: 10, for texts 8")
    )
    alpha: float | None = field(
        default=None,
        metadata=_about("LoRA", "scale of LoRA: ΔW = alpha / rank · BA; default: 10, for texts 32"),
    )
    dropout: float = field(
        default=0.0,
        metadata=_about("LoRA", "share of the inputs of LoRA that training sets to 0"),
    )
    layers: list[int] | str | None = field(
        default=None,
        metadata=_about(
            "LoRA",
            "blocks with LoRA: first:k, last:k, all, or a list of indices; default: first:5, for "
            "texts all",
        ),
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata=_about(
            "LoRA",
            "linear layers with LoRA in a block, e.g. [qkv, attn.proj], or a module of it, for all "
            "of its linear layers, e.g. [mlp]; default: qkv, or q_proj, k_proj and v_proj; for "
            "texts the query and value projections",
        ),
    )
    merge: str = field(
        default="none",
        metadata=_about(
            "LoRA",
            f"merging of the adapters of all tasks into one for predictions: {', '.join(MERGES)} "
            "(methods that train one adapter on, not TreeLoRA)",
        ),
    )
    tree_lambda: float | None = field(
        default=None,
        metadata=_about(
            "TreeLoRA",
            "strength λ of the pull towards the selected adapter; default: 0.1 if predictions use "
            "the mean of all adapters or a router (routed texts: 0), else 0.5",
        ),
    )
    selection: str = field(
        default="lcb",
        metadata=_about("TreeLoRA", f"selection of a past adapter: {', '.join(SELECTIONS)}"),
    )
    depth: int | None = field(
        default=None,
        metadata=_about("TreeLoRA", "depth of the tree; default: number of adapted matrices"),
    )
    max_adapters: int | None = field(
        default=None,
        metadata=_about(
            "TreeLoRA",
            "maximum number of stored adapters; beyond it the closest two are merged; default: no "
            "limit",
        ),
    )
    method_options: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata=_about(
            "options",
            "options by method (see treelora list METHOD), also of the groups training, LoRA and "
            "TreeLoRA: '{EWCLoRA: {ewc_lambda: 1.0e+5, lr: 0.001}}'",
        ),
    )
    scenario_options: dict[str, Any] | None = field(
        default=None,
        metadata=_about("options", "options of the scenario (see treelora list SCENARIO)"),
    )

    def __post_init__(self) -> None:
        check_known("`--scenario`", self.scenario, SCENARIOS)
        for name, values in _CHOICES.items():
            if getattr(self, name) is not None:
                check_known(f"`--{name}`", getattr(self, name), values)
        self._check_ranges()
        self._check_meaning()
        if self._scenario.needs_data and self.data is None:
            raise ValueError(
                f"`--data` should be a folder for `--scenario {self.scenario}`, but is not given. "
                "Pass `--data FOLDER`."
            )
        if self.on_language and self.model is None:
            raise ValueError(
                f"`--model` should be a language model for `--scenario {self.scenario}`, but is "
                "not given. Pass a folder, or a name on the Hugging Face hub, such as "
                "meta-llama/Llama-3.2-1B-Instruct."
            )
        self._check_epochs()
        defaults = self._defaults
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
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"`--dropout` should be at least 0 and below 1, but is {self.dropout}."
            )
        if self.eval_limit not in (None, "all") and (
            isinstance(self.eval_limit, str) or self.eval_limit < 1
        ):
            raise ValueError(
                f"`--eval_limit` should be at least 1, or all, but is {self.eval_limit}."
            )
        if not 1 <= self.order <= 6:
            raise ValueError(f"`--order` should be from 1 to 6, but is {self.order}.")

    def _check_meaning(self) -> None:
        """Raises an error for a setting without effect."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in sorted(self.without_meaning):
            value = getattr(self, name)
            if value is not None and value != defaults[name]:
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
        """Returns a copy with changed settings.

        :param changes: new values; ``epochs`` and ``epochs_per_task`` replace each other.
        """
        for name, other in (("epochs", "epochs_per_task"), ("epochs_per_task", "epochs")):
            if changes.get(name) is not None:
                changes.setdefault(other, None)
        return replace(self, **changes)

    @property
    def _scenario(self) -> Scenario:
        return SCENARIOS[self.scenario]

    @property
    def _defaults(self) -> dict[str, Any]:
        return LANGUAGE_DEFAULTS if self.on_language else VISION_DEFAULTS

    @property
    def default_layers(self) -> str:
        """Default blocks with LoRA, for the kind of model."""
        layers: str = self._defaults["layers"]
        return layers

    @property
    def on_digits(self) -> bool:
        """Whether the stream is the digits."""
        return self.scenario == "digits"

    @property
    def on_language(self) -> bool:
        """Whether the model is a language model."""
        return self._scenario.language

    @property
    def without_meaning(self) -> frozenset[str]:
        """Settings that the scenario does not read."""
        return SCENARIO_SETTINGS - self._scenario.takes

    @property
    def number_of_experiences(self) -> int | None:
        """Number of tasks, with the scenario's default filled in; None if its options give it."""
        given = self.n_experiences
        if given is None and DIVISIONS & set(self.scenario_options or {}):
            return None
        return given or self._scenario.n_experiences or 1

    @property
    def model_name(self) -> str:
        """Name of the model, with the default filled in."""
        return self.model or IMAGE_MODEL


__all__ = [
    "EQUAL_EPOCHS",
    "LORA_SETTINGS",
    "MERGE_SETTINGS",
    "METHOD_SETTINGS",
    "PAPER_EPOCHS",
    "SCENARIOS",
    "TRAINING_SETTINGS",
    "TREE_SETTINGS",
    "TUNE_TASKS",
    "RunSettings",
]
