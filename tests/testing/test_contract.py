"""What every method of `treelora list` must hold, on real images and on real texts."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from treelora_avalanche.checkpoint import load_strategy, save_strategy
from treelora_avalanche.metrics.generation import find_text_generator
from treelora_avalanche.models import TokenCrossEntropy
from treelora_avalanche.registry.methods import LANGUAGE, METHODS, VISION, find_method
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs import prepare, stored_bytes
from treelora_avalanche.runs.config import resolve_config
from treelora_avalanche.scenarios.data.images import ResizedImages
from treelora_avalanche.scenarios.data.text_benchmark import TokenSequences

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

CLASSES = ["airplanes", "Leopards", "Motorbikes", "accordion"]
TASKS = ["NumGLUE-cm", "FOMC"]
N_TEXTS = 8
NEW_TOKENS = 6
RANK = 4


def image_settings(data_root):
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
        rank=RANK,
        device="cpu",
    )


def text_settings(data_root):
    return RunSettings(
        scenario="trace",
        data=str(data_root / "TRACE-Benchmark"),
        tasks=TASKS,
        limit=N_TEXTS,
        model=str(data_root / "stories260K"),
        max_length=96,
        epochs=3,
        lr=0.005,
        rank=RANK,
        device="cpu",
    )


@dataclass(frozen=True)
class Kind:
    """A kind of models, and the stream that stands for it."""

    settings: Callable
    samples: type
    """ The data set at the bottom, which reads the samples. """
    name_of: Callable
    """ What a sample is known by. """


KINDS = {
    VISION: Kind(image_settings, ResizedImages, lambda sample: sample.path),
    LANGUAGE: Kind(text_settings, TokenSequences, lambda sample: tuple(sample[0].tolist())),
}
CASES = [
    (kind, name)
    for kind in KINDS
    for name, entry in METHODS.items()
    if kind in entry.models and not entry.joint
]
TRAINED = [(kind, name) for kind, name in CASES if not METHODS[name].frozen]
TEXTS = [(kind, name) for kind, name in CASES if kind == LANGUAGE]
KEEPS_SAMPLES = {"Replay", "Cumulative"}
READS_NO_TOKENS = {"InContext"}
TREE = {"TreeLoRA", "TreeLoRA-last", "TreeLoRA-routed"}
PENALISED = {*TREE, "EWCLoRA", "OLoRA", "SAPT", "L2Anchor", "LwF"}


# The sizes of stories260K, and of an adapter on its queries and values, in bytes.
WIDTH, KEYS, N_BLOCKS = 64, 32, 5
ADAPTER = 4 * N_BLOCKS * RANK * (2 * WIDTH + WIDTH + KEYS)
STORED_PER_TASK = {
    # The adapter, its layers made equally large; a signature of 256 numbers per layer; the sums of
    # two nodes of the tree, in double precision; and from the second task on the layers' picks.
    "TreeLoRA": 4 * 2 * N_BLOCKS * (RANK * 2 * WIDTH + 256) + 8 * (2 * 256 + 2 * N_BLOCKS),
    "SeqLoRA": 0,
    "EWCLoRA": 0,
    "OGD": N_TEXTS * ADAPTER,
    "OLoRA": ADAPTER,
    "L2P": 0,
    "DualPrompt": 4 * (3 * 2 * 20 * KEYS + WIDTH),
    # On keys and values; and a centroid for each of so few texts.
    "HiDeLoRA": 4 * (N_BLOCKS * RANK * 2 * (WIDTH + KEYS) + N_TEXTS * (2 * WIDTH + 1)),
    "SAPT": ADAPTER + 4 * WIDTH,
    "TaSL": 0,
    "L2Anchor": 0,
    "Naive": 0,
    "LwF": 0,
    "InContext": 4 * WIDTH,
}


def lacking(kind, data_root):
    """What a kind needs and is not there, in words; nothing if all is there."""
    settings = KINDS[kind].settings(data_root)
    paths = [settings.data, settings.checkpoint or settings.model]
    return ", ".join(path for path in paths if not Path(path).exists())


def build(method, settings, plugins=()):
    """A strategy of the method, as the command line makes it, and its stream."""
    ingredients = prepare(0, settings)
    RNGManager.set_random_seeds(0)
    entry = find_method(method)
    strategy = entry.build(
        ingredients.backbone,
        settings,
        resolve_config(method, 0, settings).get("lr") or 0.0,
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


def ask(strategy, inputs, targets):
    """The answer to a batch, of which the targets say where an answer stands, and not which."""
    unlabelled = targets.clamp(max=0)
    strategy.mbatch = [inputs, unlabelled, torch.zeros(len(inputs), dtype=torch.long)]
    strategy.model.eval()
    with torch.no_grad():
        return strategy.forward()


def logits_of(strategy, inputs, targets, batch_size):
    """Logits of images, a row each; of texts, a row for each of their tokens."""
    answers = []
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits = ask(strategy, x, y)
        if logits.ndim == 3:
            logits = logits.transpose(1, 2)[x[:, : logits.shape[2]] >= 0]
        answers.append(logits)
    return torch.cat(answers)


def texts_of(strategy, prompts, batch_size):
    """What is generated; nothing where there are no prompts."""
    if not prompts:
        return []
    return find_text_generator(strategy.model).generate(prompts, NEW_TOKENS, batch_size)


@dataclass
class Watch(SupervisedPlugin):
    """What an evaluation is asked and answers, and the losses before penalties are added."""

    batches: list = field(default_factory=list)
    task_labels: set = field(default_factory=set)
    loss: object = None

    def before_backward(self, strategy, *args, **kwargs):
        self.loss = strategy.loss.clone()

    def after_training_exp(self, strategy, *args, **kwargs):
        self.loss = None

    def after_eval_iteration(self, strategy, *args, **kwargs):
        self.batches.append((strategy.mb_x, strategy.mb_y, strategy.mb_output.clone()))
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
    inputs: torch.Tensor
    """ Of both tasks' test sets, the tasks taking turns. """
    targets: torch.Tensor
    prompts: list
    """ Of the same test sets; empty for images. """
    folder: object
    """ Where its state was saved. """
    samples: list
    """ Of each task, the names of its training samples. """
    read: list
    """ Of each task, the names of the samples that its training has read. """
    penalties: list
    """ Of each task, for every step, what is added to the loss, and its largest gradient. """
    stored: list
    """ Bytes that were stored after each task. """
    loss_before: object
    """ Of the last task's training texts, before any training. """

    def parameters(self):
        model = getattr(self.strategy.model, "module", self.strategy.model)
        return dict(torch.nn.Module.named_parameters(model))


