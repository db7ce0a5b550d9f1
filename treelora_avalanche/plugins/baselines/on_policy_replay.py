"""On-policy replay (Chen et al. 2026, arXiv 2605.29495): replays the model's own generations."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from treelora_avalanche.adapters import find_host
from treelora_avalanche.adapters.trainable_view import active_forward, evaluating
from treelora_avalanche.models.token_datasets import generated_dataset
from treelora_avalanche.models.token_loss import TokenCrossEntropy
from treelora_avalanche.models.tokenization import encode_sample
from treelora_avalanche.state import check_keys, check_same_settings


class PastPrompts(NamedTuple):
    """Prompts of one task, without reference answers.

    >>> PastPrompts(["2 + 2 ="], max_new_tokens=4)

    :param prompts: the texts.
    :param max_new_tokens: limit of a generated answer.
    """

    prompts: list[str]
    max_new_tokens: int


class OnPolicyReplayPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Trains on the model's own generations for past prompts, together with each new task.

    After a task, keeps a random ``replay_share`` of its training prompts, without their reference
    answers. Before task t the current model generates greedily for the prompts of all t - 1 past
    tasks; of each, the share ``1 / (t - 1)`` with the highest mean log-probability per token is
    added to the task's training data: as many in all as prompts are kept of one task.
    The loss is the usual one; the past texts are shuffled among the new ones.

    This is the paper's variant OPR-SC (self-confidence). The paper selects among *all* past
    training prompts, samples at temperature 0.1, and scores by the task's metric in its other
    variant, OPR-RU, which needs past reference answers; here only the kept prompts are candidates,
    so that nothing else of the past is needed, and before the second task all of them are used.
    Generations that are empty are left out.

    Costs one generation, and one forward pass, per kept prompt and task. Stores the prompts. Task
    labels are not used. Example::

        strategy = Naive(language_view, plugins=[OnPolicyReplayPlugin(replay_share=0.1)])

    :param replay_share: share of a task's prompts, above 0 and at most 1; at least one prompt. The
        paper's are 0.01 and 0.1.
    :param seed: seed of the draw.
    :raises ValueError: if ``replay_share`` is out of range.
    """

    def __init__(self, replay_share: float = 0.1, seed: int = 0):
        super().__init__()
        if not 0 < replay_share <= 1:
            raise ValueError(
                f"`replay_share` should be above 0 and at most 1, but is {replay_share}. The "
                "paper's are 0.01 and 0.1."
            )
        self.replay_share = replay_share
        self.seed = seed
        self.tasks: list[PastPrompts] = []

    @property
    def stored_texts(self) -> list[str]:
        """All prompts that are kept."""
        return [prompt for task in self.tasks for prompt in task.prompts]

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Adds generations for past prompts to the training data of the experience."""
        experience = strategy.experience
        if not getattr(experience, "prompts", None):
            raise ValueError(
                f"experience {experience.current_experience} should have texts in `prompts`, which "
                "OnPolicyReplay keeps, but has none. Set this attribute, as "
                "`treelora_avalanche.scenarios.TRACE` does."
            )
        width = len(experience.dataset[0][0])
        samples = [
            sample for task in self.tasks for sample in self._replayed(strategy, task, width)
        ]
        if samples:
            # A copy, so that the benchmark's own experience keeps its samples.
            strategy.experience = copy.copy(experience)
            strategy.experience._dataset = experience.dataset.concat(
                generated_dataset(samples, width)
            )

    def _replayed(self, strategy: Any, task: PastPrompts, width: int) -> list[Any]:
        """Returns the generations for a task that are replayed, encoded."""
        host: Any = find_host(strategy.model)
        texts = host.generate(task.prompts, task.max_new_tokens, strategy.eval_mb_size)
        pairs = [pair for pair in zip(task.prompts, texts, strict=True) if pair[1].strip()]
        if not pairs:
            return []
        samples = [encode_sample(host.tokenizer, *pair, width) for pair in pairs]
        confidence = self._confidence(strategy, generated_dataset(samples, width))
        n = max(1, len(task.prompts) // len(self.tasks))
        best = confidence.argsort(descending=True, stable=True)[:n]
        return [samples[i] for i in sorted(best.tolist())]

    def _confidence(self, strategy: Any, dataset: Any) -> Tensor:
        """Returns the mean log-probability of each answer's tokens, ``(n_samples,)``."""
        loss, forward = TokenCrossEntropy(reduction="none"), active_forward(strategy.model)
        with evaluating(strategy.model):
            # One by one: which kernels run, and so the last bits, would depend on the batch.
            scores = [
                -loss(forward(x[None].to(strategy.device)), y[None].to(strategy.device))
                for x, y, *_ in dataset
            ]
        return torch.cat(scores).cpu()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps prompts of the experience."""
        experience = strategy.experience
        prompts = experience.prompts
        generator = torch.Generator().manual_seed(self.seed + len(self.tasks))
        n = max(1, round(self.replay_share * len(prompts)))
        drawn = torch.randperm(len(prompts), generator=generator)[:n].sort().values.tolist()
        limit = getattr(experience, "max_new_tokens", 1)
        self.tasks.append(PastPrompts([prompts[i] for i in drawn], limit))

    def state_dict(self) -> dict[str, Any]:
        """Returns the prompts of every task, and the arguments."""
        return {
            "replay_share": float(self.replay_share),
            "seed": self.seed,
            "tasks": [task._asdict() for task in self.tasks],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the prompts; the arguments must be the same.

        :param state: what :meth:`state_dict` returned.
        :raises ValueError: if it does not fit; nothing has changed then.
        """
        check_keys(state, self.state_dict(), "the state of OnPolicyReplayPlugin")
        check_same_settings(state, {"replay_share": self.replay_share, "seed": self.seed})
        for task in state["tasks"]:
            check_keys(task, PastPrompts._fields, "the prompts of a task")
        self.tasks = [
            PastPrompts(list(task["prompts"]), int(task["max_new_tokens"]))
            for task in state["tasks"]
        ]
