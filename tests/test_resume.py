"""Interrupted runs: they continue at the last task that was finished, to the same results."""

import json
import signal
import subprocess
import sys
import time

import pytest

from treelora_avalanche import models
from treelora_avalanche.cli import main
from treelora_avalanche.methods import METHODS
from treelora_avalanche.runs import Ingredients, run
from treelora_avalanche.settings import RunSettings

SETTINGS = RunSettings(
    epochs=1, batch_size=8, rank=2, layers="all", lr=0.01, device="cpu", head="task_adaptive"
)
CONTINUES = [
    *("TreeLoRA", "TreeLoRA-routed", "SeqLoRA", "EWCLoRA", "GEMLoRA", "Naive"),
    *("OGD", "OLoRA", "InfLoRA", "L2Anchor"),
]


class PowerCutError(Exception):
    pass


@pytest.fixture
def ingredients(tiny_benchmark, tiny_vit):
    return Ingredients(0, tiny_benchmark, tiny_vit())


def outcome(results):
    """Everything of a run that does not depend on the clock or the machine's load."""
    left_out = ("timings", "finished", "memory", "git_hash")
    kept = {key: value for key, value in results.items() if key not in left_out}
    return {
        **kept,
        "steps": results["timings"]["steps"],
        "stored_bytes": results["memory"]["stored_bytes"],
    }


def cut_in_task(task):
    def progress(now):
        if now.task == task and now.step % 4 == 2:
            raise PowerCutError

    return progress


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "train_seconds"} for line in lines]


def interrupt(method, ingredients, folder, task=3):
    with pytest.raises(PowerCutError):
        run(method, 0, SETTINGS, folder, ingredients=ingredients, progress=cut_in_task(task))


@pytest.mark.parametrize("method", CONTINUES)
def test_continued_is_uninterrupted_bit_for_bit(method, ingredients, tmp_path):
    whole = run(method, 0, SETTINGS, tmp_path / "whole", ingredients=ingredients)
    folder, notes = tmp_path / "cut", []
    interrupt(method, ingredients, folder)
    # A line of the task that was cut short, which the continued run writes again.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epoch", "experience": 2, "epoch": 1}\n')
    steps = []
    continued = run(
        method,
        0,
        SETTINGS,
        folder,
        ingredients=ingredients,
        progress=lambda now: steps.append(now.step),
        note=notes.append,
    )
    assert notes == ["continues after task 2 of 3"]
    assert outcome(continued) == outcome(whole)
    assert losses(folder) == losses(tmp_path / "whole")
    assert set(steps) == {9, 10, 11, 12}, "4 steps a task: only the third was trained again"
    for name in ("training_results.csv", "eval_results.csv"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    if method.startswith("TreeLoRA"):
        assert (folder / "tree.txt").read_text() == (tmp_path / "whole" / "tree.txt").read_text()
    assert not list(folder.glob("state*"))


@pytest.mark.parametrize(
    "method", [name for name, entry in METHODS.items() if name not in CONTINUES and not entry.joint]
)
def test_what_cannot_be_saved_starts_again_and_says_so(method, ingredients, tmp_path):
    notes = []
    whole = run(method, 0, SETTINGS, tmp_path / "whole", ingredients=ingredients)
    (tmp_path / "whole" / "results.json").unlink()
    again = run(method, 0, SETTINGS, tmp_path / "whole", ingredients=ingredients, note=notes.append)
    assert len(notes) == 1
    assert "starts again from the first task" in notes[0]
    assert "cannot be saved" in notes[0]
    assert outcome(again) == outcome(whole)


def test_a_damaged_state_starts_again_and_says_so(ingredients, tmp_path):
    whole = run("SeqLoRA", 0, SETTINGS, tmp_path / "whole", ingredients=ingredients)
    folder, notes = tmp_path / "cut", []
    interrupt("SeqLoRA", ingredients, folder)
    file = folder / "state" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = run("SeqLoRA", 0, SETTINGS, folder, ingredients=ingredients, note=notes.append)
    assert len(notes) == 1
    assert "starts again from the first task" in notes[0]
    assert "truncated or altered" in notes[0]
    assert outcome(again) == outcome(whole)
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_state_of_another_backbone_starts_again_and_says_so(ingredients, tmp_path, tiny_vit):
    folder, notes = tmp_path / "cut", []
    interrupt("SeqLoRA", ingredients, folder)
    other = Ingredients(0, ingredients.benchmark, tiny_vit())
    other.backbone.blocks[0].mlp.fc1.weight.data.mul_(2)
    run("SeqLoRA", 0, SETTINGS, folder, ingredients=other, note=notes.append)
    assert notes[0] == "continues after task 2 of 3"
    assert "another backbone" in notes[1]
    assert len(losses(folder)) == 6


def test_another_configuration_does_not_continue(ingredients, tmp_path):
    interrupt("SeqLoRA", ingredients, tmp_path)
    notes = []
    results = run("Naive", 0, SETTINGS, tmp_path, ingredients=ingredients, note=notes.append)
    assert not notes
    assert results["timings"]["steps"] == 12
    assert not (tmp_path / "adapters").exists()


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Pretraining the digits' backbone takes seconds, and is not what is tested.
UNPRETRAINED_TRAINING = """
import sys
from treelora_avalanche import models
from treelora_avalanche.cli import main
models.pretrained_digits_vit = lambda seed: models.digits_vit()
sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_started_again(tmp_path, capfd, monkeypatch):
    """By SIGKILL, which no program can prepare for, and by the command line of a user."""

    def command(folder):
        options = {"epochs": 1, "n_experiences": 5, "head": "task_adaptive", "output": folder}
        return ["train", *(f"--{name}={value}" for name, value in options.items())]

    folder = tmp_path / "killed"

    def after_task_two():
        # Written after the task's evaluation, and whole at every moment.
        try:
            text = (folder / "state" / "state.json").read_text()
        except FileNotFoundError:
            return False
        return json.loads(text)["state"]["progress"]["stages"] >= 2

    process = subprocess.Popen(
        [sys.executable, "-c", UNPRETRAINED_TRAINING, *command(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(after_task_two, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "results.json").exists()

    monkeypatch.setattr(models, "pretrained_digits_vit", lambda seed: models.digits_vit())
    assert main(command(tmp_path / "whole")) == 0
    assert "continues" not in capfd.readouterr().err
    assert main(command(folder)) == 0
    assert "TreeLoRA, seed 0: continues after task" in capfd.readouterr().err
    results = [
        json.loads((path / "results.json").read_text()) for path in (folder, tmp_path / "whole")
    ]
    assert outcome(results[0]) == outcome(results[1])
