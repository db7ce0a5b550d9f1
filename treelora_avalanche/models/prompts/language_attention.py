"""Language models with DualPrompt's prefixes in their attention.

A prefix is keys and values put before those of the text, in some layers only. The caches of
transformers hold equally many positions in every layer, so that prefixes cannot be put there; they
are added where all models of transformers call their attention (``AttentionInterface``), after the
cache, which stays that of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.prompts.language_input import check_plain, check_query_length
from treelora_avalanche.models.prompts.pools import DualPrompted, TaskPrompts, check_dual_prompts
from treelora_avalanche.models.tokens import first_tokens, mean_over

PREFIXED = "treelora_prefixed"
"""Name under which transformers knows the attention with prefixes."""


def attention_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """Returns the attention to the tokens that the mask allows, and to the prefix of a layer.

    ``softmax(q [p_k; k]^T / sqrt(head_dim)) [p_v; v]``, called by transformers. The prefix
    ``(batch or 1, 2, length, n_heads, head_dim)``, keys and values, is the attribute ``prefix`` of
    the module, if it has one. It has no position, and every token sees it.

    :param module: the attention of a layer.
    :param query: ``(batch, n_query_heads, n_queries, head_dim)``.
    :param key: ``(batch, n_heads, n_keys, head_dim)``, those in the cache included.
    :param value: as ``key``.
    :param attention_mask: true where a query sees a key, ``(batch, 1, n_queries, n_keys)``.
    :param options: further arguments of the attention.
    :return: ``(batch, n_queries, n_query_heads, head_dim)``, and no weights.
    """
    prefix: Tensor | None = getattr(module, "prefix", None)
    if prefix is not None:
        prefix = prefix.to(key.dtype).expand(len(key), *prefix.shape[1:])
        prefix_key, prefix_value = prefix.transpose(2, 3).unbind(1)
        key, value = torch.cat((prefix_key, key), 2), torch.cat((prefix_value, value), 2)
        attention_mask = F.pad(attention_mask, (prefix_key.shape[2], 0), value=True)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _whole_mask(*args: Any, **options: Any) -> Tensor:
    """Returns an explicit mask: the causal shortcut would be wrong with a prefix."""
    options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask = sdpa_mask(*args, **options)
    return cast(Tensor, mask)


AttentionInterface.register(PREFIXED, attention_with_prefix)
AttentionMaskInterface.register(PREFIXED, _whole_mask)


class DualPromptedNetwork(DualPrompted):
    """Causal model of transformers with DualPrompt's prefixes, see :class:`DualPrompted`.

    Replaces the network of a :class:`~treelora_avalanche.models.LanguageModel`; see
    :func:`add_dual_prompts`. The query is that of
    :class:`~treelora_avalanche.models.prompts.language_input.PromptTunedNetwork`::

        experts = add_dual_prompts(model, general_layers=(0, 1), ...)
        model.network  # a DualPromptedNetwork
        experts.fold()  # after a task

    :param network: the pretrained model, frozen, with the attention :data:`PREFIXED`.
    :param general: the general prefixes, ``(n_layers, 2, length, n_heads, head_dim)``.
    :param experts: the expert prefixes, ``(n_layers, 2, length, n_heads, head_dim)`` each.
    :param general_layers: layer numbers of the general prefixes.
    :param expert_layers: layer numbers of the expert prefixes.
    :param query_length: number of tokens that the query is taken from.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        general: Tensor,
        experts: TaskPrompts,
        general_layers: tuple[int, ...],
        expert_layers: tuple[int, ...],
        query_length: int,
    ):
        super().__init__()
        self.network: Any = network
        self.general = nn.Parameter(general)
        self.experts = experts
        self.general_layers, self.expert_layers = general_layers, expert_layers
        self.query_length = query_length

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Returns the output of the network at the tokens.

        :param input_ids: token ids, padded on the right, ``(batch, length)``.
        :param attention_mask: 1 at tokens, 0 at padding, ``(batch, length)``.
        :param options: further arguments of the network.
        :return: the network's output.
        """
        with self._prefixed(self.prefixes(self._queries(input_ids, attention_mask))):
            # No mask: a causal model does not look to the right, where the padding is.
            return self.network(input_ids=input_ids, **options)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Continues texts; the prefixes are selected once, and used at every token.

        :param input_ids: token ids, padded on the left, ``(batch, length)``.
        :param attention_mask: 1 at tokens, 0 at padding, ``(batch, length)``.
        :param options: further arguments of the network's ``generate``.
        :return: the texts and their continuations, ``(batch, length + n_new)``.
        """
        with self._prefixed(self.prefixes(self._queries(input_ids, attention_mask))):
            found: Tensor = self.network.generate(
                input_ids=input_ids, attention_mask=attention_mask, **options
            )
        return found

    def _queries(self, tokens: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            embeddings = self.network.get_input_embeddings()(tokens)
            return mean_over(embeddings, first_tokens(mask, self.query_length))

    @contextmanager
    def _prefixed(self, prefixes: Mapping[int, Tensor]) -> Iterator[None]:
        """Gives the layers their prefixes, and removes them at the end: they hold a graph."""
        # Of all modules with the number of a layer, the attention alone reads it.
        holders = [m for m in self.network.modules() if getattr(m, "layer_idx", None) in prefixes]
        for module in holders:
            module.prefix = prefixes[module.layer_idx]
        try:
            yield
        finally:
            for module in holders:
                del module.prefix


def add_dual_prompts(
    model: LanguageModel,
    *,
    general_layers: tuple[int, ...],
    general_length: int,
    expert_layers: tuple[int, ...],
    expert_length: int,
    query_length: int,
) -> TaskPrompts:
    """Freezes a language model and gives general and expert prefixes to its layers.

    Prefixes are initialised as the keys and values of tokens drawn from the vocabulary (Li & Liang
    2021, Section 4.3: activations of words, rather than random numbers).

    :param model: the model; it is changed in place, after all arguments were checked.
    :param general_layers: layer numbers, counted from 0, of the general prefixes.
    :param general_length: their length.
    :param expert_layers: layer numbers of the expert prefixes.
    :param expert_length: their length.
    :param query_length: number of tokens at the beginning of a text that the query is taken from.
    :return: the expert prefixes.
    :raises ValueError: if an argument is out of range, or the model does not support prefixes; it
        is then unchanged.
    """
    check_query_length(query_length)
    network: Any = model.network
    check_plain(network)
    check_dual_prompts(
        general_layers=general_layers,
        general_length=general_length,
        expert_layers=expert_layers,
        expert_length=expert_length,
        n_layers=network.config.get_text_config().num_hidden_layers,
    )
    _check_supports_prefixes(network)
    network.requires_grad_(False)
    general = _activations(network, general_layers, general_length)
    experts = TaskPrompts(
        (len(expert_layers), *general.shape[1:2], expert_length, *general.shape[3:]),
        key_dim=network.get_input_embeddings().embedding_dim,
    )
    with torch.no_grad():
        experts.active.copy_(_activations(network, expert_layers, expert_length))
    network.set_attn_implementation(PREFIXED)
    model.network = DualPromptedNetwork(
        network,
        general=general,
        experts=experts.to(general.device),
        general_layers=general_layers,
        expert_layers=expert_layers,
        query_length=query_length,
    )
    model.needs_attention_mask = True
    return experts


def _check_supports_prefixes(network: Any) -> None:
    if not network._can_set_attn_implementation():
        raise ValueError(
            "`model` should use the attention interface of transformers for prefixes, but "
            f"{type(network).__name__} does not. Choose a model such as Llama's."
        )
    if network.is_gradient_checkpointing:
        # The recomputation runs when the prefixes are removed.
        raise ValueError(
            "`model` should have no gradient checkpointing, which prefixes do not support, but "
            "has. Make it with gradient_checkpointing=False."
        )


@torch.no_grad()
def _activations(network: Any, layers: tuple[int, ...], length: int) -> Tensor:
    """Returns the keys and values of drawn tokens, ``(n_layers, 2, length, n_heads, head_dim)``."""
    embedding = network.get_input_embeddings()
    tokens = torch.randint(embedding.num_embeddings, (1, length)).to(embedding.weight.device)
    cache = network(input_ids=tokens, use_cache=True).past_key_values
    pairs = [torch.stack((cache.layers[i].keys[0], cache.layers[i].values[0])) for i in layers]
    return torch.stack(pairs).transpose(2, 3).float().contiguous()
