"""What every method of `treelora list` must hold, on real images."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from treelora_avalanche.methods import METHODS, find_method
from treelora_avalanche.runs import prepare
from treelora_avalanche.scenarios.vision import _Images
from treelora_avalanche.settings import RunSettings
from treelora_avalanche.strategies.resumable import load_strategy, save_strategy

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

CLASSES = ["airplanes", "Leopards", "Motorbikes", "accordion"]
VISION = [n for n, entry in METHODS.items() if "vision" in entry.models and not entry.joint]
OURS = [name for name in VISION if METHODS[name].kind in ("ours", "frozen")]
TRAINED = [name for name in VISION if not METHODS[name].frozen]
KEEPS_IMAGES = {"Replay", "Cumulative"}


def settings_of(data_root):
    return RunSettings(
        scenario="image_folder",
        data=str(data_root / "caltech101"),
        classes=CLASSES,
        n_experiences=2,
        model="deit_tiny_patch16_224",
        checkpoint=str(data_root / "deit_tiny_patch16_224_in1k" / "model.fp16.safetensors"),
        img_size=64,
        epochs=3,
        batch_size=10,
        layers="first:2",
        rank=4,
        device="cpu",
    )


def build(method, settings, plugins=()):
    """A strategy of the method, as the command line makes it, and its stream."""
    ingredients = prepare(0, settings)
    RNGManager.set_random_seeds(0)
    entry = find_method(method)
    strategy = entry.build(
        ingredients.backbone,
        settings,
        entry.lr or 0.0,
        0,
        {
            "train_mb_size": settings.batch_size,
            "train_epochs": entry.epochs(settings),
            "eval_mb_size": 32,
            "device": torch.device("cpu"),
            "plugins": list(plugins),
            "evaluator": EvaluationPlugin(loggers=[]),
        },
    )
    return strategy, ingredients.benchmark


def logits_of(strategy, images, batch_size):
    strategy.model.eval()
    with torch.no_grad():
        answers = []
        for batch in images.split(batch_size):
            # As strategies with a forward of their own are asked: by the batch and nothing else.
            nothing = torch.zeros(len(batch), dtype=torch.long)
            strategy.mbatch = [batch, nothing, nothing]
            answers.append(strategy.forward())
        return torch.cat(answers)


@dataclass
class Watch(SupervisedPlugin):
    """What an evaluation answers, and whether it was given a task label."""

    outputs: list = field(default_factory=list)
    task_labels: set = field(default_factory=set)

    def after_eval_iteration(self, strategy, *args, **kwargs):
        self.outputs.append(strategy.mb_output.clone())
        self.task_labels |= set(strategy.mb_task_id.tolist())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@dataclass
class Trained:
    """A method after two tasks."""

    strategy: object
    benchmark: object
    watch: Watch
    frozen: dict
    trainable: dict
    images: torch.Tensor
    """ Of both tasks' test sets, the tasks taking turns. """
    folder: object
    """ Where its state was saved. """
    files: list
    """ Of each task, the image files that its training has read. """

    def parameters(self):
        model = getattr(self.strategy.model, "module", self.strategy.model)
        return dict(torch.nn.Module.named_parameters(model))


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """Trains a method when it is first asked for."""
    done = {}
    read = []
    original = _Images.__getitem__

    def recorded(self, index):
        read.append(Path(self.samples[index].path))
        return original(self, index)

    def of(method):
        if method not in done:
            watch = Watch()
            strategy, benchmark = build(method, settings_of(data_root), [watch])
            model = getattr(strategy.model, "module", strategy.model)
            before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
            files = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_Images, "__getitem__", recorded)
                for experience in benchmark.train_stream:
                    read.clear()
                    strategy.train(experience)
                    files.append(set(read))
            tests = [
                torch.stack([image for image, *_ in experience.dataset])
                for experience in benchmark.test_stream
            ]
            n = min(len(test) for test in tests)
            folder = tmp_path_factory.mktemp(method)
            save_strategy(strategy, folder / "state")
            done[method] = Trained(
                strategy,
                benchmark,
                watch,
                {name: value for name, (trains, value) in before.items() if not trains},
                {name: value for name, (trains, value) in before.items() if trains},
                torch.stack([test[:n] for test in tests], 1).flatten(0, 1),
                folder,
                files,
            )
        return done[method]

    return of


