"""Resumption: interrupted runs continue after the last finished task, to the same results."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from avalanche.benchmarks import dataset_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
from avalanche.training.plugins import LwFPlugin, ReplayPlugin
from avalanche.training.supervised import Cumulative, LwF, Replay

from support import FEW_PROJECTIONS
from treelora_avalanche import models
from treelora_avalanche.checkpoint import load_strategy, save_strategy
from treelora_avalanche.cli import main
from treelora_avalanche.plugins import MemoryDrawsPlugin
from treelora_avalanche.registry import AVALANCHE, METHODS, Method
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs import Ingredients, run, session
from treelora_avalanche.runs.resume import save_progress

SETTINGS = RunSettings(
    epochs=1,
    batch_size=8,
    rank=2,
    layers="all",
    lr=0.01,
    device="cpu",
    head="task_adaptive",
    method_options=FEW_PROJECTIONS,
)
CONTINUES = [
    name for name, entry in METHODS.items() if "vision" in entry.models and not entry.joint
]
# Steps of the last of three tasks, in batches of eight, from 1.
UNTRAINED = ("FrozenNCM", "FrozenGaussian", "FrozenRanPAC", "RanPAC")
LAST_STEPS = {"Cumulative": range(13, 25), **dict.fromkeys(UNTRAINED, ())}


class PowerCutError(Exception):
    pass


@pytest.fixture
def ingredients(tiny_benchmark, tiny_vit):
    # Five blocks: DualPrompt and HiDe-Prompt have prompts in five.
    return Ingredients(0, tiny_benchmark, tiny_vit(depth=5))


def outcome(results):
    """Returns the results that do not depend on time or load."""
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
    def cut_after_saving(*arguments):
        save_progress(*arguments)
        if arguments[-1].stages == task - 1:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patch:
        if not LAST_STEPS.get(method, True):  # no step to interrupt
            patch.setattr(session, "save_progress", cut_after_saving)
        with pytest.raises(PowerCutError):
            run(method, 0, SETTINGS, folder, ingredients=ingredients, progress=cut_in_task(task))


@pytest.mark.parametrize("method", CONTINUES)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(method, ingredients, tmp_path):
    whole = run(method, 0, SETTINGS, tmp_path / "whole", ingredients=ingredients)
    folder, notes = tmp_path / "cut", []
    interrupt(method, ingredients, folder)
    # A line of the interrupted task, which the resumed run writes again.
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
    before = 4 if method == "RanPAC" else 0  # steps, all in the first task
    last = set(LAST_STEPS.get(method, range(9, 13))) or {before}
    assert set(steps) == last, "only the third task was trained again"
    for name in ("training_results.csv", "eval_results.csv"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    if method.startswith("TreeLoRA"):
        assert (folder / "tree.txt").read_text() == (tmp_path / "whole" / "tree.txt").read_text()
    assert not list(folder.glob("state*"))


def test_run_without_saved_state_restarts_with_a_note(ingredients, tmp_path, monkeypatch):
    method, notes = "MAS", []
    row = Method(
        "avalanche.training:MAS", "MAS", AVALANCHE, options={"lambda_reg": 1.0, "alpha": 0.5}
    )
    monkeypatch.setitem(METHODS, method, row)
    whole = run(method, 0, SETTINGS, tmp_path / "whole", ingredients=ingredients)
    (tmp_path / "whole" / "results.json").unlink()
    again = run(method, 0, SETTINGS, tmp_path / "whole", ingredients=ingredients, note=notes.append)
    assert len(notes) == 1
    assert "starts again from the first task" in notes[0]
    assert "MASPlugin keeps state that cannot be saved" in notes[0]
    assert outcome(again) == outcome(whole)


def wide_benchmark():
    """Returns a benchmark of four tasks with eight classes each, with scattered labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(400, generator=generator)[:32].reshape(4, 8)

    def dataset(classes):
        targets = classes.repeat_interleave(4)
        images = torch.randn(len(targets), 8, generator=generator)
        return _make_taskaware_tensor_classification_dataset(images, targets, task_labels=0)

    datasets = [dataset(classes) for classes in labels]
    return dataset_benchmark(datasets, datasets)


