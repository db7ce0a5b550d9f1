"""`treelora tune`: equal trials, held-out samples alone, continued searches, files."""

import csv
import io
import json
import math
import sys

import pytest
import yaml
from avalanche.benchmarks import dataset_benchmark
from rich.console import Console
from torch.utils.data import Dataset

from treelora_avalanche import models, scenarios
from treelora_avalanche.cli import build_parser, main
from treelora_avalanche.registry import METHODS, RunSettings
from treelora_avalanche.runs import resolve_config
from treelora_avalanche.tune import rounds, tune, tuned_config

SETTINGS = RunSettings(tune_tasks=2, device="cpu")


@pytest.fixture
def optuna():
    """Returns optuna; skips the test where the extra `tune` is not installed."""
    return pytest.importorskip("optuna", reason="the extra `tune` is not installed")


@pytest.fixture
def stubbed(monkeypatch):
    """Replaces training by a formula; returns the options of each run, in order.

    The best learning rate is 0.001; the best strength is 3 times its default.
    """
    runs = []

    def compare(methods, seeds, settings, output, **_):
        cells = []
        for method in methods:
            options = settings.method_options[method]
            for seed in seeds:
                runs.append((method, dict(options)))
                cells.append(cell(method, seed, score(method, options)))
        return cells

    def score(method, options):
        value = 0.9 - 0.2 * abs(math.log10(options["lr"] / 0.001))
        strength = METHODS[method].strength
        if strength is not None and strength.option in options:
            best = 3 * METHODS[method].default_of(strength.option, SETTINGS)
            value += 0.05 - 0.05 * abs(math.log10(options[strength.option] / best))
        return value

    monkeypatch.setattr(rounds, "compare", compare)
    return runs


def cell(method, seed, score=None, error=None):
    results = None
    if error is None:
        results = {
            "metrics": {"class_incremental": {"overall_performance": score}},
            "timings": {"train_seconds": 2.0, "eval_seconds": 1.0},
        }
    return rounds.Cell(method, seed, {}, None, results=results, error=error)


def quiet_tune(methods, output, settings=SETTINGS, **options):
    return tune(methods, settings, output, console=Console(file=io.StringIO()), **options)


def tried(tuned):
    return {of_method.method: [t.options for t in of_method.trials] for of_method in tuned}


@pytest.mark.usefixtures("optuna")
def test_every_method_has_the_same_number_of_trials(stubbed, tmp_path):
    tuned = quiet_tune(["EWCLoRA", "SeqLoRA", "FrozenNCM"], tmp_path, trials=5, seeds=[0, 1])
    options = tried(tuned)
    assert {name: len(trials) for name, trials in options.items()} == {
        "EWCLoRA": 5,
        "SeqLoRA": 5,
        "FrozenNCM": 0,
    }
    assert len(stubbed) == 2 * 5 * 2  # methods, trials, seeds
    ewc = options["EWCLoRA"]
    # The learning rate first, from the default; then the strength, with the best learning rate.
    assert ewc[0] == {"lr": 0.0003} == options["SeqLoRA"][0]
    assert [set(trial) for trial in ewc] == [{"lr"}] * 3 + [{"lr", "ewc_lambda"}] * 2
    best_lr = max(tuned[0].trials[:3], key=lambda trial: trial.score).options["lr"]
    assert {trial["lr"] for trial in ewc[3:]} == {best_lr}
    space = METHODS["EWCLoRA"].search_space(SETTINGS)
    assert space == {"lr": (3e-5, 3e-3), "ewc_lambda": (1.0, 1e4)}
    for trial in ewc:
        assert all(space[name][0] <= value <= space[name][1] for name, value in trial.items())
    # Each method's best is close to the best of the formula.
    assert abs(math.log10(tuned[1].best.options["lr"] / 0.001)) < 0.1
    assert tuned[0].best.score > tuned[0].trials[0].score
    assert tuned[0].trials[0].seconds == 6.0


