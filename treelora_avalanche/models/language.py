"""Causal language models of transformers as modules that Avalanche trains.

A sample is a row of token ids and a row of targets, both plain tensors: the tokens of a prompt and
its answer but for the last, and the same sequence one token later, where only the answer's tokens
stand and all else is -100. The model gives logits ``(batch, vocabulary, length)``, the shape of
dense classification, and :class:`~treelora_avalanche.models.TokenCrossEntropy` is the loss. So
every strategy that calls ``criterion(model(x), y)`` trains language models unchanged.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from treelora_avalanche.adapters import AdapterHost, merged_weights
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.hub import from_folder_or_hub
from treelora_avalanche.models.tokenization import encode_prompt, end_token
from treelora_avalanche.models.tokens import PADDING, crop

logger = logging.getLogger(__name__)


class LanguageModel(AdapterHost):
    """A causal language model that answers rows of tokens with logits, and prompts with text.

    ``network`` is the transformers model; once LoRA is attached, the :class:`peft.PeftModel` around
    it. Rows are padded on the right, with -1. A causal model never looks to the right, so that
    padding there has no part in any answer, and no mask is needed to keep it out.

    :param network: a causal language model of transformers, such as
        ``AutoModelForCausalLM.from_pretrained`` gives; or a :class:`peft.PeftModel` around one.
    :param tokenizer: its tokenizer.
    :param max_length: most tokens of a prompt and its answer together; at most the context of the
        model, to which it is lowered.
    :param gradient_checkpointing: whether the blocks are computed again in the backward pass, in
        place of keeping what it needs of them.
    :raises ValueError: if the tokenizer has no end token, or an argument is out of range.
    """

    tells_padding = False
    """Whether the network is given a mask of the padding: one that takes prompts needs it."""

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        *,
        max_length: int = 1024,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        end = end_token(tokenizer)
        config: Any = network.config
        context = getattr(config, "max_position_embeddings", None) or max_length
        if max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, and is {max_length}.")
        if max_length > context:
            logger.info("max_length is %d, the context of the model, not %d", context, max_length)
        base: Any = network.get_base_model() if isinstance(network, PeftModel) else network
        n_embeddings = base.get_input_embeddings().num_embeddings
        if len(tokenizer) > n_embeddings:
            raise ValueError(
                f"`tokenizer` has {len(tokenizer)} tokens, and the network embeds {n_embeddings}; "
                "pass the tokenizer that belongs to it."
            )
        self.network = network
        self.tokenizer = tokenizer
        self.max_length: int = min(max_length, context)
        self.context: int = context
        given = base.generation_config
        ends = given.eos_token_id if given is not None else None
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.end_tokens: list[int] = sorted({end, *ends})
        # Greedy, whatever the published one says of temperature and penalties.
        base.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.end_tokens, pad_token_id=end
        )
        if gradient_checkpointing:
            # The reentrant kind needs inputs with a gradient, which frozen embeddings do not give.
            base.gradient_checkpointing_enable({"use_reentrant": False})
        base.get_output_embeddings().register_forward_pre_hook(self._mask_padding)
        self._real: Tensor | None = None

    @property
    def base(self) -> Any:
        """The transformers model, without the :class:`peft.PeftModel` around it."""
        return (
            self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network
        )

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Logits of the token after each one.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``. Rows of the full
            width ``max_length``, as a dataset gives them, are cropped to the longest; on an
            accelerator that waits for it, so that loaders had better crop.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
            The vocabulary's product with the others is then not computed.
        :return: ``(batch, vocabulary, length)``, a view of what the network computes, not a copy;
            zero at padding.
        """
        if tokens.device.type == "cpu" or tokens.shape[1] >= self.max_length:
            tokens = crop(tokens)
        return self.logits(tokens, last)

    def logits(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Logits of rows of whatever width they have, see :meth:`forward`.

        :param tokens: see :meth:`forward`; nothing is cropped.
        :param last: see :meth:`forward`.
        """
        self._real = tokens != PADDING
        mask = {"attention_mask": self._real.long()} if self.tells_padding else {}
        try:
            output = self.network(
                input_ids=tokens.clamp(min=0), use_cache=False, logits_to_keep=last or 0, **mask
            )
        finally:
            self._real = None
        logits: Tensor = output.logits
        return logits.transpose(1, 2)

    def _mask_padding(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Zeroes what the output layer is given at padding: cheaper than zeroing its logits."""
        if self._real is None:  # generating
            return None
        hidden = inputs[0]
        return (hidden * self._real[:, -hidden.shape[1] :, None].to(hidden.dtype),)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continue prompts greedily, with a cache of keys and values, the adapter in the weights.

        :param prompts: texts, put into the tokenizer's chat template if there is one; or token ids,
            taken as they are. What is longer than ``max_length``, or than the context less
            ``max_new_tokens``, loses its beginning.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: how many are generated together, those of similar length.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, without the end token, in the order of the prompts.
        :raises ValueError: if ``max_new_tokens`` or ``batch_size`` leave nothing to do.
        """
        if batch_size < 1:
            raise ValueError(
                f"`max_new_tokens` is {max_new_tokens} and `batch_size` {batch_size}; both must be "
                "at least 1."
            )
        rows = self.encode_prompts(prompts, max_new_tokens)
        answers = [""] * len(rows)
        # The longest first: what does not fit into memory is known at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with evaluating(self), merged_weights(self.network):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                texts = self._generate_batch([rows[i] for i in batch], max_new_tokens)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
                if progress is not None:
                    progress(len(batch))
        return answers

    def encode_prompts(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Prompts as token ids, with room for what is to be generated.

        :param prompts: see :meth:`generate`.
        :param max_new_tokens: see :meth:`generate`.
        :raises ValueError: if ``max_new_tokens`` is below 1, or leaves no room for a prompt.
        """
        room = min(self.max_length, self.context - max_new_tokens)
        if max_new_tokens < 1 or room < 1:
            raise ValueError(
                f"`max_new_tokens` is {max_new_tokens}; it must be at least 1, and below the "
                f"model's context of {self.context}."
            )
        return [
            encode_prompt(self.tokenizer, prompt, room)
            if isinstance(prompt, str)
            else list(prompt)[-room:]
            for prompt in prompts
        ]

    def _generate_batch(self, rows: list[list[int]], max_new_tokens: int) -> list[str]:
        device = next(self.network.parameters()).device
        width = max(1, *map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):  # padded on the left: what is new comes right after
            tokens[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        output: Any = self.network.generate(  # type: ignore[operator]
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
        )
        texts = []
        for new in output[:, width:].tolist():
            end = next((i for i, token in enumerate(new) if token in self.end_tokens), len(new))
            texts.append(self.tokenizer.decode(new[:end], skip_special_tokens=True))
        return texts

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        memo[id(self.tokenizer)] = self.tokenizer  # large, and never changed
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def create_language_model(
    name_or_folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_length: int = 1024,
    gradient_checkpointing: bool = False,
) -> LanguageModel:
    """A pretrained causal language model and its tokenizer, from a folder or from the hub.

    Only safetensors are read, and no code that comes with a model is ever run.

    :param name_or_folder: a folder that ``save_pretrained`` has written, or a name on the Hugging
        Face hub such as ``meta-llama/Llama-3.2-1B-Instruct``.
    :param dtype: precision of the frozen weights, such as ``torch.bfloat16`` or ``"bfloat16"``; by
        default that of the checkpoint. LoRA's factors are float32 in any case.
    :param max_length: see :class:`LanguageModel`.
    :param gradient_checkpointing: see :class:`LanguageModel`.
    :raises FileNotFoundError: if the folder lacks something, such as weights in safetensors.
    :raises OSError: if the hub cannot be reached, or does not have the model.
    :raises ValueError: if the model is no causal language model, or its tokenizer does not do.
    """
    with from_folder_or_hub(name_or_folder) as (name, safe):
        _check_causal(name, AutoConfig.from_pretrained(name, **safe))  # before gigabytes come
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        network = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", use_safetensors=True, **safe
        )
    return LanguageModel(
        network, tokenizer, max_length=max_length, gradient_checkpointing=gradient_checkpointing
    )


def _check_causal(name: str, config: Any) -> None:
    """A model that looks to the right would read the answers, and transformers loads it alike."""
    architectures = config.architectures or ["CausalLM"]
    if not any(kind in given for given in architectures for kind in ("CausalLM", "LMHeadModel")):
        raise ValueError(
            f"{name!r} holds a {', '.join(architectures)}, which is no causal language model; "
            "choose one such as meta-llama/Llama-3.2-1B-Instruct."
        )
