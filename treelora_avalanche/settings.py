"""What a run is made of, without importing torch: parsing a command line must stay quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from .names import check_known

DIGITS_VIT = "digits_vit"
IMAGE_MODEL = "vit_base_patch16_224"
SELECTIONS = ("lcb", "nearest", "random")
HEADS = ("linear", "task_adaptive")


@dataclass(frozen=True)
class Scenario:
    """One row of the table of scenarios."""

    description: str


SCENARIOS: dict[str, Scenario] = {
    "digits": Scenario("scikit-learn's digits, 8 x 8 pixels, 10 classes; no download"),
    "image_folder": Scenario("any folder with one folder of images per class"),
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
        default="digits", metadata=_help(f"stream of tasks: {' or '.join(SCENARIOS)}")
    )
    data: str | None = field(
        default=None, metadata=_help("folder of the images, one folder per class (image_folder)")
    )
    classes: list[str] | None = field(
        default=None, metadata=_help("use these classes only (image_folder)")
    )
    exclude_classes: list[str] | None = field(
        default=None, metadata=_help("leave these classes out (image_folder)")
    )
    n_experiences: int = field(
        default=5, metadata=_help("number of tasks that the classes are divided into")
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
        default=0.1, metadata=_help("strength of TreeLoRA's pull towards the picked task")
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
        if self.scenario == "digits":
            images_only = ("data", "classes", "exclude_classes", "model", "checkpoint", "img_size")
            for name in images_only:
                value = getattr(self, name)
                if value is not None and (name, value) != ("model", DIGITS_VIT):
                    raise ValueError(
                        f"`--{name}` is {value!r}, but digits bring their own data and model; "
                        "set `--scenario image_folder` or leave it out"
                    )
        elif self.data is None:
            raise ValueError(f"`--scenario {self.scenario}` needs `--data FOLDER`")
        elif self.model == DIGITS_VIT:
            raise ValueError(f"`--model {DIGITS_VIT}` goes with `--scenario digits` only")

    @property
    def model_name(self) -> str:
        """The model, with the scenario's default filled in."""
        return self.model or (DIGITS_VIT if self.scenario == "digits" else IMAGE_MODEL)


__all__ = ["SCENARIOS", "RunSettings", "Scenario"]
