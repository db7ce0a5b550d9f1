"""Unusual and invalid streams, states and files: a clear error, or the right result.

See also: damaged states and states of other layers, arguments or backbones in `checkpoint/`;
checkpoints with missing or extra keys in `models/`; broken images and incomplete data sets in
`scenarios/`.
"""

import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from avalanche.benchmarks import dataset_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive, StreamingLDA
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from treelora_avalanche.checkpoint import load_strategy, save_strategy
from treelora_avalanche.cli import main
from treelora_avalanche.metrics import AccuracyMatrix
from treelora_avalanche.models import vision
from treelora_avalanche.models.features.centroids import Centroids
from treelora_avalanche.models.features.extraction import extract_features
from treelora_avalanche.models.features.gaussians import (
    ClassStatistics,
    Gaussians,
    PseudoFeatures,
    feature_drift,
    train_head,
)
from treelora_avalanche.plugins import TaskAdaptiveHeadPlugin, TrainedHeadPlugin
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.runs import Ingredients, prepare, run
from treelora_avalanche.scenarios import SplitDigits
from treelora_avalanche.strategies import (
    EWCLoRA,
    FrozenGaussian,
    FrozenNCM,
    GEMLoRA,
    HiDePrompt,
    SeqLoRA,
    TreeLoRAStrategy,
)

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified", "ignore:Plugin .*implements")

PATTERNS = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def stream(*tasks, noise=0.5, n_test=8, seed=0):
    """Returns a benchmark; each task is a dict of the number of training images by class."""
    generator = torch.Generator().manual_seed(seed)

    def dataset(counts):
        targets = torch.tensor([label for label, n in counts.items() for _ in range(n)])
        images = PATTERNS[targets] + noise * torch.randn(len(targets), 1, 8, 8, generator=generator)
        return _make_taskaware_tensor_classification_dataset(images, targets, task_labels=0)

    tests = [dict.fromkeys(task, n_test) for task in tasks]
    return dataset_benchmark(list(map(dataset, tasks)), list(map(dataset, tests)))


def naive_with_head(model, **options):
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.001),
        criterion=nn.CrossEntropyLoss(),
        plugins=[TaskAdaptiveHeadPlugin()],
        **options,
    )


def streaming_lda(model, **options):
    n_classes = model.num_classes
    model.reset_classifier(0)
    return StreamingLDA(
        slda_model=model.requires_grad_(False),
        criterion=nn.CrossEntropyLoss(),
        input_size=model.num_features,
        num_classes=n_classes,
        **{**options, "train_epochs": 1},
    )


def frozen(strategy_class):
    def make(model, train_mb_size, train_epochs, **options):
        return strategy_class(model, **options)

    return make


def lora(strategy_class, **fixed):
    def make(model, **options):
        return strategy_class(model, head="task_adaptive", **fixed, **options)

    return make


METHODS = {
    "SeqLoRA": lora(SeqLoRA),
    "TreeLoRA": lora(TreeLoRAStrategy),
    "TreeLoRA-routed": lora(TreeLoRAStrategy, inference="routed"),
    "EWCLoRA": lora(EWCLoRA),
    "GEMLoRA": lora(GEMLoRA, patterns_per_experience=8),
    "Naive with our head": naive_with_head,
    "FrozenNCM": frozen(FrozenNCM),
    "FrozenGaussian": frozen(FrozenGaussian),
    "StreamingLDA": streaming_lda,
}


def build(method, model, *metrics):
    torch.manual_seed(1)
    return METHODS[method](
        model,
        train_mb_size=8,
        train_epochs=2,
        eval_mb_size=16,
        evaluator=EvaluationPlugin(*metrics, loggers=[]),
    )


def train(strategy, benchmark):
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    return strategy


def features_of(model, benchmark):
    parts = [
        extract_features(model, e.dataset, batch_size=64, device="cpu")
        for e in benchmark.train_stream
    ]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


# ----------------------------------------------------------------------- a class in several tasks


