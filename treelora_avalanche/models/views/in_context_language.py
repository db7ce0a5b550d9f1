"""Language model that is given demonstrations of a task in its prompt, and is never trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.tokenization import encode_prompt, names_special_token
from treelora_avalanche.models.views.generating import GeneratingView

ANSWER_FORMS = ("letter", "line", "paragraph", "text")
"""Forms of a task's answers, from which the end of a generated answer is known."""


def answer_form(answers: Sequence[str]) -> str:
    """Returns the form that all answers of a task have, the narrowest in :data:`ANSWER_FORMS`.

    >>> answer_form(["A", "C"]), answer_form(["12", "3.5"]), answer_form(["B\\nsince ..."])
    ('letter', 'line', 'paragraph')

    :param answers: reference answers of the training samples.
    """
    if any(answer[:1].isspace() for answer in answers):
        return "text"  # white space that counts would be cut
    if all(len(answer) == 1 and answer.isalpha() for answer in answers):
        return "letter"
    if not any("\n" in answer for answer in answers):
        return "line"
    return "text" if any("\n\n" in answer for answer in answers) else "paragraph"


class Demonstrations(NamedTuple):
    """Demonstrations of a task, and the embedding by which the task is recognised.

    >>> Demonstrations(["1 + 1 ="], ["2"], torch.zeros(4)).before("2 + 2 =")
    '1 + 1 = 2\\n\\n2 + 2 ='

    :param prompts: prompts of the demonstrations.
    :param answers: their reference answers.
    :param embedding: mean embedding of the task's training prompts, ``(dim,)``.
    :param form: form of the task's answers, one of :data:`ANSWER_FORMS`.
    """

    prompts: list[str]
    answers: list[str]
    embedding: Tensor
    form: str = "text"

    def before(self, prompt: str, n: int | None = None) -> str:
        """Returns the demonstrations and then a prompt, separated by empty lines.

        :param prompt: the prompt to complete.
        :param n: number of demonstrations, the last ones; None for all.
        """
        shown = [
            p + ("" if p[-1:].isspace() else " ") + a
            for p, a in zip(self.prompts, self.answers, strict=True)
        ]
        return "\n\n".join([*(shown if n is None else shown[len(shown) - n :]), prompt])

    def answer_in(self, text: str) -> str:
        """Returns the answer at the beginning of a generated text, as TRACE extracts it.

        A model that continues demonstrations continues after its answer: with another prompt. The
        answer is the first letter, line or paragraph, as in the training answers.

        >>> Demonstrations([], [], torch.zeros(4), "letter").answer_in(" C. Neutral")
        'C'

        :param text: the generated text.
        """
        if self.form == "text":
            return text
        text = text.lstrip()
        ends = {"letter": 1, "line": text.find("\n"), "paragraph": text.find("\n\n")}
        end = ends[self.form]
        return (text if end < 0 else text[:end]).rstrip()


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

    def n_tokens(self, text: str) -> int:
        """Returns the number of tokens of a prompt, with the chat template if there is one.

        :param text: the prompt.
        """
        return len(encode_prompt(self.tokenizer, text, sys.maxsize))

    def _with_demonstrations(self, task: Demonstrations, prompt: str, room: int) -> str:
        """Returns a prompt after as many demonstrations as fit whole, the last ones."""
        for n in range(len(task.prompts), 0, -1):
            text = task.before(prompt, n)
            if self.n_tokens(text) <= room:
                return text
        return prompt

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int = 8,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continues prompts greedily, each after its task's demonstrations.

        Where a prompt leaves no room for all of them within the model's ``max_length``, the first
        are left out. The answer is extracted from the continuation, see
        :meth:`Demonstrations.answer_in`.

        :param prompts: texts.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: prompts per batch.
        :param progress: called with the number of prompts that have just been finished.
        :return: the answers alone, in the order of the prompts.
        """
        texts = list(prompts)
        tasks: list[Demonstrations] = []
        if self.tasks and texts:
            tasks = [self.tasks[i] for i in self.nearest_tasks(texts)]
            room = self.module.prompt_room(max_new_tokens)
            texts = [
                self._with_demonstrations(task, text, room)
                for task, text in zip(tasks, texts, strict=True)
            ]
        with evaluating(self):
            generated = self.module.generate(texts, max_new_tokens, batch_size, progress)
        if not tasks:
            return generated
        return [task.answer_in(text) for task, text in zip(tasks, generated, strict=True)]
