"""What a run is made of, without importing torch: parsing a command line must stay quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from .names import check_known

DIGITS_VIT = "digits_vit"
IMAGE_MODEL = "vit_base_patch16_224"
SELECTIONS = ("lcb", "nearest", "random")
HEADS = ("linear", "task_adaptive")


_IMAGES = frozenset({"data", "classes", "model", "checkpoint", "img_size"})
SCENARIO_OPTIONS = _IMAGES | {"n_experiences", "exclude_classes", "domains", "download"}


@dataclass(frozen=True)
class Scenario:
    """One row of the table of scenarios."""

    description: str
    takes: frozenset[str]
    """ Those of the scenario's settings that have a meaning for it. """
    n_experiences: int | None = 10
    """ Number of tasks where the user gives none; None: the data tell. """
    needs_data: bool = True


SCENARIOS: dict[str, Scenario] = {
    "digits": Scenario(
        "scikit-learn's digits, 8 x 8 pixels, 10 classes; no download",
        takes=frozenset({"n_experiences", "model"}),
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
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything of a run but its method and its seed.

    The defaults are the demonstration: a small stream that needs no download. Each field is a flag
    of `treelora train` and `treelora compare`, and a key of their `--config` file.
    """

    scenario: str = field(
        default="digits", metadata=_help(f"stream of tasks: {', '.join(SCENARIOS)}")
    )
    data: str | None = field(default=None, metadata=_help("folder of the images (not for digits)"))
    download: bool = field(
        default=False,
        metadata=_help("download what is missing there (cifar100, imagenet_r, cub200)"),
    )
    classes: list[str] | None = field(
        default=None, metadata=_help("use these classes only (not for digits)")
    )
    exclude_classes: list[str] | None = field(
        default=None, metadata=_help("leave these classes out (image_folder, domains)")
    )
    domains: list[str] | None = field(
        default=None, metadata=_help("use these domains, in this order (domains)")
    )
    n_experiences: int | None = field(
        default=None,
        metadata=_help(
            "number of tasks that the classes are divided into; default: 5 for digits, else 10 "
            "(domains: one for each)"
        ),
    )
    model: str | None = field(
        default=None,
        metadata=_help(
            f"timm model; default: {IMAGE_MODEL}, or for digits a small ViT pretrained in the run"
        ),
    )
    checkpoint: str | None = field(
        default=None,
        metadata=_help("file with the model's pretrained weights; default: timm's own, downloaded"),
    )
    img_size: int | None = field(
        default=None, metadata=_help("side of the images in pixels; default: the model's own")
    )
    epochs: int = field(default=4, metadata=_help("epochs per task, for every method"))
    batch_size: int = field(default=32, metadata=_help("samples per training step"))
    eval_batch_size: int = field(default=256, metadata=_help("samples per evaluation step"))
    lr: float | None = field(
        default=None, metadata=_help("Adam's learning rate; default: the method's own")
    )
    rank: int = field(default=10, metadata=_help("rank of the LoRA factors"))
    alpha: float = field(default=10.0, metadata=_help("LoRA's output is scaled by alpha / rank"))
    layers: list[int] | str = field(
        default="first:5",
        metadata=_help("blocks with LoRA: first:k, last:k, all, or a list of numbers"),
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata=_help(
            "linear layers with LoRA inside a block, e.g. [qkv, attn.proj]; default: qkv"
        ),
    )
    tree_lambda: float = field(
        default=0.5, metadata=_help("strength of TreeLoRA's pull towards the picked task")
    )
    selection: str = field(
        default="lcb", metadata=_help(f"how TreeLoRA picks a past task: {', '.join(SELECTIONS)}")
    )
    head: str = field(
        default="linear",
        metadata=_help(
            "linear, or task_adaptive: re-trained after every task on remembered class statistics"
        ),
    )
    depth: int | None = field(
        default=None, metadata=_help("levels of TreeLoRA's tree; default: adapted matrices")
    )
    max_adapters: int | None = field(
        default=None,
        metadata=_help(
            "stored adapters beyond which TreeLoRA merges the closest two; default: keep all"
        ),
    )
    device: str = field(
        default="auto", metadata=_help("cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    )

    def __post_init__(self) -> None:
        check_known("`--scenario`", self.scenario, SCENARIOS)
        check_known("`--selection`", self.selection, SELECTIONS)
        check_known("`--head`", self.head, HEADS)
        smallest = {
            "n_experiences": 1,
            "img_size": 1,
            "epochs": 1,
            "batch_size": 1,
            "eval_batch_size": 1,
            "rank": 1,
            "depth": 1,
            "max_adapters": 1,
            "tree_lambda": 0,
        }
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"`--{name}` should be at least {least}, but it is {value}")
        for name in ("lr", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`--{name}` should be a positive number, but it is {value}")
        for name in sorted(self.without_meaning | ({"model"} if self.on_digits else set())):
            value = getattr(self, name)
            if value and (name, value) != ("model", DIGITS_VIT):
                remedy = (
                    "digits bring their own data and model; set `--scenario image_folder` or"
                    if self.on_digits
                    else f"`--scenario {self.scenario}` has no use for it;"
                )
                raise ValueError(f"`--{name}` is {value!r}, but {remedy} leave it out")
        if SCENARIOS[self.scenario].needs_data and self.data is None:
            raise ValueError(f"`--scenario {self.scenario}` needs `--data FOLDER`")
        if self.model == DIGITS_VIT and not self.on_digits:
            raise ValueError(f"`--model {DIGITS_VIT}` goes with `--scenario digits` only")

    @property
    def on_digits(self) -> bool:
        """Whether the stream is that of the demonstration."""
        return self.scenario == "digits"

    @property
    def without_meaning(self) -> frozenset[str]:
        """Settings that the scenario does not look at."""
        return SCENARIO_OPTIONS - SCENARIOS[self.scenario].takes

    @property
    def number_of_experiences(self) -> int:
        """Number of tasks, with the scenario's default filled in."""
        return self.n_experiences or SCENARIOS[self.scenario].n_experiences or 1

    @property
    def model_name(self) -> str:
        """The model, with the scenario's default filled in."""
        return self.model or (DIGITS_VIT if self.on_digits else IMAGE_MODEL)


__all__ = ["SCENARIOS", "RunSettings", "Scenario"]
