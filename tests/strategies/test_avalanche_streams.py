"""Every strategy on images trains and evaluates on every benchmark that Avalanche generates."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    benchmark_with_validation_stream,
    class_incremental_benchmark,
    data_incremental_benchmark,
    dataset_benchmark,
    nc_benchmark,
    new_instances_benchmark,
    ni_benchmark,
    paths_benchmark,
    split_continuous_linear_decay_stream,
    split_online_stream,
    task_incremental_benchmark,
    tensors_benchmark,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.scenarios.deprecated.generic_benchmark_creation import (
    LazyStreamDefinition,
    create_lazy_generic_benchmark,
)
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from avalanche.benchmarks.utils import _make_taskaware_classification_dataset as task_aware
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose, Grayscale, ToTensor
from torchvision.transforms.functional import to_pil_image

from treelora_avalanche import strategies
from treelora_avalanche.metrics import EpochAccuracy, EpochLoss, continual_metrics
from treelora_avalanche.testing import tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore")

N_CLASSES = 6
PATTERNS = torch.randn(N_CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Images(Dataset[tuple[Tensor, int]]):
    """Noisy patterns of some classes, four images each."""

    def __init__(self, *classes: int):
        targets = torch.tensor(classes).repeat_interleave(4)
        self.images = PATTERNS[targets] + 0.1 * torch.randn(len(targets), 1, 8, 8)
        self.targets: list[int] = targets.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


class WithoutTargets(Images):
    """The same; the classes are in the samples alone."""

    def __init__(self, *classes: int):
        super().__init__(*classes)
        self._targets = self.__dict__.pop("targets")

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self._targets[index]


ALL = tuple(range(N_CLASSES))
TASKS = [(0, 1), (2, 3), (4, 5)]


def classification(*classes: int) -> Any:
    return as_classification_dataset(Images(*classes))


def from_datasets(make: Callable[..., Any] = classification, tasks: Any = TASKS) -> Any:
    return benchmark_from_datasets(
        train=[make(*classes) for classes in tasks], test=[make(*classes) for classes in tasks]
    )


def new_classes(**options: Any) -> Any:
    return nc_benchmark(Images(*ALL), Images(*ALL), 3, task_labels=False, **options)


def tensors(*classes: int) -> tuple[Tensor, Tensor]:
    images = Images(*classes)
    return images.images, torch.tensor(images.targets)


def lazy() -> Any:
    """Datasets that are made on the way."""

    def stream() -> Any:
        return LazyStreamDefinition(
            (task_aware(Images(*c), task_labels=0) for c in TASKS), 3, [0] * 3
        )

    return create_lazy_generic_benchmark(stream(), stream())


FOLDER = tempfile.TemporaryDirectory()


def files() -> Any:
    for number, image in enumerate(Images(*ALL).images):
        to_pil_image(image.sigmoid()).save(Path(FOLDER.name) / f"{number}.png")
    tasks = [
        [(f"{FOLDER.name}/{4 * c + n}.png", c) for c in classes for n in range(4)]
        for classes in TASKS
    ]
    read = Compose([Grayscale(), ToTensor()])
    return paths_benchmark(
        tasks, tasks, task_labels=[0] * 3, train_transform=read, eval_transform=read
    )


def online(split: Callable[..., Any] = split_online_stream, **options: Any) -> Any:
    benchmark = from_datasets(tasks=TASKS[:2])
    benchmark.train_stream = split(benchmark.train_stream, **options)
    return benchmark


GENERATORS: dict[str, Callable[[], Any]] = {
    "benchmark_from_datasets": from_datasets,
    "benchmark_from_datasets, no targets": lambda: from_datasets(
        lambda *classes: AvalancheDataset([WithoutTargets(*classes)])
    ),
    "with_classes_timeline": lambda: with_classes_timeline(from_datasets()),
    "with_task_labels": lambda: with_task_labels(
        from_datasets(lambda *classes: task_aware(Images(*classes), task_labels=0))
    ),
    "task_incremental_benchmark": lambda: task_incremental_benchmark(from_datasets()),
    "class repetition": lambda: from_datasets(tasks=[(0, 1), (1, 2), (0, 2)]),
    "new_instances_benchmark": lambda: new_instances_benchmark(
        classification(*ALL), classification(*ALL), 3
    ),
    "ni_benchmark": lambda: ni_benchmark(Images(*ALL), Images(*ALL), 3),
    "nc_benchmark": new_classes,
    "nc_benchmark, class ids from zero": partial(
        nc_benchmark,
        Images(*ALL),
        Images(*ALL),
        3,
        task_labels=True,
        class_ids_from_zero_in_each_exp=True,
    ),
    "class_incremental_benchmark": lambda: class_incremental_benchmark(
        {"train": classification(*ALL), "test": classification(*ALL)}, num_experiences=3
    ),
    "dataset_benchmark": lambda: dataset_benchmark(
        [Images(*c) for c in TASKS], [Images(*c) for c in TASKS]
    ),
    "create_lazy_generic_benchmark": lazy,
    "paths_benchmark": files,
    "tensors_benchmark": lambda: tensors_benchmark(
        [tensors(*c) for c in TASKS], [tensors(*c) for c in TASKS], task_labels=[0, 0, 0]
    ),
    "data_incremental_benchmark": lambda: data_incremental_benchmark(new_classes(), 4),
    "benchmark_with_validation_stream": lambda: benchmark_with_validation_stream(
        from_datasets(), shuffle=True
    ),
    "split_online_stream": partial(online, experience_size=6),
    "split_online_stream, boundaries": lambda: online(
        experience_size=4, access_task_boundaries=True
    ),
    "split_continuous_linear_decay_stream": partial(
        online,
        split_continuous_linear_decay_stream,
        experience_size=4,
        iters_per_virtual_epoch=2,
        beta=4,
        shuffle=True,
    ),
}


def naive(model: Any, **options: Any) -> Naive:
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        criterion=torch.nn.CrossEntropyLoss(),
        **options,
    )


def untrained(strategy: Callable[..., Any]) -> Callable[..., Any]:
    def make(model: Any, *, train_mb_size: int, train_epochs: int, **options: Any) -> Any:
        return strategy(model, **options)

    return make


TREE = strategies.TreeLoRAStrategy
STRATEGIES: dict[str, Callable[..., Any]] = {
    "Naive": naive,  # shows that the generator works
    "DualPrompt": partial(strategies.DualPrompt, general_layers=[0], expert_layers=[1]),
    "EWCLoRA": strategies.EWCLoRA,
    "FrozenGaussian": untrained(strategies.FrozenGaussian),
    "FrozenNCM": untrained(strategies.FrozenNCM),
    "FrozenRanPAC": partial(untrained(strategies.FrozenRanPAC), n_projections=32),
    "GEMLoRA": strategies.GEMLoRA,
    "HiDeLoRA": strategies.HiDeLoRA,
    "HiDePrompt": partial(strategies.HiDePrompt, prompt_layers=[0, 1]),
    "InfLoRA": strategies.InfLoRA,
    "L2Anchor": strategies.L2Anchor,
    "L2P": strategies.L2P,
    "OGD": strategies.OGD,
    "OLoRA": strategies.OLoRA,
    "OSF": strategies.OSF,
    "SDLoRA": strategies.SDLoRA,
    "RanPAC": partial(strategies.RanPAC, n_projections=32),
    "SeqLoRA": strategies.SeqLoRA,
    "SLCA": strategies.SLCA,
    "TreeLoRAStrategy": TREE,
    "TreeLoRAStrategy, merged": partial(TREE, head="task_adaptive", layers="last:1"),
    "TreeLoRAStrategy, routed": partial(TREE, head="task_adaptive", inference="routed"),
}
ON_TEXT = {"InContext", "OnPolicyReplay", "SAPT", "TaSL"}


def test_every_strategy_is_here():
    assert {name.split(",")[0] for name in STRATEGIES} - {"Naive"} | ON_TEXT == set(
        strategies.__all__
    )


@pytest.mark.parametrize("name", sorted(ON_TEXT))
def test_strategies_on_text_refuse_images(name):
    with pytest.raises(ValueError, match=r"`model` should be a .*LanguageModel"):
        getattr(strategies, name)(tiny_vit())


@pytest.mark.parametrize("strategy_name", STRATEGIES)
@pytest.mark.parametrize("generator", GENERATORS)
def test_trains_and_evaluates(generator, strategy_name):
    torch.manual_seed(0)
    benchmark = GENERATORS[generator]()
    evaluator = EvaluationPlugin(*continual_metrics(), EpochLoss(), EpochAccuracy(), loggers=[])
    strategy = STRATEGIES[strategy_name](
        tiny_vit(depth=2), train_mb_size=4, train_epochs=1, eval_mb_size=8, evaluator=evaluator
    )
    before = [p.detach().clone() for p in strategy.model.parameters()]
    n_trained = 0
    for experience in benchmark.train_stream:
        strategy.train(experience)
        results = strategy.eval(benchmark.test_stream)
        n_trained += 1
    assert n_trained > 1
    after = list(strategy.model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    accuracies = [value for name, value in results.items() if name.startswith("AccuracyMatrix")]
    assert len(accuracies) == 2 * len(list(benchmark.test_stream))
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    if "valid" in benchmark.streams:
        strategy.eval(benchmark.streams["valid"])