def tensors_of(dataset):
    """All inputs and all targets of a data set."""
    inputs, targets, *_ = zip(*dataset, strict=True)
    return torch.stack(inputs), torch.stack(list(map(torch.as_tensor, targets)))


def loss_of(strategy, dataset):
    """The mean loss of texts."""
    inputs, targets = tensors_of(dataset)
    strategy.model.eval()
    with torch.no_grad():
        return TokenCrossEntropy()(strategy.model(inputs), targets).item()


def measure_penalties(strategy, watch, found):
    """Before every backward pass, compare the loss with what it was before the method's plugins."""
    backward = type(strategy).backward

    def measured():
        penalty = strategy.loss - watch.loss
        gradients = torch.autograd.grad(
            penalty, list(strategy.model.parameters()), retain_graph=True, allow_unused=True
        )
        largest = max((g.abs().max().item() for g in gradients if g is not None), default=0.0)
        found.append((penalty.item(), largest))
        backward(strategy)

    strategy.backward = measured


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """Trains a method when it is first asked for."""
    done = {}
    names = []

    def of(kind, method):
        if (kind, method) not in done:
            if lacking(kind, data_root):
                pytest.skip(f"no data: {lacking(kind, data_root)} is not there")
            samples_class, name_of = KINDS[kind].samples, KINDS[kind].name_of
            original = samples_class.__getitem__

            def recorded(self, index):
                names.append(name_of(self.samples[index]))
                return original(self, index)

            watch = Watch()
            strategy, benchmark = build(method, KINDS[kind].settings(data_root), [watch])
            model = getattr(strategy.model, "module", strategy.model)
            before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
            last = benchmark.train_stream[1].dataset
            loss_before = loss_of(strategy, last) if kind == LANGUAGE else None
            samples, read, penalties, stored = [], [], [], []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(samples_class, "__getitem__", recorded)
                for experience in benchmark.train_stream:
                    names.clear()
                    tensors_of(experience.dataset)
                    samples.append(set(names))
                    names.clear()
                    penalties.append([])
                    if method in PENALISED:
                        measure_penalties(strategy, watch, penalties[-1])
                    strategy.train(experience)
                    read.append(set(names))
                    stored.append(stored_bytes(strategy))
            vars(strategy).pop("backward", None)
            tests = [tensors_of(experience.dataset) for experience in benchmark.test_stream]
            n = min(len(inputs) for inputs, _ in tests)
            asked = [
                torch.stack([part[:n] for part in parts], 1).flatten(0, 1)
                for parts in zip(*tests, strict=True)
            ]
            folder = tmp_path_factory.mktemp(method)
            save_strategy(strategy, folder / "state")
            done[kind, method] = Trained(
                strategy,
                benchmark,
                watch,
                {name: value for name, (trains, value) in before.items() if not trains},
                {name: value for name, (trains, value) in before.items() if trains},
                *asked,
                [prompt for e in benchmark.test_stream for prompt in getattr(e, "prompts", [])[:4]],
                folder,
                samples,
                read,
                penalties,
                stored,
                loss_before,
            )
        return done[kind, method]

    return of


