"""Language model that selects one of the finished adapters for each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors
from treelora_avalanche.adapters.mixed import BASE, named_adapters
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import LanguageModel, length_batches
from treelora_avalanche.models.tokens import crop, mean_over, pad_tokens, real_tokens
from treelora_avalanche.models.views.generating import GeneratingView
from treelora_avalanche.models.views.prompt_router import PromptRouter, Route
from treelora_avalanche.models.views.router import RoutedView, Router, forward_by_adapter
from treelora_avalanche.models.views.split_language import SplitLanguageModel


class RoutedLanguageModel(SplitLanguageModel, RoutedView, GeneratingView):
    """Routes each text to one of the LoRA adapters of a bank, by the frozen network's features.

    The features of a text are the mean over its prompt of the hidden states that decoder layer
    ``layer`` receives in the frozen network. In generation, where no layer below is adapted, they
    are taken from the pass over the prompt itself, and cost nothing; the prompts of a batch then go
    on with one adapter each, by peft's ``adapter_names``::

        view = RoutedLanguageModel(add_lora(model, layers="last:10"), bank)
        view.router = router  # set by PromptRouterPlugin
        view.generate(["2 + 2 ="], max_new_tokens=4)
        view.routes  # the adapter of each prompt, and why

    :param module: a language model with LoRA.
    :param bank: the bank of finished adapters.
    :param layer: decoder layer whose input the router reads, from 1; ``"last"`` for the network's
        last hidden states. Default: the lowest adapted layer where at least a third of the layers
        lies below it, else the one at two thirds of the depth.
    :param query_length: number of tokens at the beginning of a text that the features come from;
        default the whole prompt.
    :raises ValueError: if ``layer`` is not one of the model's.
    """

    module: LanguageModel
    router: Router | PromptRouter | None  # type: ignore[assignment]

    def __init__(
        self,
        module: LanguageModel,
        bank: AdapterBank,
        *,
        layer: int | str | None = None,
        query_length: int | None = None,
    ):
        super().__init__(module)
        self.bank = bank
        self.layer = _check_layer(layer, len(self.blocks), self.n_frozen or 0)
        self.query_length = query_length
        self.routes: list[Route] = []
        """Routes of the prompts of the last :meth:`generate`, with a :class:`PromptRouter`."""

    def forward(  # type: ignore[override]
        self, x: Tensor, last: int | None = None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Returns logits, see :meth:`LanguageModel.forward`; routed in evaluation mode.

        :param x: token ids, padded on the right with -1, ``(batch, length)``, or the output of the
            frozen layers for them.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
        :param prompt_lengths: number of tokens of each prompt, ``(batch,)``, which alone the router
            reads; by default it reads the whole text.
        """
        if self.training or self.router is None or not len(x):
            return self.forward_active(x, last)
        return self.routed(x, self.router, last, prompt_lengths)

    def routed(  # type: ignore[override]
        self,
        x: Tensor,
        router: Router | PromptRouter,
        last: int | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Returns logits; each text uses the adapter that the router selects.

        :param x: see :meth:`forward`, at least one text.
        :param router: the router.
        :param last: see :meth:`forward`.
        :param prompt_lengths: see :meth:`forward`.
        """
        x = crop(x)
        factors = LoRAFactors(self.module)
        chosen = router(self.frozen_features(x, prompt_lengths))
        # Not `forward_active`, which would crop the texts of each adapter by themselves.
        logits = self.module.logits if x.ndim == 2 else self.logits_above
        with factors.restored(), self.autocasting():
            return forward_by_adapter(
                factors, self.bank, chosen, lambda rows: logits(x[rows], last)
            )

    def frozen_features(self, x: Tensor, prompt_lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Returns the features of texts without any adapter, ``(batch, dim)``, in float32.

        :param x: see :meth:`forward`.
        :param prompt_lengths: see :meth:`forward`.
        """
        x = x[:, : self.query_length]
        chosen = real_tokens(x)
        if prompt_lengths is not None:
            chosen &= torch.arange(x.shape[1]).to(prompt_lengths) < prompt_lengths[:, None]
        if x.ndim == 3:
            return mean_over(x, chosen)
        factors = LoRAFactors(self.module)
        with evaluating(self), factors.restored(), self.autocasting():
            factors.zero_()
            return mean_over(self._hidden(x), chosen)

    @property
    def reads_inputs(self) -> bool:  # type: ignore[override]
        """Whether the router needs token ids: the frozen layers' output is not what it reads."""
        return self.layer != self.n_frozen

    def _hidden(self, tokens: Tensor) -> Tensor:
        if isinstance(self.layer, int):
            return self.output_below(tokens, self.layer)
        network: Any = self.module.network
        body = network.get_base_model().base_model  # all but the output layer
        hidden: Tensor = body(input_ids=tokens.clamp(min=0), use_cache=False).last_hidden_state
        return hidden

    def route(self, prompts: Sequence[str], batch_size: int = 8) -> list[Route]:
        """Returns the adapter that each prompt would get, and why; nothing is generated.

        :param prompts: texts; of one longer than the model's ``max_length`` the end counts.
        :param batch_size: prompts per batch.
        :raises RuntimeError: before the first task.
        """
        if not isinstance(self.router, PromptRouter):
            raise RuntimeError("there is no router of prompts yet. Train a task first.")
        rows = self.module.encode_prompts(prompts, 1)
        routes: dict[int, Route] = {}
        for batch in length_batches(rows, batch_size):
            features = self._features_of([rows[i] for i in batch])
            routes.update(zip(batch, self.router.routes(features), strict=True))
        return [routes[i] for i in range(len(rows))]

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continues prompts greedily, each with its adapter; see :meth:`LanguageModel.generate`.

        Also sets :attr:`routes`.

        :param prompts: texts, or token ids.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: prompts per batch, of similar length and any task.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, in the order of the prompts.
        """
        self.routes = []
        rows = self.module.encode_prompts(prompts, max_new_tokens)
        if self.router is None or not rows:
            with self.autocasting():
                return self.module.generate(rows, max_new_tokens, batch_size, progress)
        network: Any = self.module.network
        texts = [""] * len(rows)
        order: list[int] = []
        with (
            evaluating(self),
            self.autocasting(),
            uncompiled(self.blocks),
            named_adapters(network, self.bank) as name,
        ):
            for batch in length_batches(rows, batch_size):
                of_batch = [rows[i] for i in batch]
                with self._chosen_adapters(of_batch, self.router, name) as adapters:
                    own = self.module.generate_batch(
                        of_batch, max_new_tokens, adapter_names=adapters
                    )
                for i, text in zip(batch, own, strict=True):
                    texts[i] = text
                order += batch
                if progress is not None:
                    progress(len(batch))
        routes = dict(zip(order, self.routes, strict=False))  # none without a router of prompts
        self.routes = [routes[i] for i in sorted(routes)]
        return texts

    @contextmanager
    def _chosen_adapters(
        self, rows: list[list[int]], router: Router | PromptRouter, name: Callable[[int], str]
    ) -> Iterator[list[str]]:
        """Yields the names of the adapters of a batch, perhaps filled in as the pass goes on."""
        names = [BASE] * len(rows)

        def choose(features: Tensor) -> None:
            names[:] = [name(adapter) for adapter in router(features).tolist()]
            if isinstance(router, PromptRouter):
                self.routes += router.routes(features)

        if not isinstance(self.layer, int) or self.layer > (self.n_frozen or 0):
            choose(self._features_of(rows))
            yield names
            return
        lengths = torch.tensor([len(row) for row in rows])

        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hook.remove()  # only the pass over the prompts, the first one
            hidden = args[0] if args else kwargs["hidden_states"]
            width = hidden.shape[1]  # padded on the left
            prompt = torch.arange(width) >= (width - lengths)[:, None]
            choose(mean_over(hidden, prompt.to(hidden.device)))

        hook = self.blocks[self.layer].register_forward_pre_hook(observe, with_kwargs=True)
        try:
            yield names
        finally:
            hook.remove()

    def _features_of(self, rows: list[list[int]]) -> Tensor:
        device = next(self.module.parameters()).device
        return self.frozen_features(pad_tokens(rows).to(device))


@contextmanager
def uncompiled(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Runs layers as they are inside the context: hooks change what they compute.

    :param layers: the layers, compiled or not.
    """
    before = [layer._compiled_call_impl for layer in layers]
    try:
        for layer in layers:
            layer._compiled_call_impl = None
        yield
    finally:
        for layer, compiled in zip(layers, before, strict=True):
            layer._compiled_call_impl = compiled


def _check_layer(layer: int | str | None, n_layers: int, n_frozen: int) -> int | str:
    if layer is None:
        usual = n_layers * 2 // 3
        return n_frozen if n_frozen >= max(1, n_layers // 3) else min(max(1, usual), n_layers - 1)
    if layer != "last" and not (isinstance(layer, int) and 1 <= layer < n_layers):
        raise ValueError(
            f"`router_layer` should be from 1 to {n_layers - 1} for a model of {n_layers} decoder "
            f"layers, but is {layer!r}."
        )
    return layer
