"""Cached frozen-block activations: the weights are those without the cache."""

import gc
import logging
import tempfile
import weakref
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
from avalanche.training.plugins import EvaluationPlugin
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from support import weights
from treelora_avalanche.metrics import AccuracyMatrix
from treelora_avalanche.plugins import ActivationCachePlugin
from treelora_avalanche.strategies import (
    OGD,
    EWCLoRA,
    GEMLoRA,
    InfLoRA,
    OLoRA,
    SeqLoRA,
    TreeLoRAStrategy,
)

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

STRATEGIES = {
    "SeqLoRA": SeqLoRA,
    "TreeLoRA": TreeLoRAStrategy,
    "TreeLoRA with a head": partial(TreeLoRAStrategy, head="task_adaptive"),
    "TreeLoRA routed": partial(TreeLoRAStrategy, head="task_adaptive", inference="routed"),
    "EWC": EWCLoRA,
    "GEM": GEMLoRA,
    "OGD": OGD,
    "O-LoRA": OLoRA,
    "InfLoRA": InfLoRA,
}


def make(kind, model, **kwargs):
    torch.manual_seed(1)
    defaults = {
        "layers": "last:2",
        "rank": 2,
        "train_mb_size": 5,
        "train_epochs": 3,
        "eval_mb_size": 7,
        "evaluator": EvaluationPlugin(loggers=[]),
    }
    strategy = STRATEGIES[kind](model, **{**defaults, **kwargs})
    torch.manual_seed(2)
    return strategy


def all_equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


class Count:
    """Counts the samples that pass through the first block, and the first adapted one."""

    def __init__(self, strategy):
        self.first = self.adapted = 0
        blocks = strategy.model.transformer.blocks
        blocks[0].register_forward_hook(self._first)
        blocks[strategy.model.n_frozen].register_forward_hook(self._adapted)

    def _first(self, module, inputs, output):
        self.first += len(output)

    def _adapted(self, module, inputs, output):
        self.adapted += len(output)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_weights_are_the_same_bit_for_bit(kind, tiny_vit, tiny_benchmark):
    accuracies, results = [], []
    for cache in (None, "auto"):
        matrix = AccuracyMatrix()
        strategy = make(
            kind, tiny_vit(), cache=cache, evaluator=EvaluationPlugin(matrix, loggers=[])
        )
        count = Count(strategy)
        for experience in tiny_benchmark.train_stream:
            strategy.train(experience)
            strategy.eval(tiny_benchmark.test_stream)
        results.append(weights(strategy))
        accuracies.append(matrix.result())
        if cache is not None:
            # Every sample once; a first one, to know the shape; for dropout, two twice; and two
            # before the first task, to see that gradients reach the adapters.
            assert count.first == 3 * (32 + 1 + 4) + 3 * (16 + 1) + 2
            assert count.adapted >= 3 * (3 * 32 + 3 * 16)
    assert all_equal(*results)
    assert torch.equal(*accuracies)


def test_frozen_blocks_compute_a_sample_once_a_task_and_a_test_set_once_a_stream(
    tiny_vit, tiny_benchmark
):
    strategy = make("SeqLoRA", tiny_vit())
    count = Count(strategy)
    strategy.train(tiny_benchmark.train_stream[0])
    n = len(tiny_benchmark.train_stream[0].dataset)
    assert count.adapted == 3 * n + 2
    assert count.first == n + 1 + 2 * 2 + 2
    for repetition in range(3):
        count.first = count.adapted = 0
        strategy.eval(tiny_benchmark.test_stream)
        n = sum(len(e.dataset) for e in tiny_benchmark.test_stream)
        assert count.adapted == n
        assert count.first == (0 if repetition else n + 3)


