"""Command line ``treelora``: parses arguments, then calls :mod:`treelora_avalanche.compare`.

torch and Avalanche are imported after parsing, so that ``--help`` is immediate.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import sys
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import GenericAlias
from typing import Any, NoReturn

import jsonargparse

from treelora_avalanche._version import __version__
from treelora_avalanche.choices import check_known
from treelora_avalanche.evaluate import command as evaluate_command
from treelora_avalanche.recipes import RECIPES, describe_recipe
from treelora_avalanche.registry.methods import METHODS, check_models
from treelora_avalanche.registry.names import YAML_MODE, quote_arguments
from treelora_avalanche.registry.settings import (
    METHOD_SETTINGS,
    SCENARIOS,
    TUNE_TASKS,
    RunSettings,
)
from treelora_avalanche.registry.streams import check_files

LISTS = ("methods", "scenarios", "recipes")
DEFAULT_METHODS = ["TreeLoRA", "SeqLoRA", "Naive"]
DEFAULT_SEEDS = [0, 1, 2]
LISTABLE = sorted(METHOD_SETTINGS - {"layers", "target_modules"})
"""Settings of methods that have one value, of which ``compare`` takes lists."""


class _Parser(jsonargparse.ArgumentParser):
    """Parser whose errors are one line, without the list of all options; names stay as written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, parser_mode=YAML_MODE, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Returns the parsed arguments; names of recipes stand for their files, ``a b`` for a list.

        :param args: the arguments; by default those of the process.
        :param others: further arguments of jsonargparse.
        :param kwargs: further arguments of jsonargparse.
        """
        given = _with_lists(_with_recipes(sys.argv[1:] if args is None else args))
        given = quote_arguments(given)
        return super().parse_args(given, *others, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _complain(message)
        raise SystemExit(2)


def _complain(message: object) -> None:
    print(f"treelora: error: {' '.join(str(message).split())}", file=sys.stderr)


def _add_settings(parser: jsonargparse.ArgumentParser, *, lists: bool = False) -> None:
    """Adds the fields of :class:`RunSettings` as flags, in groups.

    :param parser: the parser.
    :param lists: whether options of methods that have one value may be lists of values.
    """
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of these options, or name of a recipe (see treelora list recipes)",
    )
    types = typing.get_type_hints(RunSettings)
    groups: dict[str, Any] = {}
    for field in fields(RunSettings):
        title = field.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        # The list first: a string would be taken for a single value.
        listed = GenericAlias(list, (_one(types[field.name]),)) | types[field.name]
        group.add_argument(
            f"--{field.name}",
            type=listed if lists and field.name in LISTABLE else types[field.name],
            default=field.default,
            help=field.metadata["help"],
        )


def build_parser() -> jsonargparse.ArgumentParser:
    """Returns the parser of ``treelora`` with its subcommands."""
    parser = _Parser(
        prog="treelora",
        description="Continual fine-tuning on Avalanche: TreeLoRA and its baselines.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    commands.add_subcommand("list", _list_parser(), help="show methods, scenarios and recipes")
    commands.add_subcommand("train", _train_parser(), help="train one method with one seed")
    commands.add_subcommand("compare", _compare_parser(), help="train and compare methods")
    commands.add_subcommand(
        "tune", _tune_parser(), help="choose learning rates and strengths on the first tasks"
    )
    commands.add_subcommand(
        "evaluate", _evaluate_parser(), help="evaluate a finished run on what is none of its tasks"
    )
    return parser


def _list_parser() -> _Parser:
    parser = _Parser(description="Show known names, or the options of a method or scenario.")
    parser.add_argument(
        "what",
        type=str | None,
        nargs="?",
        help=f"{', '.join(LISTS)}, or the name of a method or scenario, to show its options; "
        "default: all names",
    )
    return parser


def _train_parser() -> _Parser:
    parser = _Parser(description="Train one method on one stream, and write a run folder.")
    parser.add_argument("--method", type=str, default="TreeLoRA", help=", ".join(METHODS))
    parser.add_argument("--seed", type=int, default=0, help="seed of all random generators")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="run folder; default: a new one in runs/train",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="show Avalanche's InteractiveLogger instead of the progress line",
    )
    parser.add_argument(
        "--shard_backbone",
        action="store_true",
        help="shard the frozen weights over the processes of torchrun (FSDP2), for models larger "
        "than one GPU",
    )
    _add_force(parser)
    _add_settings(parser)
    return parser


def _compare_parser() -> _Parser:
    parser = _Parser(
        description="Train methods on the same streams and compare them; by default on a small "
        "embedded stream. Finished runs in the output folder are not run again. A list of values, "
        "as in --tree_lambda '[0.1, 0.5]', makes a row of each."
    )
    _add_methods(parser)
    parser.add_argument(
        "--seeds", type=int, default=DEFAULT_SEEDS, nargs="+", help="each method runs once per seed"
    )
    parser.add_argument(
        "--output", type=str, default="runs/compare", help="folder of the run folders and the table"
    )
    _add_executor(parser)
    _add_force(parser)
    _add_settings(parser, lists=True)
    return parser


def _tune_parser() -> _Parser:
    parser = _Parser(
        description="Choose the learning rate of each method, then its strength, on held-out "
        "training samples of the first tasks; write them as YAML for treelora compare --config. "
        "Finished trials in the output folder are kept."
    )
    _add_methods(parser)
    parser.add_argument(
        "--trials", type=int, default=10, help="trials per method, the same for every method"
    )
    parser.add_argument(
        "--seeds", type=int, default=[0], nargs="+", help="seeds of each trial; scores are averaged"
    )
    parser.add_argument(
        "--output", type=str, default="runs/tune", help="folder of the trials and the choice"
    )
    _add_executor(parser)
    _add_settings(parser)
    parser.set_defaults(tune_tasks=TUNE_TASKS)
    return parser


def _evaluate_parser() -> _Parser:
    parser = _Parser(
        description="Compare the final model of a finished run of a language model with its base "
        "model: by the perplexity on plain text, or by tasks of lm-evaluation-harness, whose "
        "scores are written to RUN/harness.json."
    )
    evaluate_command.add_arguments(parser)
    return parser


def _add_methods(parser: jsonargparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", type=str, default=DEFAULT_METHODS, nargs="+", help=", ".join(METHODS)
    )


def _add_executor(parser: jsonargparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor",
        type=str | None,
        default=None,
        help="run cells in parallel: processes (one per GPU) or slurm (one job per cell; needs the "
        "extra `slurm`); default: sequentially",
    )
    parser.add_argument(
        "--executor_options",
        type=dict[str, typing.Any] | None,
        default=None,
        help="of slurm: {partition: gpu, time: 240, gpus_per_job: 1}, time in minutes, and other "
        "parameters of submitit; of processes: {workers: 2}",
    )


def _add_force(parser: jsonargparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="run finished cells again; earlier runs are kept"
    )


def _one(annotation: Any) -> Any:
    """Returns a type without None."""
    return next(
        (kind for kind in typing.get_args(annotation) if kind is not type(None)), annotation
    )


def _settings(options: Any) -> RunSettings:
    return RunSettings(**{field.name: options[field.name] for field in fields(RunSettings)})


def _grid(options: Any) -> list[RunSettings]:
    """Returns the settings for each combination of listed values."""
    values = {field.name: options[field.name] for field in fields(RunSettings)}
    lists = {name: values[name] for name in LISTABLE if isinstance(values[name], list)}
    for name, listed in lists.items():
        if not listed:
            raise ValueError(f"`--{name}` should be a value or a list of values, but is [].")
    return [
        RunSettings(**{**values, **dict(zip(lists, point, strict=True))})
        for point in itertools.product(*lists.values())
    ]


def _check_early(methods: Sequence[str], settings: RunSettings, output: str | None) -> None:
    """Checks what needs no heavy import: names, kinds of models, and files of new runs.

    :param output: folder of the runs, if they take place on this machine.
    """
    for method in methods:
        check_known("method", method, METHODS)
    # Rows of other packages may import torch; `compare` checks them.
    check_models([name for name in methods if name in METHODS.data], settings)
    if output is not None and not Path(output).exists():  # finished runs need no files
        check_files(settings)


def _quieten() -> None:
    """Silences other libraries before they are imported; values set by the user stay."""
    # Their warnings concern what a user cannot change.
    warnings.filterwarnings("ignore")
    warnings.showwarning = lambda *_, **__: None  # Avalanche resets the filters
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger(__package__).setLevel(logging.WARNING)


def _set_threads(settings: RunSettings) -> None:
    """Sets the environment variables that torch reads on import; values set by the user stay."""
    # OpenMP's threads spin while they wait: on cores shared with other programs, small operations
    # took 30 times as long (measured on two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.scenario == "digits":  # too small for a second thread
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@contextmanager
def _heavy_imports() -> Iterator[None]:
    """Silences other libraries, and imports them without garbage collection, a fifth faster."""
    _quieten()
    if "torch" in sys.modules:  # a program that calls `main`
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # every run collects garbage first, and skips what was imported
        gc.enable()


def _with_recipes(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with names of recipes replaced by their files."""
    arguments = list(argv)
    for k, argument in enumerate(arguments):
        prefix = "--config=" if argument.startswith("--config=") else ""
        name = argument.removeprefix(prefix)
        is_config = bool(prefix) or (k > 0 and arguments[k - 1] == "--config")
        if is_config and name in RECIPES and not Path(name).exists():
            arguments[k] = prefix + str(RECIPES[name])
    return arguments


