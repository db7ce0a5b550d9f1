"""Data-parallel training: two processes, each on half of every batch, learn the weights of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from treelora_avalanche.plugins.training.data_parallel import PartOfBatches
from treelora_avalanche.processes import Processes
from treelora_avalanche.runs.distributed import one_folder, parallel_plugins

# Run by two processes with gloo, and by a single one.
CHILD = """
import json
import sys
from functools import partial
from pathlib import Path
import torch
from accelerate import Accelerator
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
from avalanche.training.plugins import EvaluationPlugin
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from treelora_avalanche.metrics import AccuracyMatrix
from treelora_avalanche.metrics.generation import GenerationScore
from treelora_avalanche.models import LanguageModel
from treelora_avalanche.plugins import (
    DataParallelPlugin, FirstSessionPlugin, TaskAdaptiveHeadPlugin
)
from treelora_avalanche.scenarios import TextTasks
from treelora_avalanche import strategies

folder = sys.argv[1]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == int(sys.argv[2])
rank = accelerator.process_index
torch.manual_seed(3)
images = torch.randn(6 * 11, 1, 8, 8)
data = _make_taskaware_tensor_classification_dataset(
    images, torch.arange(len(images)) % 6, task_labels=0
)
benchmark = nc_benchmark(data, data, n_experiences=3, task_labels=False, shuffle=False)
tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token=" "))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ", eos_token=chr(0))
for task in "ab":
    records = [{"prompt": task * (n + 1), "answer": "xyz"[n % 3 :]} for n in range(7)]
    for part in ("train", "test"):
        path = Path(folder, f"texts{rank}", task, f"{part}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records))
texts = TextTasks(
    Path(folder, f"texts{rank}"), tokenizer, max_length=32, max_new_tokens=4, allow_overlap=True
)
first_block = []


def vit():
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2, num_classes=6
    )
    model.blocks[0].register_forward_hook(lambda _, inputs, output: first_block.append(len(output)))
    return model


def llama():
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    )
    network = LlamaForCausalLM(config)
    network.model.layers[0].register_forward_hook(
        lambda _, inputs, output: first_block.append(len(output))
    )
    return LanguageModel(network, tokenizer, max_length=32)


KINDS = {
    "TreeLoRA": (strategies.TreeLoRAStrategy, vit, {}),
    "head": (strategies.TreeLoRAStrategy, vit, {"head": "task_adaptive"}),
    "EWCLoRA": (strategies.EWCLoRA, vit, {}),
    "GEMLoRA": (strategies.GEMLoRA, vit, {}),
    "texts": (strategies.TreeLoRAStrategy, llama, {}),
    "first session": (strategies.TreeLoRAStrategy, vit, {"layers": "all"}),
    "sharded": (strategies.TreeLoRAStrategy, vit, {}),
    "sharded texts": (strategies.TreeLoRAStrategy, llama, {}),
}
for name, (kind, make_model, arguments) in KINDS.items():
    torch.manual_seed(0)
    model = make_model()
    plugins = []
    if accelerator.num_processes > 1:
        plugins = [DataParallelPlugin(accelerator, shard_backbone="sharded" in name)]
    if name == "first session":
        plugins.append(FirstSessionPlugin(1))
    on_text = make_model is llama
    stream = texts if on_text else benchmark
    matrix = GenerationScore() if on_text else AccuracyMatrix()
    first_block.clear()
    strategy = kind(
        model, rank=2, train_mb_size=7, train_epochs=2, eval_mb_size=16,
        plugins=plugins, evaluator=EvaluationPlugin(matrix, loggers=[]),
        **{"layers": "last:2", **arguments},
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9), schedule="constant",
    )
    if rank:  # the plugin synchronises the initial weights
        with torch.no_grad():
            for parameter in strategy.model.parameters():
                parameter.add_(1)
        torch.manual_seed(99)
    else:
        torch.manual_seed(1)
    for experience in stream.train_stream:
        strategy.train(experience)
        strategy.eval(stream.test_stream)
    state = {name: p.detach() for name, p in strategy.model.named_parameters()}
    state["scores"] = torch.as_tensor(matrix.matrix() if on_text else matrix.result())
    if hasattr(strategy, "tree"):
        state["signatures"] = strategy.tree.signatures
        state["adapters"] = strategy.bank.factors
        state["picks"] = strategy.selector.picks
        state["means"] = strategy.selector.search.means
        state["counts"] = strategy.selector.search.counts
    for plugin in strategy.plugins:
        if isinstance(plugin, TaskAdaptiveHeadPlugin):
            state["class means"] = torch.stack([s.mean for s in plugin.statistics])
    torch.save(state, f"{folder}/{name}.{rank}")
    frozen = [
        p for _, p in torch.nn.Module.named_parameters(strategy.model) if not p.requires_grad
    ]
    held = sum(getattr(p, "_local_tensor", p).numel() for p in frozen)
    torch.save(
        {"samples": torch.tensor(sum(first_block)), "held": torch.tensor(held)},
        f"{folder}/{name}.{rank}.work",
    )
accelerator.end_training()
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder with the results of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "child.py"
    script.write_text(CHILD)
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    port = free_port()
    children = [subprocess.Popen([sys.executable, script, folder / "one", "1"])]
    for rank in "01":
        environment = {
            **os.environ,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        children.append(
            subprocess.Popen([sys.executable, script, folder / "two", "2"], env=environment)
        )
    try:
        assert [child.wait(timeout=600) for child in children] == [0, 0, 0]
    finally:
        for child in children:
            child.kill()
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


def test_the_command_line_under_torchrun(tmp_path):
    """Checks that torchrun writes one run folder and one table, with a sharded backbone."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    train = ["-m", "treelora_avalanche.cli", "train", "--n_experiences", "2", "--epochs", "1"]
    options = ["--batch_size", "64", "--device", "cpu", "--output", tmp_path / "run"]
    options += ["--shard_backbone"]
    done = subprocess.run(
        [sys.executable, *launcher, free_port(), *train, *options],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("Run folder") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["timings"]["steps"] == 2 * 11  # 1,347 digits in batches of 64, in two tasks
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["epoch", "task"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
