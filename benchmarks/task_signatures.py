"""Task signatures before the first step: which one finds related tasks.

Every signature is computed from one batch of a new task, on the initial model, so that all tasks
are comparable:

* ``activations``: mean input of each adapted layer (the library's
  :func:`~treelora_avalanche.models.features.signature.activation_signature`); one forward pass, no
  labels;
* ``features``: mean input of the classifier; one forward pass, no labels;
* ``gradient``: of the loss with respect to B, under the classifier's initial weights, among the
  task's classes; one forward and one backward pass. (That of A is zero while B is.)
* ``prototype gradient``: the same under a classifier of the class means of the batch.

The tasks that follow one of their group are counted (for streams and groups see
``benchmarks/transfer.py``). ``layers`` is the share of their layers, ``tasks`` the share of them,
whose nearest past task is of the own group; ``chance`` that of a random pick. Means over orders;
``least`` is the smallest over orders. ``cost`` is the time of a signature in training steps at the
same batch size. For the displacement of the adapter, which is known only after training, see
``benchmarks/task_similarity.py``.

    python benchmarks/task_signatures.py --check
    python benchmarks/task_signatures.py --streams '[pairs,domains,pacs,caltech101]' --seeds 5
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _command import DATA, new_table, run
from _related_streams import STREAMS
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from treelora_avalanche.adapters import LoRAFactors, TrainableView, add_lora
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.choices import check_known
from treelora_avalanche.models.features.extraction import features_of
from treelora_avalanche.models.features.signature import activation_signature, stack_samples


def features(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean of the frozen features, ``(1, dim)``."""
    return normalize(features_of(model, images).mean(0, keepdim=True), p=1.0, dim=1)


def gradient(model: nn.Module, images: Tensor, targets: Tensor, prototypes: bool = False) -> Tensor:
    """Returns the gradient with respect to the factors B, ``(n_layers, dim)``."""
    seen: list[Tensor] = []
    hook = classifier_of(model).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits = model(images)
    hook.remove()
    classes, rows = targets.unique(return_inverse=True)
    if prototypes:
        means = torch.stack([seen[0][targets == c].mean(0) for c in classes]).detach()
        logits = 10 * normalize(seen[0], dim=1) @ normalize(means, dim=1).T
    else:
        logits = logits[:, classes]
    model.zero_grad()
    cross_entropy(logits, rows).backward()
    of_b = [b.grad.flatten() for _, b in LoRAFactors(model).parameters if b.grad is not None]
    return normalize(torch.stack(of_b), p=1.0, dim=1)


SIGNATURES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "activations": lambda model, images, targets: activation_signature(model, images),
    "features": features,
    "gradient": gradient,
    "prototype gradient": lambda *batch: gradient(*batch, prototypes=True),
}


def recovered(signatures: Tensor, groups: list[str]) -> tuple[float, float, float]:
    """Returns the shares of layers and of tasks whose nearest past task is of the group; chance.

    :param signatures: ``(n_tasks, n_layers, dim)``, in the order of arrival.
    :param groups: the group of each task.
    """
    shares = []
    for task, group in enumerate(groups):
        mates = torch.tensor([past == group for past in groups[:task]])
        if mates.any():
            distances = (signatures[:task] - signatures[task]).abs().sum(-1)  # (task, n_layers)
            of_layers = mates[distances.argmin(0)].float().mean().item()
            of_task = mates[distances.sum(1).argmin()].float().item()
            shares.append((of_layers, of_task, mates.float().mean().item()))
    layers, tasks, chance = torch.tensor(shares).mean(0).tolist()
    return layers, tasks, chance


def signature_stream(name: str, seed: int, samples: int, data: Path) -> dict[str, Any]:
    """Returns recovery and cost of every signature on one order of a stream."""
    stream = STREAMS[name](data, seed)
    torch.manual_seed(seed)
    model = TrainableView(add_lora(stream.model())).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {kind: [] for kind in SIGNATURES}
    spent = dict.fromkeys((*SIGNATURES, "step"), 0.0)
    for experience in stream.benchmark.train_stream:
        dataset = experience.dataset
        rows = torch.randperm(len(dataset), generator=generator)[:samples].tolist()
        images, targets = stack_samples(dataset, rows)
        for kind, signature in SIGNATURES.items():
            start = time.perf_counter()
            found[kind].append(signature(model, images, targets))
            spent[kind] += time.perf_counter() - start
        start = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(images), targets).backward()
        optimizer.step()
        spent["step"] += time.perf_counter() - start
    return {
        kind: (*recovered(torch.stack(of_tasks), stream.groups), spent[kind] / spent["step"])
        for kind, of_tasks in found.items()
    }


def task_signatures(
    streams: tuple[str, ...] = ("domains", "pairs"),
    seeds: int = 3,
    samples: int = 64,
    data: str = DATA,
) -> list[str]:
    """Computes the signatures of all tasks of the streams.

    :param streams: domains, returning, pairs, pacs, caltech101.
    :param seeds: number of orders of each stream.
    :param samples: images in the batch of a signature.
    :param data: folder with ``pacs``, ``caltech101`` and the weights of DeiT-Tiny.
    :return: the missed targets: the library's signature at twice chance or more.
    """
    for name in streams:
        check_known("`streams`", name, [known for known in STREAMS if known != "unrelated"])
    missed = []
    table = new_table(
        f"{seeds} orders, one batch of {samples} images a task",
        ("stream", "signature", "layers", "tasks", "least", "chance", "cost in steps"),
        n_left=2,
    )
    for name in streams:
        try:
            runs = [signature_stream(name, seed, samples, Path(data)) for seed in range(seeds)]
        except FileNotFoundError as error:
            print(f"{name}: skipped, {error}")
            continue
        for kind in SIGNATURES:
            results = torch.tensor([of_seed[kind] for of_seed in runs])  # (n_seeds, 4)
            layers, tasks, chance, cost = results.mean(0).tolist()
            least = results[:, 1].min().item()
            numbers = [f"{value:.2f}" for value in (layers, tasks, least, chance, cost)]
            table.add_row(name, kind, *numbers)
            if kind == "activations" and tasks < 2 * chance:
                missed.append(f"{name}: {tasks:.2f}, below twice the chance of {chance:.2f}")
    Console().print(table)
    return missed


if __name__ == "__main__":
    run(task_signatures)
