"""``treelora evaluate``: checks its arguments, evaluates, prints a table.

torch, Avalanche and the harness are imported once the arguments are checked.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_avalanche.plain_text import read_passages
from treelora_avalanche.registry.methods import METHODS
from treelora_avalanche.registry.scenarios import SCENARIOS

if TYPE_CHECKING:
    import jsonargparse
    from rich.console import Console

    from treelora_avalanche.evaluate.finished import FinishedRun


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Adds the arguments of ``treelora evaluate``.

    :param parser: the parser of the command.
    """
    parser.add_argument("run", type=str, help="folder of a finished run of a language model")
    parser.add_argument(
        "--plain_text",
        type=str | None,
        default=None,
        help="text file, passages separated by empty lines, on which perplexities are measured; "
        "default: 14 passages of English",
    )
    parser.add_argument(
        "--harness",
        type=str,
        default=[],
        nargs="*",
        help="tasks of lm-evaluation-harness to run instead (needs the extra `eval`); without "
        "names those of --include_path",
    )
    parser.add_argument(
        "--include_path",
        type=str | None,
        default=None,
        help="folder of further harness tasks, as YAML files",
    )


def check(options: Any) -> None:
    """Raises an error for arguments that cannot be evaluated; imports nothing heavy.

    :param options: the parsed arguments.
    :raises FileNotFoundError: if a file or folder is missing.
    :raises ValueError: if the run is unfinished or of image models, or the harness is missing.
    """
    check_run(Path(options.run))
    if not (options.harness or options.include_path):
        read_passages(options.plain_text)
        return
    if options.plain_text is not None:
        raise ValueError("`--plain_text` and `--harness` are both given. Choose one.")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise FileNotFoundError(
            f"`--include_path` should be a folder, but {options.include_path} is not a folder. "
            "Correct the path."
        )
    if find_spec("lm_eval") is None:
        raise ValueError(
            "`--harness` needs lm_eval, which is not installed. Install it by pip install "
            "'treelora-avalanche[eval]'."
        )


def check_run(folder: Path) -> None:
    """Raises an error for a folder without the final model of a language run.

    :param folder: the folder.
    :raises FileNotFoundError: if it holds no run.
    :raises ValueError: if the run is unfinished, of image models, or keeps no model.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"`run` should be a run folder, but {folder} holds no config.yaml. Pass one that "
            "treelora train or compare has written."
        )
    if not (folder / "results.json").is_file():
        raise ValueError(
            f"`run` should be a finished run, but {folder} has no results.json. Repeat its "
            "command, which continues it."
        )
    config = json.loads((folder / "results.json").read_text(encoding="utf-8"))["config"]
    method, scenario = config["method"], config["scenario"]
    if not SCENARIOS[scenario].language:
        raise ValueError(
            f"`run` should be of a language model, but {folder} is of images (`--scenario "
            f"{scenario}`). Its scores are in results.json."
        )
    if METHODS[method].frozen:
        raise ValueError(
            f"`run` should be of a method that trains the model, but {method} does not. Its final "
            "model is the base model."
        )
    if not (folder / "model").is_dir():
        raise ValueError(
            f"`run` should hold its final model in model/, but {folder} does not: either every "
            f"weight was trained ({method}), or an earlier version made it. Run another method, or "
            "repeat its command with --force."
        )


def evaluate(options: Any) -> int:
    """Evaluates a finished run, and prints a table.

    :param options: the parsed arguments, see :func:`check`.
    :return: the exit code.
    """
    if not sys.stderr.isatty():  # in a file, a progress bar is a line per update
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from rich.console import Console

    from treelora_avalanche.evaluate.finished import FinishedRun

    run, console = FinishedRun.read(options.run), Console()
    if options.harness or options.include_path:
        _harness(run, options.harness, options.include_path, console)
    else:
        _plain_text(run, options.plain_text, console)
    return 0


def _plain_text(run: FinishedRun, file: str | None, console: Console) -> None:
    from treelora_avalanche.runs.plain_text import PlainText, in_words

    base = run.base_model()
    text = PlainText.of(base, run.settings.with_changes(plain_text=file), run.device)
    before = text.of_base(base)
    after = text.of_model(run.strategy(base).model)
    console.print(
        f"{run.config['method']}, seed {run.config['seed']}: "
        f"{in_words(text.change(before, after))}",
        highlight=False,
        soft_wrap=True,
    )


def _harness(
    run: FinishedRun, names: Sequence[str], include_path: str | None, console: Console
) -> None:
    from treelora_avalanche.evaluate.finished import Predictor
    from treelora_avalanche.evaluate.harness import HarnessModel, find_tasks, run_tasks
    from treelora_avalanche.evaluate.scores import Comparison, write_comparison

    manager, tasks = find_tasks(names, include_path)  # before the weights are loaded
    batch_size = run.settings.eval_batch_size or 1
    base = run.base_model().to(run.device)
    before = run_tasks(HarnessModel(Predictor.of_base(base), batch_size), tasks, manager)
    strategy = run.strategy(base.to("cpu"))
    after = run_tasks(HarnessModel(Predictor.of_strategy(strategy), batch_size), tasks, manager)
    comparison = Comparison.of(before, after)
    write_comparison(comparison, run.config, run.folder)
    console.print(comparison.table())
    console.print(comparison.in_words(), style="dim", highlight=False)
    console.print(f"Written to {run.folder / 'harness.json'}", highlight=False, soft_wrap=True)


__all__ = ["add_arguments", "check", "check_run", "evaluate"]
