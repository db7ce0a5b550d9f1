"""TreeLoRA compared with plain LoRA: DeiT-Tiny learns Caltech-101, ten classes at a time.

    python examples/caltech101_deit.py --epochs 3 --seeds 3

Needs the folders `caltech101` and `deit_tiny_patch16_224_in1k` in $TREELORA_DATA.
"""

from __future__ import annotations

import os
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from avalanche.training.plugins import EvaluationPlugin
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from treelora_avalanche import SeqLoRA, TreeLoRAStrategy
from treelora_avalanche.metrics import AccuracyMatrix, backward_transfer, overall_performance
from treelora_avalanche.models import create_vit, image_preprocessing
from treelora_avalanche.scenarios import SplitImageFolder

DATA = Path(os.environ.get("TREELORA_DATA", "../shared/data"))
METHODS = {"SeqLoRA": SeqLoRA, "TreeLoRA": TreeLoRAStrategy}


def pretrained_model(data: Path) -> torch.nn.Module:
    """Returns DeiT-Tiny with ImageNet weights, its position embeddings resampled to 112 pixels."""
    weights = data / "deit_tiny_patch16_224_in1k" / "model.fp16.safetensors"
    return create_vit("deit_tiny_patch16_224", num_classes=100, checkpoint=weights, img_size=112)


def caltech(data: Path, seed: int):
    """Returns ten tasks of ten classes, in an order drawn by the seed."""
    folder = data / "caltech101"
    classes = sorted(path.name for path in (folder / "train").iterdir())
    classes.remove("Faces_easy")  # the people of "Faces", cropped
    preprocessing = image_preprocessing(pretrained_model(data))
    return SplitImageFolder(
        folder, n_experiences=10, preprocessing=preprocessing, classes=classes, seed=seed
    )


def main(
    data: Path = DATA,
    epochs: int = 3,
    seeds: int = 1,
    batch_size: int = 32,
    lr: float = 0.003,
    head: str = "task_adaptive",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Trains both methods under the same budget and prints a table.

    :param data: the folder of images and weights.
    :param epochs: epochs per task.
    :param seeds: number of seeds; each draws another class order.
    :param batch_size: images per step.
    :param lr: Adam's learning rate.
    :param head: head of both methods; "linear" is trained by the loss alone.
    :param device: where to train.
    """
    warnings.simplefilter("ignore")
    table = Table(title=f"Caltech-101, 10 x 10 classes, {epochs} epochs a task, {seeds} seed(s)")
    for column in ("method", "Acc ↑", "Bwt ↓", "within task ↑", "within Bwt ↓", "minutes"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, method in METHODS.items():
        rows = []
        for seed in range(seeds):
            benchmark = caltech(data, seed)
            torch.manual_seed(seed)  # the same initial adapter and batches for every method
            all_classes, within_task = AccuracyMatrix(), AccuracyMatrix(within_task=True)
            strategy = method(
                pretrained_model(data),
                optimizer=partial(torch.optim.Adam, lr=lr),
                train_mb_size=batch_size,
                train_epochs=epochs,
                device=device,
                head=head,
                evaluator=EvaluationPlugin(all_classes, within_task, loggers=[]),
            )
            seconds = 0.0
            for experience in benchmark.train_stream:
                start = time.perf_counter()
                strategy.train(experience)
                seconds += time.perf_counter() - start
                # Both numbers need all tasks so far after every task; the others are not needed.
                strategy.eval(benchmark.test_stream[: strategy.clock.train_exp_counter])
            rows.append(
                [
                    figure(matrix.result()) * 100
                    for matrix in (all_classes, within_task)
                    for figure in (overall_performance, backward_transfer)
                ]
                + [seconds / 60]
            )
        cells = torch.tensor(rows)
        means = cells.mean(0).tolist()
        spread = cells.std(0, correction=0).tolist()
        table.add_row(name, *(f"{m:.1f} ± {s:.1f}" for m, s in zip(means, spread, strict=True)))
        if method is TreeLoRAStrategy:
            Console().print(strategy.tree.draw())
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main)
