"""Builds the stream of a scenario from settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treelora_avalanche.choices import check_known, check_model_folder
from treelora_avalanche.plain_text import read_passages
from treelora_avalanche.registry.options import (
    Option,
    check_options,
    own_options,
    parameters_of,
)
from treelora_avalanche.registry.scenarios import SCENARIO_SETTINGS, SCENARIOS, Scenario
from treelora_avalanche.registry.settings import RunSettings

DATA_FOLDERS = ("dataset_root", "data_root", "folder")
SUPPLIED = SCENARIO_SETTINGS | {"seed", "preprocessing", *DATA_FOLDERS}
"""Parameters of generators that a run supplies."""


def data_folder(settings: RunSettings) -> Path | None:
    """Returns the folder of the data; None if it is not given.

    :param settings: the settings.
    :raises FileNotFoundError: if the folder does not exist, and the data cannot be downloaded.
    """
    if settings.data is None:
        return None
    folder = Path(settings.data).expanduser()
    if not folder.is_dir() and "download" not in SCENARIOS[settings.scenario].takes:
        raise FileNotFoundError(
            f"`--data` should be a folder, but {folder} is not a folder. Correct the path."
        )
    return folder


def check_files(settings: RunSettings) -> None:
    """Raises an error for a missing folder of data or of a model; imports nothing heavy.

    :param settings: the settings.
    :raises FileNotFoundError: if the data, the plain text, the model's folder or the checkpoint is
        missing or incomplete.
    :raises ValueError: if the plain text holds no text.
    """
    data_folder(settings)
    folder = Path(settings.model_name).expanduser()
    if settings.on_language and folder.is_dir():  # not a name on the hub
        check_model_folder(folder)
    if settings.plain_text is not None:
        read_passages(settings.plain_text)
    if settings.checkpoint is not None and not Path(settings.checkpoint).exists():
        raise FileNotFoundError(
            f"`--checkpoint` should be a file of weights, but {settings.checkpoint} does not exist."
            " Correct the path."
        )


def scenario_options(scenario: Scenario) -> dict[str, Option]:
    """Returns the options of a scenario's generator; imports the generator.

    :param scenario: the scenario.
    """
    return own_options(scenario.load(), SUPPLIED - {"seed"} if not scenario.seeded else SUPPLIED)


def build_stream(
    settings: RunSettings, seed: int, *, preprocessing: Any = None, model: Any = None
) -> Any:
    """Builds the benchmark of a scenario.

    >>> build_stream(RunSettings(scenario="digits"), seed=0).n_experiences

    :param settings: the settings.
    :param seed: the run's seed.
    :param preprocessing: the model's preprocessing of images.
    :param model: the language model, for texts.
    :raises ValueError: if an option is unknown or out of range.
    :raises FileNotFoundError: if the data are missing.
    """
    scenario = SCENARIOS[settings.scenario]
    generator = scenario.load()
    known = {name: getattr(settings, name) for name in scenario.takes}
    if "n_experiences" in scenario.takes:
        known["n_experiences"] = settings.number_of_experiences
    if "classes" in scenario.takes:
        known["classes"] = _classes(settings, scenario)
    if "data" in scenario.takes:
        known |= dict.fromkeys(DATA_FOLDERS, data_folder(settings))
    if scenario.seeded:
        known["seed"] = seed
    known |= {"preprocessing": preprocessing, "model": model}
    arguments = {name: known[name] for name in parameters_of(generator) if name in known}
    own = settings.scenario_options
    if own:
        arguments |= check_options(settings.scenario, own, scenario_options(scenario))
    benchmark = generator(**arguments)
    if settings.tune_tasks is None:
        return benchmark
    from treelora_avalanche.scenarios import validation_benchmark  # the package imports Avalanche

    return validation_benchmark(benchmark, settings.tune_tasks, seed=seed)


def _classes(settings: RunSettings, scenario: Scenario) -> list[str] | None:
    """Returns the classes without the excluded ones; None for all."""
    if not settings.exclude_classes:
        return settings.classes
    names = settings.classes or _class_folders(settings, scenario)
    for name in settings.exclude_classes:
        check_known("class in `--exclude_classes`", name, names)
    return [name for name in names if name not in settings.exclude_classes]


def _class_folders(settings: RunSettings, scenario: Scenario) -> list[str]:
    from treelora_avalanche.scenarios.data.names import is_left_out  # the package imports Avalanche

    folder = data_folder(settings)
    assert folder is not None  # required by such scenarios
    assert scenario.class_folders is not None  # the scenario takes `exclude_classes`
    folder = folder / "train" if (folder / "train").is_dir() else folder
    found = {
        path.name
        for path in folder.glob(scenario.class_folders)
        if path.is_dir() and not any(map(is_left_out, path.relative_to(folder).parts))
    }
    return sorted(found)
