"""Language model whose layers weigh all tasks' adapters by one shared attention.

The model of SAPT (Zhao et al., ACL 2024, arXiv 2401.08295).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora_avalanche.adapters import LoRAFactors, TrainableView, active_factors, lora_layers
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.token_batches import LengthBatchSampler
from treelora_avalanche.models.tokens import PADDING, mean_over, pad_tokens
from treelora_avalanche.models.views.generating import GeneratingView
from treelora_avalanche.state import check_keys


class SharedAttention(nn.Module):
    """Adapters of all tasks in a model's layers, and the attention that weighs them.

    A layer computes ``W x + s sum_i a_i B_i A_i x``, where s is LoRA's scaling and i runs over the
    tasks, the last of which is being trained (SALS, Section 4.1). The attention of a sample is the
    same in all layers: ``a = softmax(q k_i / sqrt(dim))``, with a trainable key k_i per task, and
    the query q a projection of the mean of the prompt's frozen embeddings: linear down to the
    bottleneck, SiLU, linear up, layer norm. The past factors are stacked along the rank: they cost
    two products per layer, which grow with the number of tasks, as the method demands.

    The past factors are buffers of peft's layers, not part of its ``state_dict``. Stores per task
    ``rank * (n_in + n_out)`` values per layer, and a key of ``dim`` values::

        attention = SharedAttention(add_lora(model), bottleneck=100)
        with attention.attending(attention(means)):  # means: (batch, dim)
            logits = model(tokens)
        attention.fold()  # after a task

    :param model: a language model that carries LoRA.
    :param bottleneck: width of the projection's hidden layer.
    """

    def __init__(self, model: LanguageModel, bottleneck: int):
        super().__init__()
        network: Any = model.network
        like: Tensor = network.get_input_embeddings().weight
        dim = like.shape[1]
        shapes = LoRAFactors(model).shapes
        self.projection = nn.Sequential(
            nn.Linear(dim, bottleneck, bias=False),
            nn.SiLU(),
            nn.Linear(bottleneck, dim, bias=False),
            nn.LayerNorm(dim),
        ).to(like.device)
        self.key = nn.Parameter(torch.empty(dim, device=like.device).uniform_(-1, 1))
        self.past_keys: Tensor
        self.register_buffer("past_keys", self.key.detach().new_empty(0, dim), persistent=False)
        self.inputs: Tensor | None = None
        """Mean embeddings of the last batch's prompts, ``(batch, dim)``."""
        self.scores: Tensor | None = None
        """Scores of the last batch before the softmax, ``(batch, n_tasks)``; the active task is
        last."""
        self.weights: Tensor | None = None
        """The attention in force, ``(batch, n_tasks)``. None: the active adapter alone is used."""
        self._layers: list[Any] = list(lora_layers(model).values())
        for layer, shape in zip(self._layers, shapes, strict=True):
            a, b = active_factors(layer)
            layer.register_buffer("shared_A", a.data.new_empty(0, shape.n_in), persistent=False)
            layer.register_buffer("shared_B", b.data.new_empty(shape.n_out, 0), persistent=False)
            layer.register_forward_hook(self._add_past)
            layer.lora_A[layer.active_adapters[0]].register_forward_hook(self._weigh_active)

    def __len__(self) -> int:
        """Returns the number of past tasks."""
        return len(self.past_keys)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the attention of samples.

        :param inputs: means of embeddings, ``(batch, dim)``.
        :return: ``(batch, n_tasks)``; rows sum to 1.
        """
        keys = torch.cat((self.past_keys, self.key[None]))
        self.inputs = inputs
        self.scores = attention_scores(self.projection, inputs, keys)
        return self.scores.softmax(1)

    @contextmanager
    def attending(self, weights: Tensor) -> Iterator[None]:
        """Weighs the adapters in all layers by an attention, inside the context.

        :param weights: ``(batch, n_tasks)``.
        """
        self.weights = weights
        try:
            yield
        finally:
            if not torch.is_grad_enabled():  # else gradient checkpointing will need it again
                self.weights = None

    def clear_batch(self) -> None:
        """Releases the tensors of the last batch, and with them the graph of its gradients."""
        self.inputs = self.scores = self.weights = None

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the active adapter and its key to those of the past tasks, and starts new ones."""
        for layer in self._layers:
            a, b = active_factors(layer)
            layer.shared_A = torch.cat((layer.shared_A, a))
            layer.shared_B = torch.cat((layer.shared_B, b), 1)
            layer.reset_lora_parameters(layer.active_adapters[0], True)
        self.past_keys = torch.cat((self.past_keys, self.key.detach()[None]))
        self.key.uniform_(-1, 1)

    def teacher(self) -> nn.Module:
        """Returns a frozen copy of the projection as it is now."""
        return copy.deepcopy(self.projection).requires_grad_(False)

    def _weigh_active(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of an active A: B is linear, so that weighing A x weighs B A x."""
        if self.weights is None:
            return output
        return output * self.weights[:, -1, None, None].to(output.dtype)

    def _add_past(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of a layer: adds ``s sum_i a_i B_i A_i x`` of the past tasks."""
        if self.weights is None or layer.disable_adapters or not len(self):
            return output
        rank = len(layer.shared_A) // len(self)
        inner = F.linear(inputs[0].to(layer.shared_A.dtype), layer.shared_A)
        weights = self.weights[:, :-1].repeat_interleave(rank, 1)[:, None]  # (batch, 1, n * rank)
        past = F.linear(inner * weights.to(inner.dtype), layer.shared_B)
        scaling: float = layer.scaling[layer.active_adapters[0]]
        return (output + scaling * past).to(output.dtype)

    def past_state(self) -> dict[str, Any]:
        """Returns the past factors and keys, not copied; the active ones are parameters."""
        return {
            "A": [layer.shared_A for layer in self._layers],
            "B": [layer.shared_B for layer in self._layers],
            "keys": self.past_keys,
        }

    def load_past_state(self, state: dict[str, Any]) -> None:
        """Replaces the past tasks by those of a state.

        :param state: return value of :meth:`past_state`.
        :raises ValueError: if it does not fit the model; the past is then unchanged.
        """
        check_keys(state, {"A", "B", "keys"}, "the past tasks of SAPT")
        n_tasks = len(state["keys"])
        expected = [
            ((n_tasks * len(a), a.shape[1]), (len(b), n_tasks * len(a)))
            for a, b in map(active_factors, self._layers)
        ]
        found = [
            (tuple(a.shape), tuple(b.shape)) for a, b in zip(state["A"], state["B"], strict=False)
        ]
        if found != expected or state["keys"].shape[1] != len(self.key):
            raise ValueError(
                f"the past adapters in the state should be {expected} with keys of "
                f"{len(self.key)}, but are {found} with keys {tuple(state['keys'].shape)}; build "
                "the model with the same rank, layers and target_modules."
            )
        for layer, a, b in zip(self._layers, state["A"], state["B"], strict=True):
            layer.shared_A = a.detach().to(layer.shared_A, copy=True)
            layer.shared_B = b.detach().to(layer.shared_B, copy=True)
        self.past_keys = state["keys"].detach().to(self.past_keys, copy=True)


def attention_scores(projection: nn.Module, inputs: Tensor, keys: Tensor) -> Tensor:
    """Returns the scores of the attention, ``q k_i / sqrt(dim)``, in float32.

    :param projection: from inputs to queries.
    :param inputs: means of embeddings, ``(batch, dim)``. They are normalised first: the embeddings
        of pretrained models differ in scale by orders of magnitude.
    :param keys: ``(n_tasks, dim)``.
    :return: ``(batch, n_tasks)``.
    """
    root = math.sqrt(inputs.shape[1])
    with torch.autocast(inputs.device.type, enabled=False):
        queries: Tensor = projection(root * F.normalize(inputs, dim=1))
        return queries @ keys.T / root


class AttentiveLanguageModel(TrainableView, GeneratingView):
    """Weighs the adapters of all tasks by the attention of each text's prompt.

    The attention of a text is computed once, from its prompt alone, and holds for all its tokens;
    so it is the same in training and in generation, and no token of the answer affects it. It does
    not depend on the rest of the batch::

        view = AttentiveLanguageModel(add_lora(model), bottleneck=100)
        logits = view(tokens, n_prompt=n_prompt)  # (batch, vocabulary, length)

    :param module: a language model with LoRA.
    :param bottleneck: see :class:`SharedAttention`.
    """

    module: LanguageModel

    def __init__(self, module: LanguageModel, bottleneck: int):
        super().__init__(module)
        self.attention = SharedAttention(module, bottleneck)

    def forward(
        self, tokens: Tensor, last: int | None = None, n_prompt: Tensor | None = None
    ) -> Tensor:
        """Returns logits, see :meth:`LanguageModel.forward`.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
        :param n_prompt: number of tokens of each prompt, ``(batch,)``; by default all tokens of a
            text are its prompt.
        """
        with self.attention.attending(self.attention(self._inputs(tokens, n_prompt))):
            return self.forward_active(tokens, last)

    def _inputs(self, tokens: Tensor, n_prompt: Tensor | None = None) -> Tensor:
        """Means of the frozen embeddings of prompts, ``(batch, dim)``."""
        chosen = tokens != PADDING
        if n_prompt is not None:
            chosen &= torch.arange(tokens.shape[1], device=tokens.device) < n_prompt[:, None]
        network: Any = self.module.network
        with torch.no_grad():
            return mean_over(network.get_input_embeddings()(tokens.clamp(min=0)), chosen)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continues prompts greedily; see :meth:`LanguageModel.generate`.

        :param prompts: texts, or token ids.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: prompts per batch, all of similar length.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, in the order of the prompts.
        :raises ValueError: if ``max_new_tokens`` or ``batch_size`` is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` should be at least 1, but is {batch_size}.")
        rows = self.module.encode_prompts(prompts, max_new_tokens)
        texts = [""] * len(rows)
        device = self.attention.key.device
        with evaluating(self), self.autocasting():
            # The order of the model's own batches, which the attention has to follow.
            for batch in LengthBatchSampler([*map(len, rows)], batch_size, shuffle=False):
                given = [rows[i] for i in batch]
                inputs = self._inputs(pad_tokens(given).to(device))
                with self.attention.attending(self.attention(inputs)):
                    own = self.module.generate(given, max_new_tokens, batch_size, progress)
                for i, text in zip(batch, own, strict=True):
                    texts[i] = text
        return texts
