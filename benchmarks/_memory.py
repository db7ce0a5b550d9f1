"""Peak memory: bytes that torch allocates, or bytes of the process."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler


def peak_on_gpu(work: Callable[[], object], device: str | torch.device) -> int:
    """Returns the most bytes that some work allocates on a GPU beyond those allocated before.

    :param work: the work.
    :param device: the GPU.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return int(torch.cuda.max_memory_allocated(device) - before)


def peak_of_training(strategy: Any, experience: Any) -> int:
    """Returns the most bytes that training on an experience allocates.

    Counted by torch's profiler on a CPU, and by the allocator on a GPU.

    :param strategy: the strategy.
    :param experience: the experience.
    """
    if strategy.device.type == "cuda":
        return peak_on_gpu(lambda: strategy.train(experience), strategy.device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        strategy.train(experience)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        with open(file.name, encoding="utf-8") as trace:
            events = json.load(trace)["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    added, most = 0, 0
    for _, change in changes:
        added += change
        most = max(most, added)
    return most


def peak_of_process(work: Callable[[], object], device: str) -> int:
    """Returns the most bytes that some work adds to the process, or to a GPU.

    :param work: the work.
    :param device: where it runs; on a CPU the resident memory of the process is sampled.
    """
    if device != "cpu":
        return peak_on_gpu(work, device)
    process, done = psutil.Process(), threading.Event()
    before = largest = process.memory_info().rss

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.001):
            largest = max(largest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return largest - before
