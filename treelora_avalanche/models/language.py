"""Causal language models of transformers as modules that Avalanche trains.

A sample is two tensors ``(length,)``: the tokens of a prompt and its answer without the last one,
and the targets, the same sequence shifted by one token, with -100 outside the answer. The output
is logits ``(batch, vocabulary, length)``, the shape of dense classification, and the loss is
:class:`~treelora_avalanche.models.TokenCrossEntropy`. So every strategy that calls
``criterion(model(x), y)`` trains language models unchanged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
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
from treelora_avalanche.adapters.trainable_view import deepcopy_sharing, evaluating
from treelora_avalanche.models.gguf import is_gguf, read_gguf
from treelora_avalanche.models.hub import from_folder_or_hub
from treelora_avalanche.models.token_batches import LengthBatchSampler
from treelora_avalanche.models.tokenization import encode_prompt, end_token
from treelora_avalanche.models.tokens import PADDING, crop

logger = logging.getLogger(__name__)


class LanguageModel(AdapterHost):
    """Causal language model that maps token ids to logits, and prompts to text.

    ``network`` is the transformers model; once LoRA is attached, the :class:`peft.PeftModel` around
    it. Token sequences are padded on the right, with -1. A causal model never looks to the right,
    so padding there affects no output, and needs no mask::

        model = create_language_model("meta-llama/Llama-3.2-1B-Instruct", dtype="bfloat16")
        logits = model(tokens)  # (batch, vocabulary, length)
        model.generate(["2 + 2 ="], max_new_tokens=4)

    :param network: a causal language model of transformers, such as
        ``AutoModelForCausalLM.from_pretrained`` gives; or a :class:`peft.PeftModel` around one.
    :param tokenizer: its tokenizer.
    :param max_length: most tokens of a prompt and its answer together; lowered to the context of
        the model, where that is shorter.
    :param gradient_checkpointing: whether to recompute the blocks in the backward pass instead of
        keeping their activations.
    :raises ValueError: if the tokenizer has no end token, or an argument is out of range.
    """

    needs_attention_mask = False
    """Whether the network is given a mask of the padding; one that takes prompts needs it."""
    stop_strings: list[str] | None = None
    """Texts at which generation stops, in addition to the end tokens; they are part of its output.
    """

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
            raise ValueError(f"`max_length` should be at least 2, but is {max_length}.")
        if max_length > context:
            logger.info("max_length is %d, the context of the model, not %d", context, max_length)
        base: Any = network.get_base_model() if isinstance(network, PeftModel) else network
        n_embeddings = base.get_input_embeddings().num_embeddings
        if len(tokenizer) > n_embeddings:
            raise ValueError(
                f"`tokenizer` should have at most {n_embeddings} tokens, as many as the network "
                f"embeds, but has {len(tokenizer)}. Pass the tokenizer that belongs to the network."
            )
        self.network = network
        self.tokenizer = tokenizer
        self.max_length: int = min(max_length, context)
        self.context: int = context
        self.end_tokens: list[int] = sorted({end, *_end_tokens(base.generation_config)})
        # Greedy, whatever temperature and penalties the published one has.
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
        """Transformers model, without the :class:`peft.PeftModel` around it."""
        return (
            self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network
        )

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Returns the logits of the next token after each one.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``. Batches as wide
            as ``max_length``, as a dataset gives them, are cropped to the longest sequence; on an
            accelerator that synchronises, so that loaders had better crop.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
            The output layer does not compute the others.
        :return: ``(batch, vocabulary, length)``, a view of the network's output, not a copy; zero
            at padding.
        """
        if tokens.device.type == "cpu" or tokens.shape[1] >= self.max_length:
            tokens = crop(tokens)
        return self.logits(tokens, last)

    def logits(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Returns the logits of a batch of any width, see :meth:`forward`.

        :param tokens: see :meth:`forward`; nothing is cropped.
        :param last: see :meth:`forward`.
        """
        self._real = tokens != PADDING
        mask = {"attention_mask": self._real.long()} if self.needs_attention_mask else {}
        try:
            output = self.network(
                input_ids=tokens.clamp(min=0), use_cache=False, logits_to_keep=last or 0, **mask
            )
        finally:
            self._real = None
        logits: Tensor = output.logits
        return logits.transpose(1, 2)

    def _mask_padding(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Zeroes the input of the output layer at padding: cheaper than zeroing its logits."""
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
        """Continues prompts greedily, with a key-value cache and the adapter merged.

        :param prompts: texts, put into the tokenizer's chat template if there is one; or token ids,
            taken as they are. Prompts longer than ``max_length``, or than the context less
            ``max_new_tokens``, lose their beginning.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: prompts per batch, all of similar length.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, without the end token, in the order of the prompts.
        :raises ValueError: if ``max_new_tokens`` or ``batch_size`` is out of range.
        """
        rows = self.encode_prompts(prompts, max_new_tokens)
        texts = [""] * len(rows)
        with evaluating(self), merged_weights(self.network):
            for batch in length_batches(rows, batch_size):
                own = self.generate_batch([rows[i] for i in batch], max_new_tokens)
                for i, text in zip(batch, own, strict=True):
                    texts[i] = text
                if progress is not None:
                    progress(len(batch))
        return texts

    def encode_prompts(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Returns prompts as token ids, with room for the new tokens.

        :param prompts: see :meth:`generate`.
        :param max_new_tokens: see :meth:`generate`.
        :raises ValueError: if ``max_new_tokens`` is below 1, or leaves no room for a prompt.
        """
        room = self.prompt_room(max_new_tokens)
        return [
            encode_prompt(self.tokenizer, prompt, room)
            if isinstance(prompt, str)
            else list(prompt)[-room:]
            for prompt in prompts
        ]

    def prompt_room(self, max_new_tokens: int) -> int:
        """Returns the number of tokens that a prompt may have.

        :param max_new_tokens: see :meth:`generate`.
        :raises ValueError: if ``max_new_tokens`` is below 1, or leaves no room for a prompt.
        """
        room = min(self.max_length, self.context - max_new_tokens)
        if max_new_tokens < 1 or room < 1:
            raise ValueError(
                f"`max_new_tokens` should be at least 1 and below the model's context of "
                f"{self.context}, but is {max_new_tokens}."
            )
        return room

    def generate_batch(
        self, rows: list[list[int]], max_new_tokens: int, **options: Any
    ) -> list[str]:
        """Continues the prompts of one batch, see :meth:`generate`.

        :param rows: token ids of :meth:`encode_prompts`.
        :param max_new_tokens: see :meth:`generate`.
        :param options: further arguments of the network's ``generate``.
        """
        device = next(self.network.parameters()).device
        width = max(1, *map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):  # padded on the left: the new tokens follow directly
            tokens[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        if self.stop_strings:
            options |= {"stop_strings": self.stop_strings, "tokenizer": self.tokenizer}
        output: Any = self.network.generate(  # type: ignore[operator]
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            **options,
        )
        texts = []
        for new in output[:, width:].tolist():
            end = next((i for i, token in enumerate(new) if token in self.end_tokens), len(new))
            texts.append(self.tokenizer.decode(new[:end], skip_special_tokens=True))
        return texts

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        return deepcopy_sharing(self, memo, [self.tokenizer])  # large, and never changed


def length_batches(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yields the positions of token sequences in batches of similar length.

    The longest come first, so that too little memory shows at once.

    :param rows: the sequences.
    :param batch_size: sequences per batch.
    :raises ValueError: if ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` should be at least 1, but is {batch_size}.")
    yield from LengthBatchSampler([*map(len, rows)], batch_size, shuffle=False)


def _end_tokens(config: GenerationConfig | None) -> list[int]:
    ends = config.eos_token_id if config is not None else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def create_language_model(
    name_or_folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_length: int = 1024,
    gradient_checkpointing: bool = False,
    chat_template: bool = True,
    pretrained: bool = True,
) -> LanguageModel:
    """Loads a pretrained causal language model and its tokenizer, from a folder or from the hub.

    Only safetensors and GGUF are read, and no code that comes with a model is ever run::

        model = create_language_model("HuggingFaceTB/SmolLM2-135M-Instruct", max_length=512)

    :param name_or_folder: a folder that ``save_pretrained`` has written, or a name on the Hugging
        Face hub such as ``meta-llama/Llama-3.2-1B-Instruct``; or a file ``*.gguf``, see
        :func:`~treelora_avalanche.models.gguf.read_gguf`.
    :param dtype: precision of the frozen weights, such as ``torch.bfloat16`` or ``"bfloat16"``; by
        default that of the checkpoint, for GGUF float32. LoRA's factors are float32 in any case.
    :param max_length: see :class:`LanguageModel`.
    :param gradient_checkpointing: see :class:`LanguageModel`.
    :param chat_template: whether prompts are put into the tokenizer's chat template, where there is
        one; TRACE's release uses raw prompts.
    :param pretrained: whether to load the weights. Without them the model has its tokenizer and its
        layers, on the device ``meta``: enough to build a stream and to check arguments.
    :raises FileNotFoundError: if the folder lacks something, such as weights in safetensors.
    :raises OSError: if the hub cannot be reached, or does not have the model.
    :raises ValueError: if the model is no causal language model, or its tokenizer does not fit.
    """
    if is_gguf(name_or_folder):
        network, tokenizer = read_gguf(name_or_folder, dtype)
    else:
        with from_folder_or_hub(name_or_folder) as (name, safe):
            config = AutoConfig.from_pretrained(name, **safe)
            _check_causal(name, config)  # before gigabytes come
            tokenizer = AutoTokenizer.from_pretrained(name, **safe)
            if pretrained:
                network = AutoModelForCausalLM.from_pretrained(
                    name, dtype=dtype or "auto", use_safetensors=True, **safe
                )
            else:
                with torch.device("meta"):
                    network = AutoModelForCausalLM.from_config(config, **safe)
    if not chat_template:
        tokenizer.chat_template = None
    return LanguageModel(
        network, tokenizer, max_length=max_length, gradient_checkpointing=gradient_checkpointing
    )


def _check_causal(name: str, config: Any) -> None:
    """Raises an error for a bidirectional model, which would read the answers as targets."""
    architectures = config.architectures or ["CausalLM"]
    if not any(kind in given for given in architectures for kind in ("CausalLM", "LMHeadModel")):
        raise ValueError(
            f"`name_or_folder` should be a causal language model, but {name!r} is a "
            f"{', '.join(architectures)}. Choose one such as meta-llama/Llama-3.2-1B-Instruct."
        )
