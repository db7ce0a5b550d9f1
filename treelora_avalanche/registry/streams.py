"""Builds the stream of a scenario from the settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from treelora_avalanche import scenarios
from treelora_avalanche.choices import check_known
from treelora_avalanche.registry.settings import RunSettings


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _without_excluded(known: Sequence[str], settings: RunSettings) -> list[str] | None:
    """The classes without the excluded ones; None for all."""
    if not settings.exclude_classes:
        return settings.classes
    names = settings.classes or known
    for name in settings.exclude_classes:
        check_known("class in `--exclude_classes`", name, names)
    return [name for name in names if name not in settings.exclude_classes]


def _folder_with_images(settings: RunSettings) -> Path:
    """The folder, or its part for training where there is one."""
    data = data_folder(settings)
    return data / "train" if (data / "train").is_dir() else data


def data_folder(settings: RunSettings) -> Path:
    data = Path(settings.data or "").expanduser()
    if not data.is_dir():
        raise FileNotFoundError(f"`--data` {data} is not a folder")
    return data


def _image_folder(settings: RunSettings, seed: int, preprocessing: Any) -> Any:
    known = _folders(_folder_with_images(settings))
    return scenarios.SplitImageFolder(
        data_folder(settings),
        settings.number_of_experiences,
        preprocessing=preprocessing,
        classes=_without_excluded(known, settings),
        seed=seed,
    )


def _domains(settings: RunSettings, seed: int, preprocessing: Any) -> Any:
    folder = _folder_with_images(settings)
    known = sorted({name for domain in _folders(folder) for name in _folders(folder / domain)})
    return scenarios.DomainImageFolder(
        data_folder(settings),
        domains=settings.domains,
        preprocessing=preprocessing,
        classes=_without_excluded(known, settings),
        seed=seed,
    )


def _cifar100(settings: RunSettings, seed: int, preprocessing: Any) -> Any:
    return scenarios.SplitCIFAR100(
        settings.number_of_experiences,
        dataset_root=settings.data,
        download=settings.download,
        preprocessing=preprocessing,
        classes=settings.classes,
        seed=seed,
    )


def _published(name: str) -> Callable[[RunSettings, int, Any], Any]:
    """A benchmark with a published archive.

    :param name: the benchmark's generator.
    """

    def build(settings: RunSettings, seed: int, preprocessing: Any) -> Any:
        return getattr(scenarios, name)(
            settings.number_of_experiences,
            dataset_root=Path(settings.data or "").expanduser(),
            download=settings.download,
            preprocessing=preprocessing,
            classes=settings.classes,
            seed=seed,
        )

    return build


IMAGE_STREAMS: dict[str, Callable[[RunSettings, int, Any], Any]] = {
    "image_folder": _image_folder,
    "cifar100": _cifar100,
    "imagenet_r": _published("SplitImageNetR"),
    "cub200": _published("SplitCUB200"),
    "domains": _domains,
}


def _trace(settings: RunSettings, model: Any) -> Any:
    return scenarios.TRACE(
        data_folder(settings), model, settings.variant, tasks=settings.tasks, limit=settings.limit
    )


def _math_llm(settings: RunSettings, model: Any) -> Any:
    return scenarios.MathLLM(data_folder(settings), model, settings.variant, limit=settings.limit)


def _long_sequence(settings: RunSettings, model: Any) -> Any:
    return scenarios.LongSequence(
        data_folder(settings),
        model,
        settings.variant,
        skip_missing_tasks=settings.skip_missing_tasks,
        limit=settings.limit,
    )


def _o_lora_order(settings: RunSettings, model: Any) -> Any:
    return scenarios.OLoRAOrder(
        settings.order,
        data_folder(settings),
        model,
        skip_missing_tasks=settings.skip_missing_tasks,
        limit=settings.limit,
    )


def _text_tasks(settings: RunSettings, model: Any) -> Any:
    return scenarios.TextTasks(
        data_folder(settings),
        model,
        tasks=settings.tasks,
        metric=settings.metric,
        max_new_tokens=settings.max_new_tokens,
        limit=settings.limit,
    )


TEXT_STREAMS: dict[str, Callable[[RunSettings, Any], Any]] = {
    "trace": _trace,
    "math_llm": _math_llm,
    "long_sequence": _long_sequence,
    "o_lora_order": _o_lora_order,
    "text_tasks": _text_tasks,
}
