"""Language model that selects one of the finished adapters for each text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.tokens import PADDING, crop, mean_over, pad_tokens
from treelora_avalanche.models.views.generating import GeneratingView
from treelora_avalanche.models.views.router import RoutedView, Router, forward_by_adapter


class RoutedLanguageModel(RoutedView, GeneratingView):
    """Routes each text to one of the LoRA adapters of a bank, by its first tokens.

    The features of a text are the mean of the frozen network's last hidden states at the first
    ``query_length`` tokens. A causal model does not look to the right of them, so they are the same
    in training and in generation::

        view = RoutedLanguageModel(add_lora(model), bank, query_length=16)
        view.router = router
        view.generate(["2 + 2 ="], max_new_tokens=4)

    :param module: a language model with LoRA.
    :param bank: the bank of finished adapters.
    :param query_length: number of tokens at the beginning of a text that its features come from.
    """

    module: LanguageModel

    def __init__(self, module: LanguageModel, bank: AdapterBank, query_length: int):
        super().__init__(module)
        self.bank = bank
        self.query_length = query_length

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:  # type: ignore[override]
        """Returns logits, see :meth:`LanguageModel.forward`; routed in evaluation mode.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
        """
        if self.training or self.router is None or not len(tokens):
            return self.forward_active(tokens, last)
        return self.routed(tokens, self.router, last)

    def routed(self, tokens: Tensor, router: Router, last: int | None = None) -> Tensor:  # type: ignore[override]
        """Returns logits; each text uses the adapter that the router selects.

        :param tokens: see :meth:`forward`, at least one text.
        :param router: the router.
        :param last: see :meth:`forward`.
        """
        tokens = crop(tokens)
        factors = LoRAFactors(self.module)
        with factors.restored(), self.autocasting():
            chosen = self._choose(tokens, router, factors)
            return forward_by_adapter(
                factors, self.bank, chosen, lambda rows: self.module.logits(tokens[rows], last)
            )

    def frozen_features(self, tokens: Tensor) -> Tensor:
        """Returns the features of texts without any adapter, ``(batch, dim)``.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        """
        factors = LoRAFactors(self.module)
        with factors.restored(), self.autocasting():
            factors.zero_()
            return self._features(tokens)

    def _features(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, : self.query_length]
        network: Any = self.module.network
        body = network.get_base_model().base_model  # all but the output layer
        hidden = body(input_ids=tokens.clamp(min=0), use_cache=False).last_hidden_state
        return mean_over(hidden, tokens != PADDING)

    def _choose(self, tokens: Tensor, router: Router, factors: LoRAFactors) -> Tensor:
        factors.zero_()
        return router(self._features(tokens))

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continues prompts greedily, each with its adapter; see :meth:`LanguageModel.generate`.

        :param prompts: texts, or token ids.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: prompts per batch, all of one adapter and of similar length.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, in the order of the prompts.
        """
        rows = self.module.encode_prompts(prompts, max_new_tokens)
        if self.router is None or not rows:
            with self.autocasting():
                return self.module.generate(rows, max_new_tokens, batch_size, progress)
        factors = LoRAFactors(self.module)
        texts = [""] * len(rows)
        with evaluating(self), factors.restored(), self.autocasting():
            chosen = self._choose_for(rows, batch_size, self.router, factors)
            for adapter in chosen.unique().tolist():
                members = (chosen == adapter).nonzero().squeeze(1).tolist()
                factors.stack.copy_(self.bank[adapter])
                own = self.module.generate(
                    [rows[i] for i in members], max_new_tokens, batch_size, progress
                )
                for i, text in zip(members, own, strict=True):
                    texts[i] = text
        return texts

    def _choose_for(
        self, rows: list[list[int]], batch_size: int, router: Router, factors: LoRAFactors
    ) -> Tensor:
        device = next(self.module.parameters()).device
        starts = [row[: self.query_length] for row in rows]
        batches = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]
        return torch.cat(
            [self._choose(pad_tokens(batch).to(device), router, factors) for batch in batches]
        )
