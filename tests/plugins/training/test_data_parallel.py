"""Data-parallel training: two processes, each on half of every batch, learn the weights of one."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import data_parallel_runs
import pytest
import torch

from treelora_avalanche.plugins.training.data_parallel import PartOfBatches
from treelora_avalanche.processes import Processes
from treelora_avalanche.runs.distributed import one_folder, parallel_plugins


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder with the results of this process, and of each of two under torchrun."""
    folder = tmp_path_factory.mktemp("processes")
    with torch.random.fork_rng():
        data_parallel_runs.train_all(folder / "one")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    done = subprocess.run(
        [sys.executable, *launcher, free_port(), data_parallel_runs.__file__, folder / "two"],
        check=True,
        capture_output=True,
        text=True,
    )
    (folder / "printed").write_text(done.stdout)
    return folder


def load(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        ("TreeLoRA", 1e-6),
        ("EWCLoRA", 1e-6),
        ("GEMLoRA", 1e-6),
        ("texts", 1e-6),
        ("first session", 1e-6),
        ("sharded", 1e-6),
        ("sharded texts", 1e-6),
        ("head", 1e-6),
    ],
)
def test_two_processes_learn_the_weights_of_one(trained, method, tolerance):
    alone = load(trained / "one", f"{method}.0")
    if method == "head":
        # The inverse of the features' covariance amplifies rounding, in one process too.
        alone = {name: value for name, value in alone.items() if "modules_to_save" not in name}
    for rank in range(2):
        part = load(trained / "two", f"{method}.{rank}")
        assert part.keys() >= alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(part[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("method", ["TreeLoRA", "head", "texts", "first session", "sharded"])
def test_processes_have_equal_statistics_bit_for_bit(trained, method):
    first, second = (load(trained / "two", f"{method}.{rank}") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["counts"].sum() > 0


@pytest.mark.parametrize("method", ["TreeLoRA", "head", "texts"])
def test_processes_share_passes_without_gradients(trained, method):
    alone = load(trained / "one", f"{method}.0.work")["samples"]
    for rank in range(2):
        # Each process probes a few samples to decide whether to cache activations.
        assert load(trained / "two", f"{method}.{rank}.work")["samples"] < 0.75 * alone


@pytest.mark.parametrize("method", ["sharded", "sharded texts"])
def test_each_process_holds_a_shard_of_the_frozen_blocks(trained, method):
    alone = load(trained / "one", f"{method}.0.work")["held"]
    whole = load(trained / "two", f"{method.replace('sharded', '').strip() or 'TreeLoRA'}.0.work")
    assert whole["held"] == alone
    parts = [load(trained / "two", f"{method}.{rank}.work")["held"] for rank in range(2)]
    assert max(parts) < 0.75 * alone  # embedding and output layer are not sharded
    assert sum(parts) >= alone


def test_parts_of_a_batch_cover_the_batch():
    batches = [[4, 2, 0], [1, 3, 5], [6]]
    parts = [PartOfBatches(batches, rank, 2) for rank in range(2)]
    first, second = (list(part) for part in parts)
    assert first == [[4, 0], [1, 5], [6]]
    assert second[:2] == [[2], [3]]
    assert [part.is_empty for part in parts] == [[False] * 3, [False, False, True]]
    assert len(parts[0]) == 3


@pytest.mark.parametrize(("n", "unit"), [(1, 1), (5, 1), (7, 3), (12, 4), (2, 16)])
@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_parts_of_a_list_are_consecutive(n, unit, n_processes):
    parts = []
    for rank in range(n_processes):
        processes = object.__new__(Processes)
        processes.accelerator = SimpleNamespace(num_processes=n_processes, process_index=rank)
        parts.append(processes.part(n, unit))
    assert [number for part in parts for number in part][:n] == list(range(n))
    assert all(part[0] % unit == 0 for part in parts if part != [n - 1])


def test_the_command_line_under_torchrun(trained):
    """Checks that torchrun writes one run folder and one table, with a sharded backbone."""
    assert (trained / "printed").read_text().count("Run folder") == 1
    folder = trained / "two" / "command_line"
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["timings"]["steps"] == 2 * 11  # 1,347 digits in batches of 64, in two tasks
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["epoch", "task"] * 2
    assert [path.name for path in folder.iterdir()] == ["run"]


def test_sharding_needs_several_processes():
    with pytest.raises(
        ValueError, match="`--shard_backbone` should be used with several processes, but there is 1"
    ):
        parallel_plugins("cpu", shard_backbone=True)


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match=r"`--output` should be .*, but is not given"),
        one_folder(None, "cpu"),
    ):
        pass