def test_class_order_with_a_duplicate_is_refused():
    order = [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    with pytest.raises(ValueError, match=r"`fixed_class_order` .*every label from 0 to 9 once"):
        SplitDigits(5, fixed_class_order=order)


@pytest.mark.parametrize("method", METHODS)
def test_within_task_accuracy_of_a_class_in_two_tasks(tiny_vit, method):
    benchmark = stream({0: 16, 1: 16}, {1: 16, 2: 16}, {0: 16, 3: 16})
    matrix = AccuracyMatrix(within_task=True)
    strategy = train(build(method, tiny_vit(), matrix), benchmark)
    strategy.model.eval()
    for task, experience in enumerate(benchmark.test_stream):
        classes = torch.tensor(sorted(experience.classes_in_this_experience))
        images, targets = (
            torch.stack(list(map(torch.as_tensor, part)))
            for part in zip(
                *((image, target) for image, target, *_ in experience.dataset), strict=True
            )
        )
        with torch.no_grad():
            outputs = strategy.model(images)
            if method == "StreamingLDA":
                outputs = strategy.predict(outputs)
        right = classes[outputs[:, classes].argmax(1)] == targets
        assert matrix.result()[-1, task].item() == pytest.approx(right.double().mean().item())
        assert right.double().mean() > 0.6


@pytest.mark.parametrize("method", ["FrozenNCM", "StreamingLDA"])
def test_class_mean_covers_all_tasks_of_the_class(tiny_vit, method):
    benchmark = stream({0: 16, 1: 3}, {1: 16, 2: 16}, {0: 5, 3: 16})
    features, targets = features_of(tiny_vit(), benchmark)
    strategy = train(build(method, tiny_vit()), benchmark)
    found = strategy.muK if method == "StreamingLDA" else strategy.model.head.weight
    for label in range(4):
        torch.testing.assert_close(found[label], features[targets == label].mean(0))


def test_class_statistics_are_stored_by_task(tiny_vit):
    strategy = train(build("FrozenGaussian", tiny_vit()), stream({0: 9, 1: 9}, {1: 9, 2: 9}))
    head = next(p for p in strategy.plugins if isinstance(p, TaskAdaptiveHeadPlugin))
    assert [(s.label, s.task) for s in head.statistics] == [(0, 0), (1, 0), (1, 1), (2, 1)]


def test_router_has_both_adapters_of_a_class(tiny_vit):
    strategy = train(build("TreeLoRA-routed", tiny_vit()), stream({0: 9, 1: 9}, {1: 9, 2: 9}))
    assert strategy.model.router.adapter.tolist() == [0, 0, 1, 1]


def test_class_in_several_tasks_has_the_weight_of_one():
    """Checks that the boundary between N(-1, 1) and N(1, 1) lies at 0."""
    factor = torch.ones(1, 1)
    once = ClassStatistics(0, 0, torch.tensor([-1.0]), factor)
    often = [ClassStatistics(1, task, torch.tensor([1.0]), factor) for task in range(4)]
    head = nn.Linear(1, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    train_head(
        head,
        PseudoFeatures([once, *often]),
        epochs=300,
        n_per_class=512,
        learning_rate=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    weight, bias = head.weight[1] - head.weight[0], head.bias[1] - head.bias[0]
    # Of N(-1, 1) and N(1, 1), equally frequent: log p(1 | x) / p(0 | x) = 2 x.
    assert weight.item() == pytest.approx(2.0, abs=0.1)
    assert bias.item() == pytest.approx(0.0, abs=0.1)


# ------------------------------------------------------------------ few samples, identical samples


@pytest.mark.parametrize("method", METHODS)
def test_classes_and_tasks_with_a_single_sample(tiny_vit, method):
    benchmark = stream({0: 16, 1: 1}, {2: 1}, {3: 16, 4: 16}, noise=0.2)
    matrix = AccuracyMatrix()
    strategy = train(build(method, tiny_vit(), matrix), benchmark)
    images = torch.stack([image for e in benchmark.test_stream for image, *_ in e.dataset])
    with torch.no_grad():
        outputs = strategy.model.eval()(images)
    seen = outputs if method == "StreamingLDA" else outputs[:, :5]
    assert torch.isfinite(seen).all()
    if method.startswith(("Frozen", "Streaming")):
        assert matrix.result()[-1].min() > 0.6


@pytest.mark.parametrize("method", METHODS)
def test_singular_covariances_of_identical_images(tiny_vit, method):
    benchmark = stream({0: 8, 1: 8}, {2: 8}, {3: 1, 4: 8}, noise=0.0)
    matrix = AccuracyMatrix(), AccuracyMatrix(within_task=True)
    strategy = train(build(method, tiny_vit(), *matrix), benchmark)
    with torch.no_grad():
        outputs = strategy.model.eval()(PATTERNS[:5])
    assert torch.isfinite(outputs if method == "StreamingLDA" else outputs[:, :5]).all()
    if method.startswith(("Frozen", "Streaming")):
        assert torch.equal(matrix[0].result()[-1], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", [Gaussians(), Centroids()])
def test_classes_without_variance_are_drawn_exactly(kind):
    features = torch.randn(2, 4).repeat_interleave(3, dim=0)
    targets = torch.tensor([0, 0, 0, 1, 1, 1])
    source = kind.draws(kind.of(features, targets, task=0))
    drawn, labels = source.draw(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, features[::3][labels])


@given(n=st.integers(1, 40), seed=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_drift_estimated_from_identical_images_is_a_shift(n, seed):
    """Checks the bias: features that differ only by rounding do not determine a linear map."""
    generator = torch.Generator().manual_seed(seed)
    before = 10 * torch.randn(1, 6, generator=generator).expand(n, 6)
    before = before + 1e-6 * torch.randn(n, 6, generator=generator)
    shift = torch.randn(6, generator=generator)
    weight, bias = feature_drift(before, before + shift)
    old = torch.randn(6, generator=generator)
    torch.testing.assert_close(old + old @ weight + bias, old + shift, atol=1e-3, rtol=0)


# ------------------------------------------------------------------- a model of another modality


@pytest.mark.parametrize("strategy_class", [FrozenNCM, FrozenGaussian, HiDePrompt])
def test_image_strategies_refuse_a_language_model(make_language_model, strategy_class):
    model = make_language_model()
    takes = rf"^`model` (?=.*is a LanguageModel)(?=.*{strategy_class.__name__}).*vit_base_patch16"
    with pytest.raises(ValueError, match=takes):
        strategy_class(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------ more classes than the head has

TOO_MANY = r"class 6 of experience 1, but has 6 outputs\. .*num_classes=7"


@pytest.mark.parametrize("method", [method for method in METHODS if method != "StreamingLDA"])
def test_more_classes_than_the_head_has(tiny_vit, method):
    benchmark = stream({0: 8, 1: 8}, {2: 8, 6: 8})
    strategy = build(method, tiny_vit(num_classes=6), AccuracyMatrix())
    strategy.train(benchmark.train_stream[0])
    before = {name: p.detach().clone() for name, p in strategy.model.named_parameters()}
    with pytest.raises(ValueError, match=TOO_MANY):
        strategy.eval(benchmark.test_stream)
    with pytest.raises(ValueError, match=TOO_MANY):
        strategy.train(benchmark.train_stream[1])
    assert all(torch.equal(before[n], p) for n, p in strategy.model.named_parameters())


@pytest.mark.parametrize("method", ["Naive", "StreamingLDA", "LwF"])
def test_run_with_too_few_outputs_does_not_start(tiny_vit, tmp_path, method):
    ingredients = Ingredients(0, stream({0: 8, 1: 8}, {2: 8, 6: 8}), tiny_vit(num_classes=6))
    with pytest.raises(ValueError, match=TOO_MANY):
        run(method, 0, RunSettings(device="cpu"), tmp_path / "run", ingredients=ingredients)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ statistics of another backbone


@pytest.mark.parametrize("method", ["FrozenNCM", "FrozenGaussian", "StreamingLDA"])
def test_state_of_a_frozen_backbone_is_refused_by_another(tiny_vit, tmp_path, method):
    benchmark = stream({0: 8, 1: 8}, {2: 8, 3: 8})
    save_strategy(train(build(method, tiny_vit()), benchmark), tmp_path / "state")
    other = tiny_vit()
    other.blocks[0].mlp.fc1.weight.data.mul_(2)
    strategy = build(method, other)
    with pytest.raises(
        ValueError, match="backbone should be that of the state, but has other weights"
    ):
        load_strategy(strategy, tmp_path / "state")
    same = build(method, tiny_vit())
    nn.init.normal_(getattr(same.model.head, "weight", torch.empty(0)))  # the head is in the state
    load_strategy(same, tmp_path / "state")
    images = torch.stack([image for e in benchmark.test_stream for image, *_ in e.dataset])
    expected = train(build(method, tiny_vit()), benchmark)
    with torch.no_grad():
        outputs = [s.model.eval()(images) for s in (same, expected)]
        if method == "StreamingLDA":
            outputs = [s.predict(x) for s, x in zip((same, expected), outputs, strict=True)]
    assert torch.equal(*outputs)


def test_lda_state_with_other_classes_is_refused(tiny_vit, tmp_path):
    fewer = tiny_vit()
    fewer.num_classes = 5
    save_strategy(build("StreamingLDA", fewer), tmp_path / "state")
    with pytest.raises(ValueError, match=r"muK is \(5, 16\).*and \(6, 16\).*same number"):
        load_strategy(build("StreamingLDA", tiny_vit()), tmp_path / "state")


@pytest.mark.parametrize("kind", [Gaussians(), Centroids()])
def test_statistics_are_refused_with_another_backbone(tiny_vit, kind):
    benchmark = stream({0: 8, 1: 8}, {2: 8, 3: 8})

    def naive(model):
        return Naive(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.001),
            train_mb_size=8,
            evaluator=None,
            plugins=[TrainedHeadPlugin(kind=kind)],
        )

    strategy = naive(tiny_vit())
    strategy.train(benchmark.train_stream[0])
    state = strategy.plugins[0].state_dict()

    wide = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=1, num_heads=2, num_classes=6
    )
    other = naive(wide)
    other.plugins[0].load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"features of the model should have 16 values, .* but have 24"
    ):
        other.train(benchmark.train_stream[1])
    again = naive(tiny_vit())
    again.plugins[0].load_state_dict(state)
    again.train(benchmark.train_stream[1])


@pytest.mark.parametrize("kind", [Gaussians(), Centroids()])
def test_malformed_statistics_are_refused_with_their_keys(kind):
    features, targets = torch.randn(8, 4), torch.tensor([0, 1] * 4)
    plugin = TrainedHeadPlugin(kind=kind)
    plugin.statistics, plugin.n_tasks = kind.of(features, targets, 0), 1
    state = plugin.state_dict()
    other = TrainedHeadPlugin(kind=Centroids() if kind == Gaussians() else Gaussians())
    with pytest.raises(
        ValueError, match=r"lacks the keys .*has the unknown keys.* the `kind` that"
    ):
        other.load_state_dict(state)
    for change, message in (
        ({"n_tasks": 1}, "lacks the keys 'statistics', 'task'"),
        ({**state, "extra": 1}, "has the unknown key 'extra'"),
        ({**state, "statistics": [{"label": 0}]}, "of a class, as Class.* lacks the keys"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(change)
    assert other.statistics == []
    assert other.n_tasks == 0


# ------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Returns a folder with images of several modes in four classes, and weights of a small ViT."""
    root = tmp_path_factory.mktemp("pets")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cat", "dog"):
        (root / "images" / name).mkdir(parents=True)
        for index, mode in enumerate(("RGB", "L", "P", "RGBA")):
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(mode)
            image.save(root / "images" / name / f"{index}.png")
        deep = Image.fromarray(generator.integers(0, 65536, (40, 40), dtype=np.uint16))
        deep.save(root / "images" / name / "deep.png")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32)
    safetensors.torch.save_file(model.state_dict(), root / "weights.safetensors")
    return root


def treelora(pets, tmp_path, **options):
    arguments = {
        "model": "vit_tiny_patch16_224",
        "img_size": 32,
        "checkpoint": pets / "weights.safetensors",
        "scenario": "image_folder",
        "data": pets / "images",
        "n_experiences": 2,
        "epochs": 1,
        "layers": "last:1",
        "device": "cpu",
        "output": tmp_path / "run",
        **options,
    }
    return main(["train", *(f"--{name}={value}" for name, value in arguments.items())])


def test_training_on_images_of_all_modes(pets, tmp_path, capsys):
    assert treelora(pets, tmp_path, head="task_adaptive") == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_arguments_are_checked_before_weights_are_loaded(pets, tmp_path, capsys, monkeypatch):
    """The check leaves the head's random weights as they are."""
    shared = {"model": "vit_tiny_patch16_224", "img_size": 32, "n_experiences": 2, "device": "cpu"}
    given = RunSettings(
        scenario="image_folder",
        data=str(pets / "images"),
        checkpoint=str(pets / "weights.safetensors"),
        classes=["ant", "bee"],
        **shared,
    )
    heads = [prepare(0, given, methods).backbone.head.weight for methods in ((), ["SeqLoRA"])]
    assert torch.equal(*heads)
    monkeypatch.setattr(vision, "_load_checkpoint", lambda *_: pytest.fail("weights were loaded"))
    status = treelora(pets, tmp_path, layers="last:40")
    refused(capsys, status, "at most the model's 12 blocks, but is 'last:40'")


def refused(capsys, status, *words):
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("treelora: error: ")
    assert "\n" not in error
    for word in words:
        assert word in error


def test_mismatched_checkpoint_is_refused_with_its_keys(pets, tmp_path, capsys):
    weights = safetensors.torch.load_file(pets / "weights.safetensors")
    del weights["blocks.3.mlp.fc1.weight"]
    weights["adapter.gate"] = torch.ones(2)
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file(weights, file)
    words = ("missing: blocks.3.mlp.fc1.weight", "unexpected: adapter.gate", "Choose the `name`")
    refused(capsys, treelora(pets, tmp_path, checkpoint=file), *words)
    file.write_bytes((pets / "weights.safetensors").read_bytes()[:100_000])
    refused(capsys, treelora(pets, tmp_path, checkpoint=file), "damaged or incomplete")


def test_hidden_folder_is_no_class_to_exclude(pets, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(pets / "images", images)
    shutil.copytree(images / "ant", images / ".cache")
    refused(
        capsys,
        treelora(pets, tmp_path, data=images, exclude_classes="[.cache]"),
        "should be one of ant, bee, cat, dog, but is '.cache'",
    )
    assert treelora(pets, tmp_path, data=images, exclude_classes="[ant,bee]") == 0


def test_class_with_one_image_and_duplicate_class_are_refused(pets, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(pets / "images", images)
    for file in sorted((images / "bee").iterdir())[1:]:
        file.unlink()
    refused(capsys, treelora(pets, tmp_path, data=images), "'bee' has a single image", "leave the")
    twice = treelora(pets, tmp_path, classes="[ant,ant,bee,cat]")
    refused(capsys, twice, "list of different class names, but is ['ant', 'ant', 'bee', 'cat']")


@pytest.mark.parametrize(
    ("scenario", "there", "words"),
    [
        ("cub200", "CUB_200_2011/images.txt", ("classes.txt", "images/ missing", "Unpack http")),
        ("imagenet_r", "imagenet-r/n01443537/a.png", ("199 missing: n01484850", "Unpack http")),
        (
            "cifar100",
            "cifar-100-python/train",
            ("train is damaged", "meta is missing", "Fetch http"),
        ),
    ],
)
def test_incomplete_data_set_is_refused(pets, tmp_path, capsys, scenario, there, words):
    file = tmp_path / "data" / there
    file.parent.mkdir(parents=True)
    shutil.copy(pets / "images" / "ant" / "0.png", file)
    options = {"scenario": scenario, "data": tmp_path / "data", "download": "false"}
    refused(capsys, treelora(pets, tmp_path, **options), *words)
    assert not (tmp_path / "run").exists()