@pytest.mark.parametrize(
    ("strategy_class", "options"),
    [
        (Replay, {"mem_size": 10, "plugins": [MemoryDrawsPlugin]}),
        (LwF, {"alpha": 1.0, "temperature": 2.0}),
        (Cumulative, {}),
    ],
)
def test_past_data_are_restored_from_the_stream(strategy_class, options, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(8, 400)
        return strategy_class(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
            criterion=torch.nn.CrossEntropyLoss(),
            train_mb_size=8,
            evaluator=None,
            **{**options, "plugins": [plugin() for plugin in options.get("plugins", ())]},
        )

    stream = wide_benchmark().train_stream
    whole, resumed = build(0), build(1)
    for experience in stream[:3]:
        whole.train(experience)
    save_strategy(whole, tmp_path / "state")
    before = resumed.model.weight.clone()
    with pytest.raises(ValueError, match="`past` should hold the 3 experiences"):
        load_strategy(resumed, tmp_path / "state", stream[:2])
    assert torch.equal(resumed.model.weight, before)
    weights = []
    for strategy in (whole, resumed):  # also into the strategy that saved it
        load_strategy(strategy, tmp_path / "state", stream[:3])
        strategy.train(stream[3])
        weights.append(strategy.model.weight)
    assert torch.equal(*weights)
    without = build(1)
    load_strategy(without, tmp_path / "state", stream[:3])
    drop_past_data(without)
    without.train(stream[3])
    assert not torch.equal(without.model.weight, weights[0]), "the restored data matter"


def drop_past_data(strategy):
    """Deletes the data and model that were restored."""
    strategy.dataset = None
    for plugin in strategy.plugins:
        if isinstance(plugin, LwFPlugin):
            plugin.lwf.prev_model = None
        if isinstance(plugin, ReplayPlugin):
            plugin.storage_policy.buffer_groups.clear()


def test_replay_without_recorded_draws_is_refused(tmp_path):
    model = torch.nn.Linear(8, 400)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Replay(model=model, optimizer=optimizer, criterion=None, evaluator=None)
    with pytest.raises(
        TypeError, match="should have `state_dict` and `load_state_dict`, but ReplayPlugin do not"
    ):
        save_strategy(strategy, tmp_path / "state")


def test_damaged_state_restarts_with_a_note(ingredients, tmp_path):
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


def test_state_of_another_backbone_restarts_with_a_note(ingredients, tmp_path, tiny_vit):
    folder, notes = tmp_path / "cut", []
    interrupt("SeqLoRA", ingredients, folder)
    other = Ingredients(0, ingredients.benchmark, tiny_vit(depth=5))
    other.backbone.blocks[0].mlp.fc1.weight.data.mul_(2)
    run("SeqLoRA", 0, SETTINGS, folder, ingredients=other, note=notes.append)
    assert notes[0] == "continues after task 2 of 3"
    assert "the backbone should be that of the state, but has other" in notes[1]
    assert len(losses(folder)) == 6


def test_another_configuration_does_not_resume(ingredients, tmp_path):
    interrupt("SeqLoRA", ingredients, tmp_path)
    notes = []
    results = run("Naive", 0, SETTINGS, tmp_path, ingredients=ingredients, note=notes.append)
    assert not notes
    assert results["timings"]["steps"] == 12
    assert not (tmp_path / "adapters").exists()


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Skips the pretraining of the digits' backbone, which takes seconds.
UNPRETRAINED_TRAINING = """
import sys
from treelora_avalanche import models
from treelora_avalanche.cli import main
models.pretrained_digits_vit = lambda seed: models.digits_vit()
sys.exit(main(sys.argv[1:]))
"""


def test_killed_run_is_resumed(tmp_path, capfd, monkeypatch):
    """Checks resumption on the command line after SIGKILL, which a process cannot handle."""

    def command(folder):
        options = {"epochs": 1, "n_experiences": 5, "head": "task_adaptive", "output": folder}
        return ["train", *(f"--{name}={value}" for name, value in options.items())]

    folder = tmp_path / "killed"

    def after_task_two():
        # Written atomically after the task's evaluation.
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