def test_in_files_where_memory_is_short(tiny_vit, tiny_benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = []
    from_file = torch.from_file

    def recorded(name, **kwargs):
        mapped.append(Path(name).parent)
        return from_file(name, **kwargs)

    monkeypatch.setattr(torch, "from_file", recorded)
    results = []
    one = 32 * 5 * 16 * 4  # an experience to train on, or two to evaluate
    for cache, expected in (("auto", 0), (0, 6), (one, 6 + 1)):
        strategy = make("TreeLoRA", tiny_vit(), cache=cache)
        strategy.train(tiny_benchmark.train_stream)
        strategy.eval(tiny_benchmark.test_stream)
        results.append(weights(strategy))
        assert len(mapped) == expected
    assert all_equal(results[0], results[1])
    assert all_equal(results[0], results[2])
    assert set(mapped) == {tmp_path}
    assert not list(tmp_path.iterdir())


def test_nothing_is_cached_where_there_is_no_room(tiny_vit, tiny_benchmark, monkeypatch, caplog):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    strategy = make("SeqLoRA", tiny_vit(), cache=0)
    with caplog.at_level(logging.INFO):
        strategy.train(tiny_benchmark.train_stream)
    assert [r.message for r in caplog.records if "not cached" in r.message] == [
        "the output of the frozen blocks is not cached: 10,240 bytes fit neither in "
        "memory nor on disk"
    ]


class Jitter:
    """Random augmentation."""

    def __call__(self, image):
        return image + torch.randn(())


def off(strategy, stream, caplog):
    """Returns the logged reasons after training on a stream."""
    count = Count(strategy)
    with caplog.at_level(logging.INFO):
        strategy.train(stream)
    assert count.first >= count.adapted
    lines = [r.getMessage() for r in caplog.records if "not cached" in r.getMessage()]
    caplog.clear()
    return lines


def benchmark_with(train_transform, eval_transform=None):
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = _make_taskaware_tensor_classification_dataset(
        images, torch.arange(24) % 6, task_labels=0
    )
    return nc_benchmark(
        data,
        data,
        n_experiences=3,
        task_labels=False,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def test_random_augmentation_switches_it_off_and_is_undisturbed(tiny_vit, caplog):
    results = []
    for cache in (None, "auto"):
        strategy = make("TreeLoRA", tiny_vit(), cache=cache)
        lines = off(strategy, benchmark_with(Jitter()).train_stream, caplog)
        assert len(lines) == (0 if cache is None else 1)
        results.append(weights(strategy))
    assert "a sample read again differs (random augmentation" in lines[0]
    assert all_equal(*results)  # the probe has drawn no random numbers


def test_activations_of_evaluation_are_not_trained_on_where_images_are_augmented(tiny_vit, caplog):
    results = []
    stream = benchmark_with(Jitter()).train_stream
    for cache in (None, "auto"):
        strategy = make("SeqLoRA", tiny_vit(), cache=cache)
        count = Count(strategy)
        strategy.eval(stream)
        strategy.eval(stream)  # images are not augmented here
        assert count.first == (48 if cache is None else 24 + 3)
        off(strategy, stream, caplog)
        results.append(weights(strategy))
    assert all_equal(*results)


def test_a_training_transform_of_its_own_switches_it_off(tiny_vit, caplog):
    def brighter(image):
        return image + 1

    strategy = make("SeqLoRA", tiny_vit())
    lines = off(strategy, benchmark_with(brighter, None).train_stream, caplog)
    assert len(lines) == 1
    assert "two transforms" in lines[0]


def test_dropout_in_the_frozen_blocks_switches_it_off(caplog, tiny_benchmark):
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2, num_classes=6,
        pos_drop_rate=0.5,
    )  # fmt: skip
    lines = off(make("SeqLoRA", model), tiny_benchmark.train_stream, caplog)
    assert len(lines) == 1
    assert "random (dropout)" in lines[0]


def test_adapted_first_layers_leave_nothing_to_cache_and_the_log_says_so(
    tiny_vit, tiny_benchmark, caplog
):
    strategy = make("SeqLoRA", tiny_vit(), layers="first:2")
    lines = off(strategy, tiny_benchmark.train_stream, caplog)
    assert len(lines) == 1
    assert "no block is frozen below the adapter (choose layers='last:k')" in lines[0]


def test_a_model_of_another_kind_is_trained_as_before(tiny_benchmark, caplog):
    parts = {"flat": nn.Flatten(), "blocks": nn.Sequential(nn.Linear(64, 8)), "fc": nn.Linear(8, 6)}
    model = nn.Sequential(OrderedDict(parts))
    strategy = SeqLoRA(
        model, layers="all", target_modules=["0"], train_mb_size=8, train_epochs=1, evaluator=None
    )
    with caplog.at_level(logging.INFO):
        strategy.train(tiny_benchmark.train_stream)
    assert "cannot be split at a block" in caplog.text


def test_the_benchmark_keeps_its_images_and_memory_is_freed(tiny_vit, tiny_benchmark):
    strategy = make("SeqLoRA", tiny_vit())
    kept = []

    class Watch(ActivationCachePlugin):
        def before_training_exp(self, strategy, **kwargs):
            x, y, *_ = strategy.experience.dataset[3]
            assert x.shape == (5, 16)  # four patches and the class token
            assert y == tiny_benchmark.train_stream[0].dataset[3][1]
            kept.append(weakref.ref(strategy.experience.dataset))

    strategy.plugins.append(Watch(None))
    strategy.train(tiny_benchmark.train_stream[0])
    assert tiny_benchmark.train_stream[0].dataset[3][0].shape == (1, 8, 8)
    gc.collect()
    assert kept[0]() is None


def test_a_stream_continues_with_another_cache(tiny_vit, tiny_benchmark, tmp_path):
    whole = make("TreeLoRA", tiny_vit())
    whole.train(tiny_benchmark.train_stream)
    first = make("TreeLoRA", tiny_vit())
    first.train(tiny_benchmark.train_stream[0])
    first.save(tmp_path / "state")
    second = make("TreeLoRA", tiny_vit(), cache=None)
    second.load(tmp_path / "state")
    second.train(tiny_benchmark.train_stream[1:])
    assert all_equal(weights(whole), weights(second))


@pytest.mark.parametrize("value", ["1 GB", -1, 0.5])
def test_memory_out_of_range(value):
    with pytest.raises(ValueError, match=r"`memory` should be .*'auto' or None"):
        ActivationCachePlugin(value)
