"""Scores of generated text, by experience and over the stream.

The strategy's model answers the prompts of every evaluated experience, greedily, and the answers
are scored by the experience's own metric (:mod:`~treelora_avalanche.metrics.text_scores`). The
scores fill the same matrix as accuracies do, and Op and Bwt are read from it in the same way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricResult, MetricValue
from avalanche.evaluation.metric_utils import get_metric_name, stream_type
from torch import Tensor, nn
from tqdm.auto import tqdm

from treelora_avalanche.choices import check_known
from treelora_avalanche.metrics.score_matrix import (
    NumberOfMatrix,
    ScoreMatrix,
    backward_transfer,
    overall_performance,
)
from treelora_avalanche.metrics.text_scores import SCORES, mean_score
from treelora_avalanche.processes import shared_work

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate

_REQUIRED = ("task_name", "prompts", "answers", "metric", "max_new_tokens")


class TextGenerator(Protocol):
    """What a model needs in order to be scored: its own `generate` and `tokenizer`."""

    tokenizer: Any
    """ A tokenizer of transformers; the generated tokens are counted with it. """

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continue the prompts greedily.

        :param prompts: the texts to continue.
        :param max_new_tokens: where to stop a text that does not end by itself.
        :param batch_size: how many are generated together.
        :param progress: called with the number of prompts that have just been finished.
        :return: the continuations alone, in the order of the prompts.
        """
        ...


def find_text_generator(model: nn.Module) -> TextGenerator:
    """The outermost module that generates text from text, through any wrappers.

    :param model: the model of a strategy.
    :raises TypeError: if there is none.
    """
    for module in model.modules():
        # A transformers model has `generate` too, but from token ids.
        if callable(getattr(module, "generate", None)) and hasattr(module, "tokenizer"):
            return module  # type: ignore[return-value]
    raise TypeError(
        f"`strategy.model` ({type(model).__name__}) holds no module with `generate` and "
        "`tokenizer`, so it cannot answer prompts; train a "
        "`treelora_avalanche.models.LanguageModel`."
    )