@pytest.mark.parametrize("method", [name for kind, name in CASES if kind == VISION])
def test_learns_images_and_evaluates(trained, method):
    run = trained(VISION, method)
    run.watch.batches.clear()
    run.strategy.eval(run.benchmark.test_stream)
    outputs = torch.cat([output for *_, output in run.watch.batches])
    targets = torch.tensor([t for e in run.benchmark.test_stream for t in e.dataset.targets])
    assert outputs.shape == (len(targets), len(CLASSES))
    # Better than one class for all within the second task, which nothing came after.
    last = torch.tensor(sorted(run.benchmark.test_stream[1].classes_in_this_experience))
    of_last = torch.isin(targets, last)
    answers = last[outputs[of_last][:, last].argmax(1)]
    assert (answers == targets[of_last]).float().mean() > 0.6


@pytest.mark.parametrize("method", [name for kind, name in TRAINED if kind == LANGUAGE])
def test_learns_texts(trained, method):
    run = trained(LANGUAGE, method)
    assert loss_of(run.strategy, run.benchmark.train_stream[1].dataset) < run.loss_before


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_frozen_weights_stay_bit_for_bit(trained, kind, method):
    run = trained(kind, method)
    now = run.parameters()
    if METHODS[method].uses_lora:
        assert len(run.frozen) > 40
    # A classifier set from class statistics is no part of the backbone.
    backbone = [name for name in run.frozen if name in now and not name.startswith("head.")]
    assert all(torch.equal(run.frozen[name], now[name]) for name in backbone)