@pytest.mark.usefixtures("optuna")
def test_a_continued_search_is_the_same_as_an_uninterrupted_one(stubbed, tmp_path, monkeypatch):
    whole = quiet_tune(["EWCLoRA", "SeqLoRA"], tmp_path / "whole", trials=4)
    n_runs = len(stubbed)
    trained, interrupted = rounds.compare, tmp_path / "interrupted"

    def once_interrupted(*args, **kwargs):
        if len(stubbed) == n_runs + 4:  # after two rounds
            raise KeyboardInterrupt
        return trained(*args, **kwargs)

    monkeypatch.setattr(rounds, "compare", once_interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet_tune(["EWCLoRA", "SeqLoRA"], interrupted, trials=4)
    monkeypatch.setattr(rounds, "compare", trained)
    continued = quiet_tune(["EWCLoRA", "SeqLoRA"], interrupted, trials=4)
    assert tried(continued) == tried(whole)
    assert len(stubbed) == 2 * n_runs
    # Nothing is left to do; more trials continue, other settings are another search.
    quiet_tune(["SeqLoRA"], interrupted, trials=4)
    assert len(stubbed) == 2 * n_runs
    more = quiet_tune(["SeqLoRA"], interrupted, trials=5)
    assert len(stubbed) == 2 * n_runs + 1
    assert tried(more)["SeqLoRA"][:4] == tried(whole)["SeqLoRA"]
    quiet_tune(["SeqLoRA"], interrupted, SETTINGS.with_changes(epochs=9), trials=1)
    assert len(stubbed) == 2 * n_runs + 2


@pytest.mark.usefixtures("optuna")
def test_a_failed_method_stops_alone_and_is_tried_again(stubbed, tmp_path, monkeypatch):
    trained = rounds.compare

    def failing(methods, *args, **kwargs):
        error = "OSError: disk full"
        cells = trained(methods, *args, **kwargs)
        return [cell("Naive", 0, error=error) if c.method == "Naive" else c for c in cells]

    monkeypatch.setattr(rounds, "compare", failing)
    tuned = quiet_tune(["Naive", "SeqLoRA"], tmp_path, trials=2)
    assert [(t.error, len(t.trials)) for t in tuned] == [
        ("seed 0: OSError: disk full.", 0),
        (None, 2),
    ]
    assert tuned_config(tuned, SETTINGS)["methods"] == ["SeqLoRA"]
    monkeypatch.setattr(rounds, "compare", trained)
    stubbed.clear()
    tuned = quiet_tune(["Naive", "SeqLoRA"], tmp_path, trials=2)
    assert [len(t.trials) for t in tuned] == [2, 2]
    assert {method for method, _ in stubbed} == {"Naive"}


@pytest.mark.usefixtures("optuna")
def test_a_diverged_run_scores_zero(tmp_path, monkeypatch):
    def compare(methods, seeds, settings, output, **_):
        lr = settings.method_options["SeqLoRA"]["lr"]
        error = "NonFiniteLossError: the loss should be finite" if lr > 0.0003 else None
        return [cell("SeqLoRA", 0, 0.5, error)]

    monkeypatch.setattr(rounds, "compare", compare)
    trials = quiet_tune(["SeqLoRA"], tmp_path, trials=3)[0].trials
    assert [trial.score for trial in trials] == [
        0.0 if trial.options["lr"] > 0.0003 else 0.5 for trial in trials
    ]
    assert {trial.seconds for trial in trials if not trial.score} <= {None}


class Poison(Dataset):
    """Images of the test stream, which must not be read."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        raise AssertionError("the test stream was read")


@pytest.fixture
def poisoned(monkeypatch, tiny_benchmark, tiny_vit):
    """Replaces the digits by a tiny stream whose test images raise an error."""
    train = [experience.dataset for experience in tiny_benchmark.train_stream]
    test = [Poison([2 * task, 2 * task + 1]) for task in range(3)]
    benchmark = dataset_benchmark(train, test)
    benchmark.n_classes = tiny_benchmark.n_classes
    monkeypatch.setattr(scenarios, "SplitDigits", lambda n_experiences, seed: benchmark)
    monkeypatch.setattr(models, "pretrained_digits_vit", lambda seed: tiny_vit())


@pytest.mark.usefixtures("optuna", "poisoned")
def test_command_chooses_without_the_test_stream(tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["tune", "--methods", "L2Anchor", "Naive", "--trials", "2", "--tune_tasks", "2"]
    arguments += ["--epochs", "1", "--batch_size", "8", "--device", "cpu", "--rank", "2"]
    arguments += ["--layers", "last:1", "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "held-out training samples" in " ".join(printed.out.split())
    assert "Naive, trial 2 of 2: lr" in printed.err
    with (output / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["L2Anchor"] * 2 + ["Naive"] * 2
    assert all(float(row["seconds"]) > 0 for row in rows)
    runs = sorted((output / "trials").glob("*/results.json"))
    assert len(runs) == 4
    for file in runs:
        results = json.loads(file.read_text())
        assert results["config"]["tune_tasks"] == 2
        assert results["stream"]["test_samples"] == [6, 6]  # of 32 training samples
    # `compare` reads the choice, for the whole stream.
    text = (output / "tuned.yaml").read_text()
    assert text.startswith("# Chosen by treelora tune. digits: first 2 tasks")
    options = build_parser().parse_args(["compare", "--config", str(output / "tuned.yaml")])
    options = options["compare"]
    assert options.tune_tasks is None
    assert options.methods == ["L2Anchor", "Naive"]
    best = {
        name: max(
            (row for row in rows if row["method"] == name), key=lambda row: float(row["score"])
        )
        for name in options.methods
    }
    for name, row in best.items():
        chosen = {key: float(row[key]) for key in ("lr", "strength") if row[key]}
        assert options.method_options[name] == chosen
    assert options.epochs == 1
    assert "| L2Anchor |" in (output / "tuned.md").read_text()
    # A second call trains nothing.
    assert main(arguments) == 0
    assert "trial" not in capsys.readouterr().err
    assert (output / "tuned.yaml").read_text() == text


@pytest.mark.usefixtures("poisoned")
def test_poison_is_effective(tmp_path):
    arguments = ["train", "--epochs", "1", "--layers", "last:1", "--output", str(tmp_path / "run")]
    with pytest.raises(AssertionError, match="the test stream was read"):
        main([*arguments, "--device", "cpu"])


def test_missing_optuna_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'treelora-avalanche[tune]'" in error
    assert error.count("\n") == 1


def test_list_shows_the_strength(capsys):
    assert main(["list", "EWCLoRA"]) == 0
    assert "treelora tune: ewc_lambda, from 1 to 10000" in capsys.readouterr().out


def test_number_of_trials_is_checked(tmp_path):
    with pytest.raises(ValueError, match="`--trials` should be at least 1, but is 0"):
        quiet_tune(["SeqLoRA"], tmp_path, trials=0)


def test_given_options_are_kept_in_the_choice():
    settings = RunSettings(
        tune_tasks=2, lr=0.01, method_options={"EWCLoRA": {"mode": "separate", "lr": 0.1}}
    )
    trial = rounds.Trial({"lr": 0.2, "ewc_lambda": 7.0}, 0.5, 1.0)
    tuned = [rounds.Tuned("EWCLoRA", [trial], {"lr": (0.1, 1.0), "ewc_lambda": (7.0, 8.0)})]
    config = yaml.safe_load(yaml.safe_dump(tuned_config(tuned, settings)))
    assert config["lr"] == 0.01
    assert config["method_options"] == {
        "EWCLoRA": {"mode": "separate", "lr": 0.2, "ewc_lambda": 7.0}
    }
    assert "tune_tasks" not in config
    assert tuned[0].at_ends == ["ewc_lambda"]


@pytest.mark.parametrize("method", [name for name, row in METHODS.data.items() if row.strength])
def test_strengths_are_options_and_their_defaults_in_range(method):
    row = METHODS[method]
    option, low, high, _ = row.strength
    assert 0 < low < high
    default = row.default_of(option, RunSettings())
    if default is None:  # the strategy's, which depends on the inference
        assert option == "tree_lambda"
        default = 0.1
    assert low <= default <= high


def test_runs_on_the_whole_stream_keep_their_configuration():
    config = resolve_config("SeqLoRA", 0, RunSettings(device="cpu"))
    assert "tune_tasks" not in config
    tuning = resolve_config("SeqLoRA", 0, RunSettings(device="cpu", tune_tasks=2))
    assert tuning == {**config, "tune_tasks": 2}
