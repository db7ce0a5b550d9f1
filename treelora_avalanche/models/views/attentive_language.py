"""A language model whose layers answer with all tasks' adapters, weighed by one attention.

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

from treelora_avalanche.adapters import LoRAFactors, TrainableView, lora_layers
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.tokens import PADDING, mean_over
from treelora_avalanche.state import check_keys


class SharedAttention(nn.Module):
    """Adapters of all tasks in a model's layers, and the attention that weighs them.

    A layer computes ``W x + s sum_i a_i B_i A_i x``, ``s`` being LoRA's scaling and i running over
    the tasks, the last of which is being trained (SALS, Section 4.1). The attention of a sample is
    the same in all layers: ``a = softmax(q k_i / sqrt(dim))``, with a trainable key k_i per task,
    and the query q a projection of the mean of the prompt's frozen embeddings: to the bottleneck,
    SiLU, and back, then a layer norm. The past factors are stacked along the rank: their work is
    two products, and grows with the number of tasks, as the method demands.

    The past factors stand in peft's layers as buffers that are not part of its ``state_dict``.
    Stores per task ``rank * (n_in + n_out)`` values per layer, and a key of ``dim`` values.

    :param model: a language model that carries LoRA.
    :param bottleneck: width of the projection's middle.
    """

    def __init__(self, model: LanguageModel, bottleneck: int):
        super().__init__()
        shapes = LoRAFactors(model).shapes
        network: Any = model.network
        like: Tensor = network.get_input_embeddings().weight
        dim = like.shape[1]
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
        """What the queries of the last batch were made of, ``(batch, dim)``."""
        self.scores: Tensor | None = None
        """Of the last batch, before the softmax, ``(batch, n_tasks)``; the live task is last."""
        self.weights: Tensor | None = None
        """The attention in force, ``(batch, n_tasks)``. None: the live adapter alone answers."""
        self._layers: list[Any] = list(lora_layers(model).values())
        for layer, shape in zip(self._layers, shapes, strict=True):
            a, b = _live(layer)
            layer.register_buffer("shared_A", a.data.new_empty(0, shape.n_in), persistent=False)
            layer.register_buffer("shared_B", b.data.new_empty(shape.n_out, 0), persistent=False)
            layer.register_forward_hook(self._add_past)
            layer.lora_A[layer.active_adapters[0]].register_forward_hook(self._weigh_live)

    def __len__(self) -> int:
        """Number of past tasks."""
        return len(self.past_keys)

    def forward(self, inputs: Tensor) -> Tensor:
        """The attention of samples.

        :param inputs: means of embeddings, ``(batch, dim)``.
        :return: ``(batch, n_tasks)``; rows sum to 1.
        """
        keys = torch.cat((self.past_keys, self.key[None]))
        self.inputs = inputs
        self.scores = attention_scores(self.projection, inputs, keys)
        return self.scores.softmax(1)

    @contextmanager
    def attending(self, weights: Tensor) -> Iterator[None]:
        """A context in which the layers answer by an attention.

        :param weights: ``(batch, n_tasks)``.
        """
        self.weights = weights
        try:
            yield
        finally:
            if not torch.is_grad_enabled():  # else gradient checkpointing will need it again
                self.weights = None

    def forget_batch(self) -> None:
        """Let the last batch go, and with it the graph of its gradients."""
        self.inputs = self.scores = self.weights = None

    @torch.no_grad()
    def fold(self) -> None:
        """Make the live adapter and its key those of a past task, and start new ones."""
        for layer in self._layers:
            a, b = _live(layer)
            layer.shared_A = torch.cat((layer.shared_A, a))
            layer.shared_B = torch.cat((layer.shared_B, b), 1)
            layer.reset_lora_parameters(layer.active_adapters[0], True)
        self.past_keys = torch.cat((self.past_keys, self.key.detach()[None]))
        self.key.uniform_(-1, 1)

    def teacher(self) -> nn.Module:
        """A frozen copy of the projection as it is now."""
        return copy.deepcopy(self.projection).requires_grad_(False)

    def _weigh_live(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of a live A: B is linear, so that weighing A x weighs B A x."""
        if self.weights is None:
            return output
        return output * self.weights[:, -1, None, None].to(output.dtype)

    def _add_past(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of a layer."""
        if self.weights is None or layer.disable_adapters or not len(self):
            return output
        rank = len(layer.shared_A) // len(self)
        inner = F.linear(inputs[0].to(layer.shared_A.dtype), layer.shared_A)
        weights = self.weights[:, :-1].repeat_interleave(rank, 1)[:, None]  # (batch, 1, n * rank)
        past = F.linear(inner * weights.to(inner.dtype), layer.shared_B)
        scaling: float = layer.scaling[layer.active_adapters[0]]
        return (output + scaling * past).to(output.dtype)

    def past_state(self) -> dict[str, Any]:
        """Factors and keys of the past tasks, not copied. What is live, the model's state holds."""
        return {
            "A": [layer.shared_A for layer in self._layers],
            "B": [layer.shared_B for layer in self._layers],
            "keys": self.past_keys,
        }

    def load_past_state(self, state: dict[str, Any]) -> None:
        """Take the past of a state in place of the present one.

        :param state: what :meth:`past_state` returned.
        :raises ValueError: if it does not fit the model; the past is then as it was.
        """
        check_keys(state, {"A", "B", "keys"}, "the past tasks of SAPT")
        n_tasks = len(state["keys"])
        expected = [
            ((n_tasks * len(a), a.shape[1]), (len(b), n_tasks * len(a)))
            for a, b in map(_live, self._layers)
        ]
        found = [
            (tuple(a.shape), tuple(b.shape)) for a, b in zip(state["A"], state["B"], strict=False)
        ]
        if found != expected or state["keys"].shape[1] != len(self.key):
            raise ValueError(
                f"the past adapters in the state are {found} and the keys "
                f"{tuple(state['keys'].shape)}, and the model takes {expected} and keys of "
                f"{len(self.key)}; build it with the same rank, layers and target_modules."
            )
        for layer, a, b in zip(self._layers, state["A"], state["B"], strict=True):
            layer.shared_A = a.detach().to(layer.shared_A, copy=True)
            layer.shared_B = b.detach().to(layer.shared_B, copy=True)
        self.past_keys = state["keys"].detach().to(self.past_keys, copy=True)


def attention_scores(projection: nn.Module, inputs: Tensor, keys: Tensor) -> Tensor:
    """What the softmax of the attention is taken of: ``q k_i / sqrt(dim)``, in float32.

    :param projection: makes queries.
    :param inputs: means of embeddings, ``(batch, dim)``. They are brought to one length first:
        the embeddings of pretrained models differ in scale by orders of magnitude.
    :param keys: ``(n_tasks, dim)``.
    :return: ``(batch, n_tasks)``.
    """
    root = math.sqrt(inputs.shape[1])
    with torch.autocast(inputs.device.type, enabled=False):
        queries: Tensor = projection(root * F.normalize(inputs, dim=1))
        return queries @ keys.T / root


def _live(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    adapter = layer.active_adapters[0]
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return a.get_parameter("weight"), b.get_parameter("weight")


class AttentiveLanguageModel(TrainableView):
    """Answers each text with the adapters of all tasks, by the attention of its prompt.

    The attention of a text is computed once, from its prompt alone, and holds for all its tokens;
    so it is the same when an answer is trained and when it is generated, and no token of the answer
    has a part in it. It does not depend on the rest of the batch.

    :param module: a language model with LoRA.
    :param bottleneck: see :class:`SharedAttention`.
    """

    module: LanguageModel

    def __init__(self, module: LanguageModel, bottleneck: int):
        super().__init__(module)
        self.attention = SharedAttention(module, bottleneck)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return self.module.tokenizer

    def forward(
        self, tokens: Tensor, last: int | None = None, n_prompt: Tensor | None = None
    ) -> Tensor:
        """Logits, see :meth:`LanguageModel.forward`.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
        :param n_prompt: how many tokens of each row are its prompt, ``(batch,)``; tokens alone do
            not tell. By default the rows are prompts as a whole.
        """
        with self.attention.attending(self.attention(self._inputs(tokens, n_prompt))):
            return self.live(tokens, last)

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
        """Continue prompts greedily; see :meth:`LanguageModel.generate`.

        :param prompts: texts, or token ids.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: how many are generated together, those of similar length.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, in the order of the prompts.
        :raises ValueError: if ``max_new_tokens`` or ``batch_size`` leave nothing to do.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, and is {batch_size}.")
        rows = self.module.encode_prompts(prompts, max_new_tokens)
        answers = [""] * len(rows)
        # In the order in which the model would take them: it sorts a batch by length, too.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with evaluating(self), self.autocasting():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                given = [rows[i] for i in batch]
                with self.attention.attending(self.attention(self._inputs(self._padded(given)))):
                    texts = self.module.generate(given, max_new_tokens, batch_size, progress)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
        return answers

    def _padded(self, rows: list[list[int]]) -> Tensor:
        tokens = torch.full((len(rows), max(1, *map(len, rows))), PADDING)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        return tokens.to(self.attention.key.device)
