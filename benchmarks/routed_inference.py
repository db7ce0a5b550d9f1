"""Cost of routed inference: its forward pass over that of the active adapter alone.

Random images through a ViT with random weights and ten stored adapters; the passes alternate, and
medians are compared.

    python benchmarks/routed_inference.py --check
"""

from __future__ import annotations

import statistics
import time

import timm
import torch
from _command import new_table, run, synchronize
from rich.console import Console

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, add_lora
from treelora_avalanche.models.views.routed_vit import RoutedAdapters
from treelora_avalanche.models.views.router import Router

TARGET = 1.6


def routed_inference(
    model: str = "deit_tiny_patch16_224",
    img_size: int = 112,
    batch_size: int = 256,
    layers: str = "last:5",
    n_adapters: int = 10,
    rounds: int = 15,
    device: str = "cpu",
) -> list[str]:
    """Times both inference modes.

    :param model: name of a timm ViT; its weights are random.
    :param img_size: pixels on a side.
    :param batch_size: images per pass.
    :param layers: adapted blocks.
    :param n_adapters: stored adapters, one per class.
    :param rounds: passes of each mode; the first is a warm-up.
    :param device: where to compute.
    :return: the missed targets.
    """
    torch.manual_seed(0)
    vit = timm.create_model(model, img_size=img_size, num_classes=100)
    bank = AdapterBank()
    view = RoutedAdapters(add_lora(vit, layers=layers), bank).to(device).eval()
    factors = LoRAFactors(view)
    for _ in range(n_adapters):
        factors.stack.normal_(std=0.01)
        bank.append(factors)
    # Random directions, so that the samples spread over all adapters.
    weight = torch.randn(n_adapters, vit.num_features, device=device)
    router = Router(
        weight, torch.zeros(n_adapters, device=device), torch.arange(n_adapters, device=device)
    )
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    with torch.no_grad():
        centre = view.frozen_features(images).mean(0)
        router = router._replace(bias=-(weight @ centre))

    def milliseconds(mode: Router | None) -> float:
        view.router = mode
        start = time.perf_counter()
        view(images)
        synchronize(images.device)
        return 1e3 * (time.perf_counter() - start)

    times: dict[str, list[float]] = {"last": [], "routed": []}
    with torch.no_grad():
        for _ in range(rounds):
            times["last"].append(milliseconds(None))
            times["routed"].append(milliseconds(router))
        used = len(router(view.frozen_features(images)).unique())
    last, routed = (statistics.median(values[1:]) for values in times.values())
    table = new_table(
        f"{model} at {img_size} px, batch {batch_size}, {layers} adapted, {device}",
        ("inference", "ms/batch (median)", "over last"),
    )
    table.add_row("last", f"{last:.1f}", "1.000")
    table.add_row(f"routed, {used} adapters in the batch", f"{routed:.1f}", f"{routed / last:.3f}")
    Console().print(table)
    if routed / last > TARGET:
        return [f"routed over last inference is {routed / last:.2f}, above {TARGET}"]
    return []


if __name__ == "__main__":
    run(routed_inference)
