"""A language model that chooses, for every text, one of the finished adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.tokens import PADDING, crop, mean_over
from treelora_avalanche.models.views.router import RoutedView, Router, answer_by_adapter, restored


class RoutedLanguageModel(RoutedView):
    """Routes each text to one of the LoRA adapters of a bank, by its beginning.

    The features of a text are the mean of what the frozen network hands to its output layer at the
    first ``query_length`` tokens. A causal model sees nothing to the right of them, so that they
    are the same when the text is trained and when it is to be continued.

    :param module: a language model with LoRA.
    :param bank: the bank of finished adapters.
    :param query_length: tokens at the beginning of a text that its features are taken from.
    """

    module: LanguageModel

    def __init__(self, module: LanguageModel, bank: AdapterBank, query_length: int):
        super().__init__(module)
        self.bank = bank
        self.query_length = query_length

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return self.module.tokenizer

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:  # type: ignore[override]
        """Logits, see :meth:`LanguageModel.forward`; in evaluation of the chosen adapters.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
        """
        if self.training or self.router is None or not len(tokens):
            return self.live(tokens, last)
        return self.routed(tokens, self.router, last)

    def routed(self, tokens: Tensor, router: Router, last: int | None = None) -> Tensor:  # type: ignore[override]
        """Logits of texts, each answered by the adapter that the router takes it for.

        :param tokens: see :meth:`forward`, at least one row.
        :param router: the router.
        :param last: see :meth:`forward`.
        """
        tokens = crop(tokens)
        factors = LoRAFactors(self.module)
        with restored(factors), self.autocasting():
            chosen = self._choose(tokens, router, factors)
            return answer_by_adapter(
                factors, self.bank, chosen, lambda rows: self.module.logits(tokens[rows], last)
            )

    def frozen_features(self, tokens: Tensor) -> Tensor:
        """Features of texts without any adapter, ``(batch, dim)``.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        """
        factors = LoRAFactors(self.module)
        with restored(factors), self.autocasting():
            factors.stack.zero_()  # LoRA's output is BA x: without factors the model is frozen
            return self._features(tokens)

    def _features(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, : self.query_length]
        network: Any = self.module.network
        body = network.get_base_model().base_model  # all but the output layer
        hidden = body(input_ids=tokens.clamp(min=0), use_cache=False).last_hidden_state
        return mean_over(hidden, tokens != PADDING)

    def _choose(self, tokens: Tensor, router: Router, factors: LoRAFactors) -> Tensor:
        factors.stack.zero_()
        return router(self._features(tokens))

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continue prompts greedily, each by its adapter; see :meth:`LanguageModel.generate`.

        :param prompts: texts, or token ids.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: how many are generated together, those of one adapter and of similar
            length.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, in the order of the prompts.
        """
        rows = self.module.encode_prompts(prompts, max_new_tokens)
        if self.router is None or not rows:
            with self.autocasting():
                return self.module.generate(rows, max_new_tokens, batch_size, progress)
        factors = LoRAFactors(self.module)
        answers = [""] * len(rows)
        with evaluating(self), restored(factors), self.autocasting():
            chosen = torch.cat(
                [
                    self._choose(self._beginnings(rows[i : i + batch_size]), self.router, factors)
                    for i in range(0, len(rows), batch_size)
                ]
            )
            for adapter in chosen.unique().tolist():
                members = (chosen == adapter).nonzero().squeeze(1).tolist()
                factors.stack.copy_(self.bank[adapter])
                texts = self.module.generate(
                    [rows[i] for i in members], max_new_tokens, batch_size, progress
                )
                for i, text in zip(members, texts, strict=True):
                    answers[i] = text
        return answers

    def _beginnings(self, rows: list[list[int]]) -> Tensor:
        width = max(1, min(self.query_length, max(map(len, rows))))
        tokens = torch.full((len(rows), width), PADDING)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row[:width])
        return tokens.to(next(self.module.parameters()).device)
