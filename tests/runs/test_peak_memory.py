"""Peak memory of one run of several in a process."""

import pytest
import torch

from treelora_avalanche.runs import monitors
from treelora_avalanche.runs.monitors import PeakMemory

CPU = torch.device("cpu")
MB = 10**6


def fill(n_bytes):
    return int(torch.ones(n_bytes // 4).sum())


def peak_of(n_bytes):
    with PeakMemory(CPU) as memory:
        fill(n_bytes)
    return memory.bytes


def test_the_peak_is_that_of_the_run_not_of_the_process():
    if not monitors._reset_resident_peak():
        pytest.skip("the kernel's peak cannot be reset here")
    empty = peak_of(0)
    large = peak_of(256 * MB)
    small = peak_of(32 * MB)
    assert large - empty > 200 * MB
    assert large - small > 150 * MB  # which did not hold while the first run's peak was kept


def test_an_earlier_peak_of_the_same_run_counts():
    with PeakMemory(CPU, before=10**15) as memory:
        assert memory.now() == 10**15
    assert memory.bytes == 10**15


def test_without_the_kernels_peak_memory_is_sampled(monkeypatch):
    monkeypatch.setattr(monitors, "_reset_resident_peak", lambda: False)
    with PeakMemory(CPU) as memory:
        pass
    assert memory.bytes > 50 * MB
    assert memory.kind == "process resident"