@pytest.mark.parametrize(("kind", "method"), TRAINED)
def test_trainable_weights_move(trained, kind, method):
    run = trained(kind, method)
    now = run.parameters()
    assert run.trainable
    moved = [name for name, value in run.trainable.items() if not torch.equal(value, now[name])]
    assert len(moved) > 0.4 * len(run.trainable)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_prediction_does_not_depend_on_its_batch(trained, kind, method):
    run = trained(kind, method)
    together = logits_of(run.strategy, run.inputs, run.targets, 64)
    alone = logits_of(run.strategy, run.inputs, run.targets, 1)
    # The unit is the largest logit: those near zero are differences of numbers of that size.
    unit = together.abs().max()
    torch.testing.assert_close(together / unit, alone / unit, rtol=0, atol=1e-5)
    assert texts_of(run.strategy, run.prompts, 8) == texts_of(run.strategy, run.prompts, 1)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_no_task_label_is_read_at_test_time(trained, kind, method):
    run = trained(kind, method)
    run.watch.batches.clear()
    run.watch.task_labels.clear()
    run.strategy.eval(run.benchmark.test_stream)
    assert run.watch.task_labels == {0}
    assert sum(len(x) for x, *_ in run.watch.batches) == sum(
        len(experience.dataset) for experience in run.benchmark.test_stream
    )
    # The model alone, told nothing of experiences, answers as it did in the evaluation.
    for x, y, output in run.watch.batches:
        torch.testing.assert_close(ask(run.strategy, x, y), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_training_reads_the_present_task_alone(trained, kind, method):
    run = trained(kind, method)
    past = set()
    for samples, read in zip(run.samples, run.read, strict=True):
        assert samples <= read or method in READS_NO_TOKENS
        assert read <= (samples | past if method in KEEPS_SAMPLES else samples)
        past |= samples


CHILD = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_contract import KINDS, Watch, build, logits_of, texts_of
from treelora_avalanche.checkpoint import load_strategy
for kind, method, folder, prompts in json.loads(sys.argv[3]):
    inputs, targets = torch.load(f"{folder}.asked", weights_only=True)
    strategy, benchmark = build(method, KINDS[kind].settings(Path(sys.argv[2])), [Watch()])
    load_strategy(strategy, folder, past=benchmark.train_stream)
    answers = logits_of(strategy, inputs, targets, 64), texts_of(strategy, prompts, 8)
    torch.save(answers, f"{folder}.answers")
"""


@pytest.fixture(scope="module")
def reloaded(trained, data_root):
    """Answers of every method, loaded in a new process."""
    runs = {case: trained(*case) for case in CASES if not lacking(case[0], data_root)}
    orders = []
    for case, run in runs.items():
        state = run.folder / "state"
        torch.save((run.inputs, run.targets), f"{state}.asked")
        orders.append([*case, str(state), run.prompts])
    here = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, "-c", CHILD, here, data_root, json.dumps(orders)],
        check=True,
    )
    return {
        case: torch.load(f"{run.folder / 'state'}.answers", weights_only=True)
        for case, run in runs.items()
    }


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_loads_in_a_new_process(trained, reloaded, kind, method):
    run = trained(kind, method)
    logits, texts = reloaded[kind, method]
    assert torch.equal(logits, logits_of(run.strategy, run.inputs, run.targets, 64))
    assert texts == texts_of(run.strategy, run.prompts, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_another_methods_state_is_refused(trained, data_root, kind):
    others = [name for of_kind, name in CASES if of_kind == kind and name != "SeqLoRA"]
    folders = {name: trained(kind, name).folder / "state" for name in others}
    strategy, _ = build("SeqLoRA", KINDS[kind].settings(data_root), [Watch()])
    for name, folder in folders.items():
        with pytest.raises(ValueError, match=type(trained(kind, name).strategy).__name__):
            load_strategy(strategy, folder)


@pytest.mark.parametrize(("kind", "method"), [case for case in CASES if case[1] in PENALISED])
def test_a_penalty_acts_from_the_second_task_on(trained, kind, method):
    run = trained(kind, method)
    first, second = run.penalties
    assert all(value == 0 for value, _ in first)
    if method in TREE:  # its pull is a step of its own
        steps, values = run.strategy.evaluator.get_all_metrics()[
            "SparsePenalty/train_phase/train_stream"
        ]
        assert min(steps) > len(first)
        assert min(values) > 0
        return
    # At the first step some are where they are pulled to.
    assert all(value > 0 and gradient > 0 for value, gradient in second[1:])


@pytest.mark.parametrize("method", STORED_PER_TASK)
def test_memory_grows_as_the_method_says(trained, method):
    first, second = trained(LANGUAGE, method).stored
    assert second - first == STORED_PER_TASK[method]


def test_memory_of_inf_lora_is_bounded(trained):
    subspaces = 4 * 2 * N_BLOCKS * WIDTH**2 // 2
    first, second = trained(LANGUAGE, "InfLoRA").stored
    assert 0 < first <= subspaces
    assert ADAPTER < second <= ADAPTER + subspaces
