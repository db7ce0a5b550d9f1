"""Scores of generated text, by experience and over the stream.

The strategy's model generates greedily from the prompts of every evaluated experience, and the
texts are scored by the experience's metric (:mod:`~treelora_avalanche.metrics.text_scores`). Op_n
and Bwt_n are computed from the matrix of scores as from one of accuracies.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricResult, MetricValue
from avalanche.evaluation.metric_utils import get_metric_name, stream_type
from torch import Tensor, nn
from tqdm.auto import tqdm

from treelora_avalanche.choices import check_known
from treelora_avalanche.experiences import task_number
from treelora_avalanche.metrics.score_matrix import (
    SIGN,
    NumberOfMatrix,
    ScoreMatrix,
    backward_transfer,
    overall_performance,
)
from treelora_avalanche.metrics.text_scores import SCORES, mean_score
from treelora_avalanche.processes import shared_work

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate

logger = logging.getLogger(__name__)

_REQUIRED = ("task_name", "prompts", "answers", "metric", "max_new_tokens")


class TextGenerator(Protocol):
    """Interface of a model that generates text from text.

    Example::

        class Echo(nn.Module):
            tokenizer = AutoTokenizer.from_pretrained("gpt2")

            def generate(self, prompts, max_new_tokens, batch_size, progress=None):
                return list(prompts)
    """

    tokenizer: Any
    """ A tokenizer of transformers, which counts the generated tokens. """

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], object] | None = None,
    ) -> list[str]:
        """Continues the prompts greedily.

        :param prompts: the texts to continue.
        :param max_new_tokens: limit of the tokens of a continuation.
        :param batch_size: prompts per batch.
        :param progress: called with the number of prompts that were just finished.
        :return: the continuations without their prompts, in the same order.
        """
        ...


def find_text_generator(model: nn.Module) -> TextGenerator:
    """Returns the outermost module that generates text from text.

    :param model: the model of a strategy, with any wrappers.
    :raises TypeError: if there is no such module.
    """
    for module in model.modules():
        # A transformers model has `generate` too, but from token ids.
        if callable(getattr(module, "generate", None)) and hasattr(module, "tokenizer"):
            return module  # type: ignore[return-value]
    raise TypeError(
        "`strategy.model` should hold a module with `generate` and `tokenizer`, but is a "
        f"{type(model).__name__}. Train a `treelora_avalanche.models.LanguageModel`."
    )


class GreedyGeneration:
    """Generates for the evaluated experience, once for all metrics that share this object.

    Example::

        generation = GreedyGeneration(batch_size=8)
        metrics = [GenerationScore(generation), GenerationBackwardTransfer(generation)]
    """

    def __init__(self, batch_size: int | None = None):
        """
        :param batch_size: prompts per batch; by default the strategy's `eval_mb_size`.
        :raises ValueError: if it is not positive.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"`batch_size` should be at least 1, but is {batch_size}. Use None for the "
                "strategy's `eval_mb_size`."
            )
        self.batch_size = batch_size
        self.generated: dict[str, list[tuple[str, str, str]]] = {}
        """ (prompt, answer, prediction) of all samples of the last evaluation, by task name. """
        self.routes: dict[str, list[Any]] = {}
        """ The same for the routes of the prompts, see
        :class:`~treelora_avalanche.models.views.prompt_router.Route`; none where the model routes
        no prompts. """
        self.tokens_per_second = math.nan
        """ Generated tokens over seconds of generation, of the last experience. """
        self._score: float | None = None
        self._hinted = False

    def start_evaluation(self) -> None:
        """Clears the texts of the previous evaluation."""
        self.generated, self.routes = {}, {}

    def start_experience(self, experience: Any) -> None:
        """Checks the next experience and clears the score of the previous one.

        :param experience: the experience about to be evaluated.
        :raises ValueError: if it lacks texts that its metric needs, or its metric is unknown.
        """
        self._score = None
        _check(experience)

    def score(self, strategy: SupervisedTemplate) -> float | None:
        """Returns the score of the experience; generates at the first call for it.

        :param strategy: the evaluating strategy.
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
        # `disable=None` hides the bar if the output is not a terminal.
        with tqdm(
            total=len(own), desc=experience.task_name, unit="prompt", leave=False, disable=None
        ) as bar:
            predictions = model.generate(
                own,
                max_new_tokens=experience.max_new_tokens,
                batch_size=self.batch_size or strategy.eval_mb_size,
                progress=bar.update,
            )
        routes = list(getattr(model, "routes", ()))
        if processes is not None:
            predictions = processes.whole_list(predictions, len(prompts))
            if routes:
                routes = processes.whole_list(routes, len(prompts))
        seconds = time.perf_counter() - begin
        # Counted in the texts, so that end tokens and padding are left out.
        tokens = model.tokenizer(predictions, add_special_tokens=False)["input_ids"]
        self.tokens_per_second = sum(map(len, tokens)) / seconds
        self.generated[experience.task_name] = list(zip(prompts, answers, predictions, strict=True))
        if routes:
            self.routes[experience.task_name] = routes
        sources = getattr(experience, "sources", None)
        score = mean_score(experience.metric, predictions, answers, sources)
        if score == 0 and not self._hinted:
            first = processes is None or processes.accelerator.is_main_process
            n_continued = _count_continued(predictions, answers)
            if first and 2 * n_continued >= len(predictions):
                self._hinted = True
                logger.warning(_NOT_ENDED, experience.task_name, n_continued, len(predictions))
        return score


_NOT_ENDED = (
    "the score of %s is 0, but %d of %d generated texts begin with an answer and then continue: "
    "the model does not end them. Train until it generates the end token, choose an `eos_token` "
    "that it knows from pretraining, or lower `max_new_tokens` to the length of the answers."
)


def _count_continued(texts: Sequence[str], answers: Sequence[str]) -> int:
    """Returns the number of texts that begin with an answer of the task and then continue."""
    known = {answer for answer in answers if answer}
    if not known:
        return 0
    begins = re.compile(rf"({'|'.join(map(re.escape, known))})(?!\w).", re.DOTALL)
    return sum(text not in known and begins.match(text.lstrip()) is not None for text in texts)


def _check(experience: Any) -> None:
    """Raises the errors that scoring would raise only after all texts were generated."""
    which = f"experience {experience.current_experience} of the {stream_type(experience)} stream"
    lacking = [name for name in _REQUIRED if not hasattr(experience, name)]
    if not lacking:
        check_known("`metric`", experience.metric, SCORES)
        if experience.metric == "sari" and getattr(experience, "sources", None) is None:
            lacking = ["sources"]
    if lacking:
        raise ValueError(
            f"{which} has no {', '.join(f'`{name}`' for name in lacking)}, which generation "
            "metrics need. Set these attributes, as `treelora_avalanche.scenarios.TRACE` does."
        )
    for name in ("answers", "sources"):
        texts = getattr(experience, name, None)
        if texts is not None and len(texts) != len(experience.prompts):
            raise ValueError(
                f"{which} should have one of `{name}` per prompt, but has "
                f"{len(experience.prompts)} `prompts` and {len(texts)} `{name}`."
            )


class GenerationScore(ScoreMatrix):
    """Records f_i(w_j): the score of the text generated for every experience after every one.

    It emits, for each evaluated experience, `GenerationScore` in [0, 1] (higher is better) and
    `GenerationTokensPerSecond`; :meth:`matrix` returns the matrix, see
    :class:`~treelora_avalanche.metrics.score_matrix.ScoreMatrix` for its rows.

    An experience needs the attributes `task_name`, `prompts`, `answers`, `metric` (a name in
    :data:`~treelora_avalanche.metrics.text_scores.SCORES`), `max_new_tokens`, and `sources` for
    SARI. The model needs `generate` and `tokenizer`, see :class:`TextGenerator`; any strategy may
    train it. Task labels are not used. Text is generated for all evaluated streams, including the
    training stream under `eval_every`.

    Example::

        scores = GenerationScore()
        strategy = TreeLoRAStrategy(model, evaluator=EvaluationPlugin(scores, loggers=[]))
        strategy.train(benchmark.train_stream[0])
        strategy.eval(benchmark.test_stream[:1])
        print(scores.matrix(), scores.generated)
    """

    def __init__(self, generation: GreedyGeneration | None = None):
        """
        :param generation: generates the texts; several metrics that share one generate each text
            once. By default a new one.
        """
        super().__init__()
        self.generation = generation or GreedyGeneration()

    @property
    def generated(self) -> dict[str, list[tuple[str, str, str]]]:
        """(prompt, answer, prediction) of every sample of the last evaluation, by task name.

        Not part of the state: write them to a file to keep them.
        """
        return self.generation.generated

    def reset(self) -> None:
        """Clears all evaluations and the order of training."""
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
    """Op_n = (1/n) sum_(i<=n) f_i(w_n), mean score over seen experiences. **Higher is better.**

    The whole test stream may be evaluated: unseen experiences are not counted. Nothing is emitted
    if a seen experience is missing from the evaluation. See
    :func:`~treelora_avalanche.metrics.overall_performance`; for the argument see
    :class:`GenerationScore`.

    Example::

        evaluator = EvaluationPlugin(GenerationOverallPerformance(), loggers=[InteractiveLogger()])
    """

    def _number(self, matrix: Tensor) -> float:
        return overall_performance(matrix)

    def __str__(self) -> str:
        return "OverallPerformance_Generation"


class GenerationBackwardTransfer(NumberOfMatrix, GenerationScore):
    """Bwt_n = (1/n) sum_(i<=n) (f_i(w_i) - f_i(w_n)) of the scores of generated text.

    **Positive is forgetting, lower is better**: the opposite sign of Avalanche's `StreamBWT`. It
    also emits the drop f_i(w_i) - f_i(w_n) of every seen experience. It needs an evaluation of all
    seen experiences after every experience, and emits nothing if one is missing. See
    :func:`~treelora_avalanche.metrics.backward_transfer`; for the argument see
    :class:`GenerationScore`.

    Example::

        evaluator = EvaluationPlugin(GenerationBackwardTransfer(), loggers=[InteractiveLogger()])
    """

    def _number(self, matrix: Tensor) -> float:
        return backward_transfer(matrix)

    def _emit_experience(self, strategy: SupervisedTemplate, score: float) -> MetricResult:
        task = task_number(strategy.experience)
        if task not in self.trained:
            return None
        k = self.trained.index(task)
        drop = self.matrix()[k, k].item() - score
        if math.isnan(drop):  # not evaluated after its own training
            return None
        name = get_metric_name(self, strategy, add_experience=True)
        return [MetricValue(self, name, drop, strategy.clock.train_iterations)]

    def __str__(self) -> str:
        return f"BackwardTransfer{SIGN}_Generation"


def generation_metrics(*, batch_size: int | None = None) -> list[PluginMetric]:
    """Returns the metrics of a stream of text tasks for Avalanche's `EvaluationPlugin`.

    They share one :class:`GreedyGeneration`, so that each text is generated once per evaluation.

    Example::

        evaluator = EvaluationPlugin(generation_metrics(), loggers=[InteractiveLogger()])

    :param batch_size: prompts per batch; by default the strategy's `eval_mb_size`.
    :return: the matrix of scores, Op_n (higher is better) and Bwt_n (lower is better).
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
