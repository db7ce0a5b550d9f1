"""Language model that is given demonstrations of a task in its prompt, and is never trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.tokenization import names_special_token
from treelora_avalanche.models.views.generating import GeneratingView


class Demonstrations(NamedTuple):
    """Demonstrations of a task, and the embedding by which the task is recognised.

    >>> Demonstrations(["1 + 1 ="], ["2"], torch.zeros(4)).before("2 + 2 =")
    '1 + 1 = 2\\n\\n2 + 2 ='

    :param prompts: prompts of the demonstrations.
    :param answers: their reference answers.
    :param embedding: mean embedding of the task's training prompts, ``(dim,)``.
    """

    prompts: list[str]
    answers: list[str]
    embedding: Tensor

    def before(self, prompt: str) -> str:
        """Returns the demonstrations and then a prompt, separated by empty lines.

        :param prompt: the prompt to complete.
        """
        shown = [
            p + ("" if p[-1:].isspace() else " ") + a
            for p, a in zip(self.prompts, self.answers, strict=True)
        ]
        return "\n\n".join([*shown, prompt])


class InContextLanguageModel(GeneratingView):
    """Generates after demonstrations of the most similar task.

    No task is named at test time. The task of a prompt is the one whose training prompts' mean
    embedding has the greatest cosine with the mean embedding of the prompt's tokens, both from the
    frozen input layer. Logits are those of the model, without demonstrations::

        view = InContextLanguageModel(model)
        embedding = view.embeddings(prompts).mean(0)
        view.tasks.append(Demonstrations(prompts[:2], answers[:2], embedding))
        view.generate(["2 + 2 ="], max_new_tokens=4)

    :param module: a language model.
    """

    def __init__(self, module: LanguageModel):
        super().__init__()
        self.module = module
        self.tasks: list[Demonstrations] = []

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Returns logits, see :meth:`LanguageModel.forward`.

        :param tokens: token ids, padded on the right with -1, ``(batch, length)``.
        :param last: how many columns of logits, counted from the end, are needed; by default all.
        """
        logits: Tensor = self.module(tokens, last)
        return logits

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Returns the mean embedding of each prompt's tokens, ``(n_prompts, dim)``, on the host.

        :param prompts: the texts, without a chat template, which would be the same for all.
        """
        network: Any = self.module.network
        table = network.get_input_embeddings()
        rows = self.tokenizer(
            list(prompts),
            verbose=False,
            split_special_tokens=any(names_special_token(self.tokenizer, p) for p in prompts),
        )["input_ids"]
        with torch.no_grad():
            # The layer, not its weight: some models scale the embeddings.
            tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
            means = [table(t.to(table.weight.device)).float().mean(0) for t in tokens]
        return torch.stack(means).nan_to_num().cpu()  # the mean of no tokens is NaN

    def nearest_tasks(self, prompts: Sequence[str]) -> list[int]:
        """Returns the most similar task of each prompt, as an index in :attr:`tasks`.

        :param prompts: the texts, at least one; there must be a task.
        """
        tasks = F.normalize(torch.stack([task.embedding for task in self.tasks]), dim=1)
        cosines = F.normalize(self.embeddings(prompts), dim=1) @ tasks.T  # (n_prompts, n_tasks)
        nearest: list[int] = cosines.argmax(1).tolist()
        return nearest

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continues prompts greedily, each after its task's demonstrations.

        What exceeds the model's ``max_length`` loses its beginning: the first demonstrations.

        :param prompts: texts.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: prompts per batch.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, in the order of the prompts.
        """
        texts = list(prompts)
        if self.tasks and texts:
            nearest = self.nearest_tasks(texts)
            texts = [self.tasks[i].before(text) for i, text in zip(nearest, texts, strict=True)]
        with evaluating(self):
            return self.module.generate(texts, max_new_tokens, batch_size, progress)