@pytest.mark.parametrize("method", VISION)
def test_learns_and_evaluates(trained, method):
    run = trained(method)
    run.watch.outputs.clear()
    run.strategy.eval(run.benchmark.test_stream)
    outputs = torch.cat(run.watch.outputs)
    targets = torch.tensor([t for e in run.benchmark.test_stream for t in e.dataset.targets])
    assert outputs.shape == (len(targets), len(CLASSES))
    # Better than one class for all within the second task, which nothing came after.
    last = torch.tensor(sorted(run.benchmark.test_stream[1].classes_in_this_experience))
    of_last = torch.isin(targets, last)
    answers = last[outputs[of_last][:, last].argmax(1)]
    assert (answers == targets[of_last]).float().mean() > 0.6


@pytest.mark.parametrize("method", VISION)
def test_frozen_weights_stay_bit_for_bit(trained, method):
    run = trained(method)
    now = run.parameters()
    if method in TRAINED and METHODS[method].uses_lora:
        assert len(run.frozen) > 100
    # A classifier set from class statistics is no part of the backbone.
    backbone = [name for name in run.frozen if name in now and not name.startswith("head.")]
    assert all(torch.equal(run.frozen[name], now[name]) for name in backbone)


@pytest.mark.parametrize("method", TRAINED)
def test_trainable_weights_move(trained, method):
    run = trained(method)
    now = run.parameters()
    assert run.trainable
    moved = [name for name, value in run.trainable.items() if not torch.equal(value, now[name])]
    assert len(moved) > 0.4 * len(run.trainable)


@pytest.mark.parametrize("method", VISION)
def test_a_prediction_does_not_depend_on_its_batch(trained, method):
    run = trained(method)
    together = logits_of(run.strategy, run.images, 64)
    alone = logits_of(run.strategy, run.images, 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", VISION)
def test_no_task_label_is_read_at_test_time(trained, method):
    run = trained(method)
    run.watch.outputs.clear()
    run.watch.task_labels.clear()
    run.strategy.eval(run.benchmark.test_stream)
    assert run.watch.task_labels == {0}
    images = torch.stack([x for e in run.benchmark.test_stream for x, *_ in e.dataset])
    # The model alone, told nothing of experiences, answers as it did in the evaluation.
    torch.testing.assert_close(
        logits_of(run.strategy, images, 32), torch.cat(run.watch.outputs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", VISION)
def test_training_reads_the_present_task_alone(trained, method):
    run = trained(method)
    names = run.benchmark.class_names
    for task, files in enumerate(run.files):
        assert files
        assert all(file.parts[-3] == "train" for file in files)
        present = set(run.benchmark.train_stream[task].classes_in_this_experience)
        read = {names.index(file.parent.name) for file in files}
        assert read == present or (task and method in KEEPS_IMAGES)


CHILD = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_contract import Watch, build, logits_of, settings_of
from treelora_avalanche.strategies.resumable import load_strategy
images = torch.load(sys.argv[3], weights_only=True)
for method, folder in json.loads(sys.argv[4]).items():
    strategy, benchmark = build(method, settings_of(Path(sys.argv[2])), [Watch()])
    load_strategy(strategy, folder, past=benchmark.train_stream)
    torch.save(logits_of(strategy, images, 64), f"{folder}.logits")
"""


@pytest.fixture(scope="module")
def reloaded(trained, data_root, tmp_path_factory):
    """Logits of every method, loaded in a new process."""
    folder = tmp_path_factory.mktemp("reloaded")
    runs = {method: trained(method) for method in VISION}
    states = {method: str(run.folder / "state") for method, run in runs.items()}
    torch.save(next(iter(runs.values())).images, folder / "images")
    here = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, "-c", CHILD, here, data_root, folder / "images", json.dumps(states)],
        check=True,
    )
    return {m: torch.load(f"{state}.logits", weights_only=True) for m, state in states.items()}


@pytest.mark.parametrize("method", VISION)
def test_loads_in_a_new_process(trained, reloaded, method):
    run = trained(method)
    expected = logits_of(run.strategy, run.images, 64)
    assert torch.equal(reloaded[method], expected)


def test_another_methods_state_is_refused(trained, data_root):
    strategy, _ = build("SeqLoRA", settings_of(data_root), [Watch()])
    for method in OURS:
        if method != "SeqLoRA":
            with pytest.raises(ValueError, match=type(trained(method).strategy).__name__):
                load_strategy(strategy, trained(method).folder / "state")
