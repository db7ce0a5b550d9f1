"""Reader of language models in GGUF files, the format of llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Returns whether a name is that of a GGUF file.

    >>> is_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    True

    :param name: path of a file, or any other name of a model.
    """
    return Path(name).suffix.lower() == ".gguf"


def read_gguf(
    file: str | os.PathLike[str], dtype: torch.dtype | str | None = None
) -> tuple[torch.nn.Module, Any]:
    """Returns the network and the tokenizer of a GGUF file; quantised weights are de-quantised.

    transformers reads the file, for the architectures that it knows in this format::

        network, tokenizer = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", torch.bfloat16)

    :param file: the file.
    :param dtype: precision of the weights; by default float32.
    :raises FileNotFoundError: if there is no such file.
    :raises ImportError: if the package ``gguf`` is not installed.
    :raises ValueError: if transformers does not know the architecture.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"`name_or_folder` should be a file, but {str(file)!r} is none. Correct the path."
        )
    if not is_gguf_available():
        raise ImportError(
            f"`name_or_folder` is {str(file)!r}, a GGUF file, but the package gguf is not "
            "installed. Run `pip install gguf`."
        )
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": path.parent,
        "gguf_file": path.name,
        "trust_remote_code": False,
    }
    tokenizer = AutoTokenizer.from_pretrained(**place)
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        # transformers refuses to save a model that was quantised, and peft to adapt some of them.
        del config.quantization_config
    network: Any = type(loaded)(config)
    network.load_state_dict(loaded.state_dict())
    network.generation_config = loaded.generation_config
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return network.to(wanted or torch.float32), tokenizer


__all__ = ["is_gguf", "read_gguf"]
