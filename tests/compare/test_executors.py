"""Cells of a comparison in processes and as jobs, without SLURM."""

import io
import queue
import sys

import pytest
import torch
from rich.console import Console

from treelora_avalanche.compare import compare, executors
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs import Ingredients, single

HERE = {"cluster": "debug", "gpus_per_job": 0, "time": 60}  # jobs run in this process
SETTINGS = RunSettings(epochs=1, batch_size=8, rank=2, layers="all")


def quiet_compare(*args, **kwargs):
    stream = io.StringIO()
    cells = compare(*args, console=Console(file=stream, width=100), **kwargs)
    return cells, stream.getvalue()


@pytest.fixture
def prepared(monkeypatch, tiny_benchmark, tiny_vit):
    """Replaces the stream by a tiny one; returns the list of prepared seeds."""
    seeds = []

    def prepare(seed, settings, methods):
        seeds.append(seed)
        return Ingredients(seed, tiny_benchmark, tiny_vit())

    monkeypatch.setattr(single, "prepare", prepare)
    return seeds


def test_every_unfinished_cell_is_a_job(prepared, tmp_path):
    options = {"executor": "slurm", "executor_options": HERE}
    cells, printed = quiet_compare(["SeqLoRA", "Naive"], [0], SETTINGS, tmp_path, **options)
    assert prepared == [0, 0]
    assert printed.count("done, acc") == 2
    again, printed = quiet_compare(["SeqLoRA", "Naive"], [0, 1], SETTINGS, tmp_path, **options)
    assert prepared == [0, 0, 1, 1]
    assert printed.count("finished before") == 2
    assert [cell.results for cell in again if cell.seed == 0] == [cell.results for cell in cells]
    # A sequential comparison reuses the results of jobs.
    alone, _ = quiet_compare(["SeqLoRA", "Naive"], [0], changed_device(), tmp_path)
    assert all(cell.reused for cell in alone)


def changed_device():
    return RunSettings(epochs=1, batch_size=8, rank=2, layers="all", device="cpu")


@pytest.mark.parametrize(
    ("executor", "options"),
    [("processes", {"workers": 2}), ("slurm", {**HERE, "cluster": "local"})],
)
def test_failure_in_another_process_is_reported(executor, options, tmp_path):
    settings = RunSettings(scenario="image_folder", data=str(tmp_path / "nowhere"), device="cpu")
    cells, printed = quiet_compare(
        ["SeqLoRA"], [0], settings, tmp_path, executor=executor, executor_options=options
    )
    assert cells[0].results is None
    assert cells[0].error.startswith("FileNotFoundError: `--data`")
    assert "failed  SeqLoRA, seed 0: FileNotFoundError" in printed


def test_processes_are_spread_over_visible_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert executors.visible_gpus("auto") == ["0", "1"]
    assert executors.visible_gpus("cpu") == executors.visible_gpus("cuda:1") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert executors.visible_gpus("cuda") == ["5", "3"]
    free = queue.Queue()
    free.put("3")
    executors.take_gpu(free)
    assert executors.os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_device_of_a_job_does_not_depend_on_the_submitting_machine():
    assert executors.settings_of_jobs(SETTINGS, "slurm", {}).device == "cuda"
    assert executors.settings_of_jobs(SETTINGS, "slurm", {"gpus_per_job": 0}).device == "cpu"
    assert executors.settings_of_jobs(SETTINGS, "processes", {}).device == "auto"
    named = RunSettings(device="cpu")
    assert executors.settings_of_jobs(named, "slurm", {}) == named


def test_missing_submitit_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'treelora-avalanche\[slurm\]'"):
        quiet_compare(["Naive"], [0], SETTINGS, tmp_path, executor="slurm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"executor": "slrum"}, r"`--executor`.*slurm"),
        (
            {"executor_options": {"workers": 2}},
            r"`--executor_options` should come with `--executor`",
        ),
        ({"executor": "processes", "executor_options": {"time": 2}}, r"executor_options.*workers"),
        ({"executor": "processes", "executor_options": {"workers": 0}}, r"`workers` should be"),
        ({"executor": "slurm", "executor_options": {"time": 9}}, r"cannot be used here"),
        ({"executor": "slurm"}, r"`--executor_options` should have `time`.* but has none"),
        ({"executor": "slurm", "executor_options": {**HERE, "tiem": 3}}, r"here:.*tiem"),
    ],
)
def test_wrong_options_are_named(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no SLURM, wherever the tests run
    with pytest.raises(ValueError, match=message):
        quiet_compare(["Naive"], [0], SETTINGS, tmp_path, **arguments)