def _with_lists(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with ``--tasks a b`` as ``--tasks ["a", "b"]``, as YAML has it.

    With ``nargs="+"``, as ``--methods`` has it, the form of YAML would be a name.
    """
    types = typing.get_type_hints(RunSettings)
    flags = {f"--{name}" for name, hint in types.items() if hint == list[str] | None}
    arguments: list[str] = []
    names: list[str] | None = None
    for argument in [*argv, "--"]:
        if names is not None and argument.startswith("-"):
            is_value = len(names) == 1 and (names[0].startswith("[") or names[0] == "null")
            arguments += names if is_value or not names else [json.dumps(names)]
            names = None
        if names is None:
            arguments.append(argument)
            names = [] if argument in flags else None
        else:
            names.append(argument)
    return arguments[:-1]


def _tables() -> dict[str, Sequence[tuple[str, ...]]]:
    """Returns the rows of ``treelora list``, by table."""
    return {
        "methods": [
            (name, entry.kind, ", ".join(sorted(entry.models, reverse=True)), entry.description)
            for name, entry in METHODS.loadable()
        ],
        "scenarios": [
            (name, "language" if entry.language else "vision", entry.description)
            for name, entry in SCENARIOS.loadable()
        ],
        "recipes": [(name, describe_recipe(path)) for name, path in RECIPES.items()],
    }


def _list(options: Any) -> int:
    from rich.console import Console

    console = Console()
    if options.what in METHODS or options.what in SCENARIOS:
        _list_options(options.what, console)
        return 0
    if options.what is not None:
        check_known("list", options.what, (*LISTS, *METHODS, *SCENARIOS))
    for title, rows in _tables().items():
        if options.what not in (None, title):
            continue
        _print_rows(console, title.capitalize(), rows)
        if title == "recipes":
            folder = next(iter(RECIPES.values())).parent
            console.print(
                f"Files in {folder}. Run one with treelora compare --config NAME",
                highlight=False,
                soft_wrap=True,
            )
        console.print()
    return 0


def _print_rows(console: Any, title: str, rows: Sequence[tuple[str, ...]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.show_header = False
    n_columns = len(rows[0])
    for column in range(n_columns):
        table.add_column(style="" if column else "bold", no_wrap=column < n_columns - 1)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _list_options(name: str, console: Any) -> None:
    """Prints the options of a method or scenario, and the flags that it reads."""
    with _heavy_imports():
        from treelora_avalanche.registry.options import show_default
        from treelora_avalanche.registry.streams import scenario_options

        if name in METHODS:
            entry: Any = METHODS[name]
            own, flag, shared = entry.own_options(), f"--method_options '{{{name}: {{", entry.reads
            values = entry.options
        else:
            entry = SCENARIOS[name]
            own, flag, shared = scenario_options(entry), "--scenario_options '{", entry.takes
            values = {}
    console.print(f"[bold]{name}[/bold]: {entry.description}", highlight=False)
    defaults = {name: repr(value) for name, value in values.items()}
    rows = [
        (name, defaults.get(option.name, show_default(option)), option.doc)
        for name, option in own.items()
    ]
    if rows:
        _print_rows(console, "Options", rows)
        closing = "}}'" if name in METHODS else "}'"
        console.print(f"Set by {flag}{rows[0][0]}: ...{closing}", highlight=False, markup=False)
    else:
        console.print("No options of its own.")
    if name in METHODS and entry.strength is not None:
        strength = entry.strength
        console.print(
            f"Its strength, for treelora tune: {strength.option}, from {strength.low:g} to "
            f"{strength.high:g}",
            highlight=False,
        )
    if shared:
        console.print(f"Flags it reads: {', '.join(sorted(shared))}", highlight=False)


def _train(options: Any) -> int:
    from rich.console import Console

    settings = _settings(options)
    _check_early([options.method], settings, options.output or "runs/train")
    _set_threads(settings)
    with _heavy_imports():
        from treelora_avalanche.compare import train
        from treelora_avalanche.plugins import NonFiniteLossError
        from treelora_avalanche.reports.table import rich_table
        from treelora_avalanche.runs.distributed import is_first, one_folder

    try:
        with one_folder(options.output, settings.device) as output:
            cell = train(
                options.method,
                options.seed,
                settings,
                output,
                verbose=options.verbose,
                shard_backbone=options.shard_backbone,
                force=options.force,
            )
    except NonFiniteLossError as error:
        _complain(f"{error} Finished tasks are saved in the run folder.")
        return 1
    assert cell.results is not None
    if not is_first():
        return 0
    console = Console()
    console.print(rich_table([cell.results], console.width))
    console.print(f"Run folder: {cell.folder}", highlight=False, soft_wrap=True)
    return 0


def _compare(options: Any) -> int:
    from rich.console import Console

    points = _grid(options)
    for settings in points:
        _check_early(
            options.methods, settings, None if options.executor == "slurm" else options.output
        )
    _set_threads(points[0])
    with _heavy_imports():
        from treelora_avalanche.compare import compare, earlier_results, expand_options
        from treelora_avalanche.reports.figures import write_figures
        from treelora_avalanche.reports.table import rich_table, write_table

    output = Path(options.output)
    cells = compare(
        options.methods,
        options.seeds,
        [point for settings in points for point in expand_options(settings)],
        output,
        executor=options.executor,
        executor_options=options.executor_options,
        force=options.force,
    )
    results = [cell.results for cell in cells if cell.results is not None]
    earlier, n_others = earlier_results(output, cells)
    results += earlier
    console = Console()
    if results:
        write_table(results, output)
        figures = write_figures(results, output / "figures")
        console.print(rich_table(results, console.width))
        console.print(
            f"Written to {output}: table.md, comparison.json, figures/ ({len(figures)} figures), "
            "one folder per run.",
            highlight=False,
            soft_wrap=True,
        )
    if n_others:
        console.print(
            f"{n_others} runs on other streams in {output} are not in this table.", highlight=False
        )
    failed = [cell for cell in cells if cell.results is None]
    if failed:
        console.print(
            f"{len(failed)} of {len(cells)} runs failed. See error.txt in their folders.",
            style="red",
            highlight=False,
        )
    return 1 if failed else 0


def _tune(options: Any) -> int:
    from rich.console import Console

    settings = _settings(options)
    _check_early(options.methods, settings, None if options.executor == "slurm" else options.output)
    _set_threads(settings)
    with _heavy_imports():
        from treelora_avalanche.tune import caption, table, tune, write_tuned

    tuned = tune(
        options.methods,
        settings,
        options.output,
        trials=options.trials,
        seeds=options.seeds,
        executor=options.executor,
        executor_options=options.executor_options,
    )
    output = Path(options.output)
    write_tuned(tuned, settings, output, options.seeds)
    console = Console()
    console.print(table(tuned))
    console.print(caption(tuned, settings, options.seeds), style="dim", highlight=False)
    console.print(
        f"Written to {output}: tuned.yaml, tuned.md, trials.csv, one folder per run.",
        highlight=False,
        soft_wrap=True,
    )
    failed = [of_method for of_method in tuned if of_method.error is not None]
    for of_method in failed:
        console.print(
            f"{of_method.method} failed, {of_method.error} See error.txt in {output / 'trials'}. "
            "The same command continues.",
            style="red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if len(failed) < len(tuned):
        console.print(
            f"Next: treelora compare --config {output / 'tuned.yaml'}",
            highlight=False,
            soft_wrap=True,
        )
    return 1 if failed else 0


def _evaluate(options: Any) -> int:
    evaluate_command.check(options)
    _quieten()
    return evaluate_command.evaluate(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``treelora``.

    >>> main(["compare", "--methods", "TreeLoRA", "SeqLoRA", "--seeds", "0"])
    0

    :param argv: arguments; by default those of the process.
    :return: the exit code: 0; 1 if a run failed; 2 for wrong input; 130 if interrupted.
    """
    options = build_parser().parse_args(argv)
    try:
        if options.command == "list":
            return _list(options["list"])
        commands = {"train": _train, "compare": _compare, "tune": _tune, "evaluate": _evaluate}
        return commands[options.command](options[options.command])
    except (ValueError, OSError) as error:
        # OSError: missing files and folders, failed downloads of weights.
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print(
            "treelora: interrupted. Finished tasks are kept; the same command continues.",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["build_parser", "main"]
