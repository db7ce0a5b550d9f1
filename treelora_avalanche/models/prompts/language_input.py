"""Language models with L2P's prompts, put before the embeddings of a text.

The network is frozen; only prompts and keys are trained. The query that selects prompts is taken
from the first tokens of the text. So it is the same in training (prompt and answer, padded on the
right) and in generation (the prompt alone, padded on the left).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters import lora_layers
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.prompts.pools import PromptPool
from treelora_avalanche.models.tokens import first_tokens, mean_over


def check_query_length(query_length: int) -> None:
    """Raises an error for a query from no tokens.

    :param query_length: number of tokens at the beginning of a text that the query is taken from.
    :raises ValueError: if it is below 1.
    """
    if query_length < 1:
        raise ValueError(f"`query_length` should be at least 1, but is {query_length}.")


class PromptTunedNetwork(nn.Module):
    """Frozen causal model of transformers that puts the prompts a text picks before its tokens.

    Replaces the network of a :class:`~treelora_avalanche.models.LanguageModel`, as peft's models
    do; see :func:`add_prompt_pool`. The query of a text is the mean of the frozen embeddings of its
    first ``query_length`` tokens, and needs no second pass. Prompts take the first positions, where
    no logits are computed::

        network = PromptTunedNetwork(network, pool, query_length=16)
        network(input_ids=tokens, attention_mask=mask).logits

    :param network: the pretrained model, which is frozen in place.
    :param pool: the prompts, of the dimension of the model's embeddings.
    :param query_length: number of tokens that the query is taken from.
    """

    key_distance: Tensor | None = None
    """Key distance of the last batch in training mode, see :meth:`PromptPool.distance`."""

    def __init__(self, network: nn.Module, pool: PromptPool, query_length: int):
        super().__init__()
        self.network: Any = network.requires_grad_(False)
        self.pool = pool
        self.query_length = query_length

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int = 0, **options: Any
    ) -> Any:
        """Returns the output of the network at the tokens.

        :param input_ids: token ids, padded on the right, ``(batch, length)``.
        :param attention_mask: 1 at tokens, 0 at padding, ``(batch, length)``.
        :param logits_to_keep: how many columns of logits, counted from the end; 0: all of the text.
        :param options: further arguments of the network.
        :return: the network's output, its logits ``(batch, length, vocabulary)``.
        """
        # No mask: a causal model does not look to the right, where the padding is.
        return self.network(
            inputs_embeds=self._prompted(input_ids, attention_mask),
            logits_to_keep=logits_to_keep or input_ids.shape[1],
            **options,
        )

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Continues texts; the prompts are put before them once, and then are in the cache.

        :param input_ids: token ids, padded on the left, ``(batch, length)``.
        :param attention_mask: 1 at tokens, 0 at padding, ``(batch, length)``.
        :param options: further arguments of the network's ``generate``.
        :return: the texts and their continuations, ``(batch, length + n_new)``.
        """
        embeddings = self._prompted(input_ids, attention_mask)
        n_prompts = embeddings.shape[1] - input_ids.shape[1]
        mask = torch.cat((attention_mask.new_ones(len(input_ids), n_prompts), attention_mask), 1)
        # Padding first: between prompts and text, a sliding window would count it.
        order = mask.argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        embeddings = embeddings.gather(1, order[:, :, None].expand_as(embeddings))
        new = self.network.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
        return torch.cat((input_ids, new), 1)

    def _prompted(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the embeddings of prompts and text, ``(batch, n_prompts + length, dim)``."""
        with torch.no_grad():
            embeddings = self.network.get_input_embeddings()(tokens)
            queries = mean_over(embeddings, first_tokens(mask, self.query_length))
        picks = self.pool.pick(queries)
        if self.training:
            self.key_distance = self.pool.distance(queries, picks)
        return torch.cat((self.pool.take(picks).to(embeddings.dtype), embeddings), 1)


def check_plain(network: nn.Module) -> None:
    """Raises an error for the network of a language model that carries prompts or LoRA already.

    :param network: the network.
    :raises ValueError: if it does.
    """
    if hasattr(network, "key_distance") or lora_layers(network):
        raise ValueError(
            "`model` should carry neither prompts nor LoRA, but does. Load it again with "
            "create_language_model."
        )


def add_prompt_pool(
    model: LanguageModel, *, pool_size: int, length: int, top_k: int, query_length: int
) -> LanguageModel:
    """Freezes a language model and puts prompts of a pool before its texts.

    Prompts are initialised as embeddings of tokens drawn from the vocabulary (Lester et al. 2021,
    Section 3.2): other values would have a norm unlike all that the model was trained on::

        model = add_prompt_pool(model, pool_size=10, length=5, top_k=5, query_length=16)

    :param model: the model; it is changed in place, after all arguments were checked.
    :param pool_size: see :class:`PromptPool`.
    :param length: see :class:`PromptPool`.
    :param top_k: see :class:`PromptPool`.
    :param query_length: number of tokens at the beginning of a text that the query is taken from.
    :return: the model; its context is shorter by the prompts.
    :raises ValueError: if an argument is out of range, the model carries prompts or LoRA already,
        or its context is too short; it is then unchanged.
    """
    check_query_length(query_length)
    network: Any = model.network
    check_plain(network)
    vocabulary: Tensor = network.get_input_embeddings().weight.detach()
    pool = PromptPool(pool_size=pool_size, length=length, top_k=top_k, dim=vocabulary.shape[1])
    room = model.context - top_k * length
    if model.max_length > room:
        raise ValueError(
            f"`max_length` of the model should be at most {max(room, 0)}, its context of "
            f"{model.context} less `top_k` * `prompt_length` = {top_k * length}, but is "
            f"{model.max_length}. Make the model with a smaller one, or lower `top_k` or "
            "`prompt_length`."
        )
    tokens = torch.randint(len(vocabulary), pool.prompts.shape[:2])
    with torch.no_grad():
        pool.prompts.copy_(vocabulary[tokens.to(vocabulary.device)])
    model.network = PromptTunedNetwork(network, pool, query_length)
    model.context = room
    model.needs_attention_mask = True
    return model
