"""Streams trained by one process or by several, for the test of data-parallel training.

As a script it is run by torchrun, since a new process takes seconds to import Avalanche.
"""

# ruff: noqa: E402
import gc

gc.disable()  # it takes a fifth of the time of imports

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
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from treelora_avalanche import models, strategies
from treelora_avalanche.cli import main
from treelora_avalanche.metrics import AccuracyMatrix
from treelora_avalanche.metrics.generation import GenerationScore
from treelora_avalanche.models import LanguageModel
from treelora_avalanche.plugins import (
    DataParallelPlugin,
    FirstSessionPlugin,
    TaskAdaptiveHeadPlugin,
)
from treelora_avalanche.scenarios import TextTasks

gc.enable()

TREE = strategies.TreeLoRAStrategy
IMAGES, TEXTS = "images", "texts"
RUNS = {
    "TreeLoRA": (TREE, IMAGES, {}),
    "head": (TREE, IMAGES, {"head": "task_adaptive"}),
    "EWCLoRA": (strategies.EWCLoRA, IMAGES, {}),
    "GEMLoRA": (strategies.GEMLoRA, IMAGES, {}),
    "texts": (TREE, TEXTS, {}),
    "first session": (TREE, IMAGES, {"layers": "all"}),
    "sharded": (TREE, IMAGES, {}),
    "sharded texts": (TREE, TEXTS, {}),
}


def images():
    torch.manual_seed(3)
    samples = torch.randn(6 * 11, 1, 8, 8)
    data = _make_taskaware_tensor_classification_dataset(
        samples, torch.arange(len(samples)) % 6, task_labels=0
    )
    return nc_benchmark(data, data, n_experiences=3, task_labels=False, shuffle=False)


def make_tokenizer():
    characters = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, unk_token=" ", eos_token=chr(0))


def texts(folder):
    for task in "ab":
        records = [{"prompt": task * (n + 1), "answer": "xyz"[n % 3 :]} for n in range(7)]
        (folder / task).mkdir(parents=True)
        for part in ("train", "test"):
            (folder / task / f"{part}.json").write_text(json.dumps(records))
    return TextTasks(folder, make_tokenizer(), max_length=32, max_new_tokens=4, allow_overlap=True)


def vit():
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2, num_classes=6
    )
    return model, model.blocks[0]


def llama():
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    network = LlamaForCausalLM(config)
    return LanguageModel(network, make_tokenizer(), max_length=32), network.model.layers[0]


def train(name, streams, accelerator):
    """Trains one of the runs; returns its state, and the work of this process."""
    strategy_class, kind, arguments = RUNS[name]
    torch.manual_seed(0)
    model, first_block = llama() if kind == TEXTS else vit()
    samples = []
    first_block.register_forward_hook(lambda _, inputs, output: samples.append(len(output)))
    plugins = []
    if accelerator is not None:
        plugins = [DataParallelPlugin(accelerator, shard_backbone="sharded" in name)]
    if name == "first session":
        plugins.append(FirstSessionPlugin(1))
    matrix = GenerationScore() if kind == TEXTS else AccuracyMatrix()
    strategy = strategy_class(
        model,
        rank=2,
        train_mb_size=7,
        train_epochs=2,
        eval_mb_size=16,
        plugins=plugins,
        evaluator=EvaluationPlugin(matrix, loggers=[]),
        **{"layers": "last:2", **arguments},
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        schedule="constant",
    )
    if accelerator is not None and accelerator.process_index:
        with torch.no_grad():  # the plugin synchronises the initial weights
            for parameter in strategy.model.parameters():
                parameter.add_(1)
        torch.manual_seed(99)
    else:
        torch.manual_seed(1)
    for experience in streams[kind].train_stream:
        strategy.train(experience)
        strategy.eval(streams[kind].test_stream)
    scores = matrix.matrix() if kind == TEXTS else matrix.result()
    return {**state_of(strategy), "scores": torch.as_tensor(scores)}, work(strategy, samples)


def state_of(strategy):
    state = {name: p.detach() for name, p in strategy.model.named_parameters()}
    if hasattr(strategy, "tree"):
        state["signatures"] = strategy.tree.signatures
        state["adapters"] = strategy.bank.factors
        state["picks"] = strategy.selector.picks
        state["means"] = strategy.selector.search.means
        state["counts"] = strategy.selector.search.counts
    for plugin in strategy.plugins:
        if isinstance(plugin, TaskAdaptiveHeadPlugin):
            state["class means"] = torch.stack([s.mean for s in plugin.statistics])
    return state


def work(strategy, samples):
    """Returns the samples that passed the first block, and the frozen values held."""
    frozen = [p for _, p in torch.nn.Module.named_parameters(strategy.model) if not p.requires_grad]
    held = sum(getattr(p, "_local_tensor", p).numel() for p in frozen)
    return {"samples": torch.tensor(sum(samples)), "held": torch.tensor(held)}


def train_all(folder, accelerator=None):
    """Trains every run, and writes its state and work, as one of several processes if so."""
    rank = 0 if accelerator is None else accelerator.process_index
    streams = {IMAGES: images(), TEXTS: texts(folder / f"texts{rank}")}
    for name in RUNS:
        state, worked = train(name, streams, accelerator)
        torch.save(state, folder / f"{name}.{rank}")
        torch.save(worked, folder / f"{name}.{rank}.work")


def train_on_the_command_line(folder):
    # Skips the pretraining of the digits' backbone, which takes seconds.
    models.pretrained_digits_vit = lambda seed: models.digits_vit()
    options = {"n_experiences": 2, "epochs": 1, "batch_size": 64, "device": "cpu"}
    options["output"] = folder / "run"
    words = [f"--{name}={value}" for name, value in options.items()]
    return main(["train", *words, "--shard_backbone"])


if __name__ == "__main__":
    of_two = Accelerator(cpu=True)
    assert of_two.num_processes == 2
    train_all(Path(sys.argv[1]), of_two)
    sys.exit(train_on_the_command_line(Path(sys.argv[1], "command_line")))
