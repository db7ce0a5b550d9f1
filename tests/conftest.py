"""Fixtures shared by test files."""

import gc
import os

# Set before torch is imported, and inherited by subprocesses: with several threads, sums are split
# differently in each process, and results are not equal bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

# Until all tests are collected: it takes a fifth of the time of imports.
gc.disable()

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Excludes modules and tests from garbage collection, which every run asks for."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """Restores the log levels that the command line sets."""
    loggers = [logging.getLogger(name) for name in (None, "treelora_avalanche")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Returns the root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Returns the folder of real data and pretrained weights; skips the test if it is missing."""
    root = Path(os.environ.get("TREELORA_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data: {root} is not a folder (set TREELORA_DATA)")
    return root


@pytest.fixture(scope="session")
def o_lora(data_root: Path) -> Path:
    """Returns the folder of O-LoRA's text classifications; skips the test if it is missing."""
    folder = data_root / "CL_Benchmark"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    return folder


@pytest.fixture
def tiny_vit() -> Callable[..., VisionTransformer]:
    """Returns a factory of timm ViTs with three blocks and the same random weights."""
    from treelora_avalanche import testing

    return testing.tiny_vit


@pytest.fixture(scope="session")
def tiny_benchmark() -> Any:
    """Returns a benchmark of three experiences of two classes: a pattern per class, plus noise."""
    from treelora_avalanche import testing

    return testing.tiny_benchmark()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Returns a factory of tokenizers, one token per ASCII character; ids 0, 96, 97 are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(**special: str | None) -> Any:
        characters = {chr(31 + i): i for i in range(1, 96)}
        vocabulary = {"<unk>": 0, **characters, "<s>": 96, "</s>": 97}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, **{"unk_token": "<unk>", "eos_token": "</s>", **special}
        )

    return make


@pytest.fixture(scope="session")
def make_language_model(make_tokenizer) -> Callable[..., Any]:
    """Returns a factory of Llamas on characters, with the same random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from treelora_avalanche.models import LanguageModel

    def make(
        max_length: int = 48, context: int = 64, n_layers: int = 2, **options: Any
    ) -> LanguageModel:
        config = LlamaConfig(
            vocab_size=98,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            initializer_range=0.3,
            bos_token_id=96,
            eos_token_id=97,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = LlamaForCausalLM(config)
        tokenizer = make_tokenizer(bos_token="<s>")
        return LanguageModel(network, tokenizer, max_length=max_length, **options)

    return make


@pytest.fixture(scope="session")
def tiny_texts(make_language_model, tmp_path_factory) -> Any:
    """Returns a stream of three tasks of text, eight samples each, with distinct first words."""
    import json

    from treelora_avalanche.scenarios import TextTasks

    folder = tmp_path_factory.mktemp("tiny_texts")
    tasks = {
        "zoo": [{"prompt": f"zoo {n} animal:", "answer": "ape" * (1 + n % 2)} for n in range(8)],
        "maths": [{"prompt": f"maths {n} + 1 =", "answer": str(n + 1)} for n in range(8)],
        "WORDS": [{"prompt": "WORDS" + "!" * n, "answer": "ABC"[n % 3]} for n in range(8)],
    }
    for name, records in tasks.items():
        (folder / name).mkdir()
        for part in ("train", "test"):
            (folder / name / f"{part}.json").write_text(json.dumps(records))
    return TextTasks(
        folder, make_language_model(), tasks=list(tasks), max_new_tokens=4, allow_overlap=True
    )