class GreedyGeneration:
    """Generates for the experience under evaluation, once for all metrics that share it."""

    def __init__(self, batch_size: int | None = None):
        """
        :param batch_size: how many prompts are answered together; by default the strategy's
            `eval_mb_size`.
        :raises ValueError: if it is not positive.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` should be at least 1, but is {batch_size}.")
        self.batch_size = batch_size
        self.generated: dict[str, list[tuple[str, str, str]]] = {}
        """ By task name (prompt, answer, prediction) of all samples, of the last evaluation. """
        self.tokens_per_second = math.nan
        """ Of the last experience: tokens of the predictions, by the time of generating. """
        self._score: float | None = None

    def start_evaluation(self) -> None:
        """Forget the texts of the evaluation before."""
        self.generated = {}

    def start_experience(self, experience: Any) -> None:
        """Make ready for the next experience.

        :param experience: the experience about to be evaluated.
        :raises ValueError: if it lacks texts that its metric needs, or its metric is unknown.
        """
        self._score = None
        _check(experience)

    def score(self, strategy: SupervisedTemplate) -> float | None:
        """Generate and score, unless that was done since the experience has started.

        :param strategy: the strategy that evaluates.
        :return: the mean score in [0, 1]; None for an experience without prompts.
        """
        experience: Any = strategy.experience
        if self._score is None and len(experience.prompts):
            self._score = self._generate_and_score(strategy, experience)
        return self._score

    def _generate_and_score(self, strategy: SupervisedTemplate, experience: Any) -> float:
        model = find_text_generator(strategy.model)
        prompts, answers = list(experience.prompts), list(experience.answers)
        begin = time.perf_counter()
        processes = shared_work(strategy)
        own = prompts if processes is None else [prompts[n] for n in processes.part(len(prompts))]
        # `disable=None`: no bar where the output is not a terminal.
        with tqdm(
            total=len(own), desc=experience.task_name, unit="prompt", leave=False, disable=None
        ) as bar:
            predictions = model.generate(
                own,
                max_new_tokens=experience.max_new_tokens,
                batch_size=self.batch_size or strategy.eval_mb_size,
                progress=bar.update,
            )
        if processes is not None:
            predictions = processes.whole_list(predictions, len(prompts))
        seconds = time.perf_counter() - begin
        # Counted in the texts: the end tokens and the padding of a batch are not worth a number.
        tokens = model.tokenizer(predictions, add_special_tokens=False)["input_ids"]
        self.tokens_per_second = sum(map(len, tokens)) / seconds
        self.generated[experience.task_name] = list(zip(prompts, answers, predictions, strict=True))
        sources = getattr(experience, "sources", None)
        return mean_score(experience.metric, predictions, answers, sources)


def _check(experience: Any) -> None:
    """What would come to light only after everything was generated."""
    which = f"experience {experience.current_experience} of the {stream_type(experience)} stream"
    lacking = [name for name in _REQUIRED if not hasattr(experience, name)]
    if not lacking:
        check_known("`metric`", experience.metric, SCORES)
        if experience.metric == "sari" and getattr(experience, "sources", None) is None:
            lacking = ["sources"]
    if lacking:
        raise ValueError(
            f"{which} has no {', '.join(f'`{name}`' for name in lacking)}, which generation "
            "metrics read; set these attributes on it, as `treelora_avalanche.scenarios.TRACE` "
            "does."
        )
    for name in ("answers", "sources"):
        texts = getattr(experience, name, None)
        if texts is not None and len(texts) != len(experience.prompts):
            raise ValueError(
                f"{which} has {len(experience.prompts)} `prompts` and {len(texts)} `{name}`; give "
                "it one per prompt."
            )


class GenerationScore(ScoreMatrix):
    """f_i(w_j): the score of the text generated for every experience after every one trained.

    How rows are kept is said at :class:`~treelora_avalanche.metrics.score_matrix.ScoreMatrix`.
    An experience needs the attributes `task_name`, `prompts`, `answers`, `metric` (a name in
    :data:`~treelora_avalanche.metrics.text_scores.SCORES`), `max_new_tokens`, and `sources` for
    SARI. The model needs `generate` and `tokenizer`, see :class:`TextGenerator`; any strategy may
    train it. Task labels are not used. All streams that are evaluated are generated for, also the
    training stream under `eval_every`.

    It emits, for each evaluated experience, `GenerationScore` in [0, 1] and
    `GenerationTokensPerSecond`. The matrix is read with :meth:`matrix`.
    """

    def __init__(self, generation: GreedyGeneration | None = None):
        """
        :param generation: what generates; pass the same to several metrics, and each text is
            generated once. By default an own one.
        """
        super().__init__()
        self.generation = generation or GreedyGeneration()

    @property
    def generated(self) -> dict[str, list[tuple[str, str, str]]]:
        """(prompt, answer, prediction) of every sample of the last evaluation, by task name.

        Not part of the state: write them to a file where they should outlive the process.
        """
        return self.generation.generated

    def reset(self) -> None:
        """Forget every evaluation and the order of training."""
        super().reset()
        self.generation.start_evaluation()

    def before_eval(self, strategy: SupervisedTemplate) -> None:
        super().before_eval(strategy)
        self.generation.start_evaluation()

    def before_eval_exp(self, strategy: SupervisedTemplate) -> None:
        self.generation.start_experience(strategy.experience)

    def after_eval_exp(self, strategy: SupervisedTemplate) -> MetricResult:
        score = self.generation.score(strategy)
        return None if score is None else self.record(strategy, score)

    def _emit_experience(self, strategy: SupervisedTemplate, score: float) -> MetricResult:
        values = {
            str(self): score,
            "GenerationTokensPerSecond": self.generation.tokens_per_second,
        }
        return [
            MetricValue(
                self,
                get_metric_name(name, strategy, add_experience=True),
                value,
                strategy.clock.train_iterations,
            )
            for name, value in values.items()
        ]

    def __str__(self) -> str:
        return "GenerationScore"


class GenerationOverallPerformance(NumberOfMatrix, GenerationScore):
    """Op_n of the generated text: the mean score over the experiences seen. Higher is better.

    The whole test stream may be evaluated: experiences not trained yet do not count. Nothing is
    emitted when a seen experience is missing from the evaluation. See
    :func:`~treelora_avalanche.metrics.overall_performance`; for the argument see
    :class:`GenerationScore`.
    """

    def _number(self, matrix: Tensor) -> float:
        return overall_performance(matrix)

    def __str__(self) -> str:
        return "OverallPerformance_Generation"


class GenerationBackwardTransfer(NumberOfMatrix, GenerationScore):
    """Bwt_n of the generated text. **Positive is forgetting**: lower is better.

    Beside the number over the stream, it emits the drop f_i(w_i) - f_i(w_n) of every experience
    seen. It needs an evaluation after every experience, of all experiences seen, and emits nothing
    where one is missing. See :func:`~treelora_avalanche.metrics.backward_transfer`; for the
    argument see :class:`GenerationScore`.
    """

    def _number(self, matrix: Tensor) -> float:
        return backward_transfer(matrix)

    def _emit_experience(self, strategy: SupervisedTemplate, score: float) -> MetricResult:
        experience: Any = strategy.experience
        if experience.current_experience not in self.trained:
            return None
        k = self.trained.index(experience.current_experience)
        drop = self.matrix()[k, k].item() - score
        if math.isnan(drop):  # it was not evaluated when it had just been learned
            return None
        name = get_metric_name(self, strategy, add_experience=True)
        return [MetricValue(self, name, drop, strategy.clock.train_iterations)]

    def __str__(self) -> str:
        return "BackwardTransfer_Generation"


def generation_metrics(*, batch_size: int | None = None) -> list[PluginMetric]:
    """The metrics of a stream of text tasks, for Avalanche's `EvaluationPlugin`.

    They share what is generated: every prompt is answered once per evaluation.

    :param batch_size: how many prompts are answered together; by default the strategy's
        `eval_mb_size`.
    :return: the matrix of scores, overall performance and backward transfer.
    """
    generation = GreedyGeneration(batch_size)
    return [
        GenerationScore(generation),
        GenerationOverallPerformance(generation),
        GenerationBackwardTransfer(generation),
    ]


__all__ = [
    "GenerationBackwardTransfer",
    "GenerationOverallPerformance",
    "GenerationScore",
    "GreedyGeneration",
    "TextGenerator",
    "find_text_generator",
    "generation_metrics",
]
