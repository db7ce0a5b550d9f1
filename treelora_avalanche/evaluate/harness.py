"""Language models of this package as models of EleutherAI's lm-evaluation-harness.

The harness reports scores of a model before and after a stream; TRACE (Wang et al. 2023, arXiv
2310.06762) calls the mean of their differences over tasks the general ability delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval import evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedModel

from treelora_avalanche.adapters import find_host
from treelora_avalanche.adapters.trainable_view import evaluating
from treelora_avalanche.choices import did_you_mean
from treelora_avalanche.evaluate.finished import Predictor
from treelora_avalanche.metrics import find_text_generator
from treelora_avalanche.models.language import LanguageModel, length_batches
from treelora_avalanche.models.token_loss import IGNORED, TokenCrossEntropy
from treelora_avalanche.models.tokens import pad_tokens

Request = tuple[Any, list[int], list[int]]
"""The texts of context and continuation, None in rolling perplexities; and the tokens of both."""


class HarnessModel(HFLM):
    """Model of the harness whose every request is routed by itself, as in the strategy's own
    evaluation.

    The router of a view reads the context of a request: the prompt of a generation, the context of
    a continuation, all of a text whose perplexity is asked for. Generation is greedy::

        model = HarnessModel(Predictor.of_strategy(strategy), batch_size=16)
        lm_eval.simple_evaluate(model=model, tasks=["piqa"])

    :param predictor: the model and its forward pass.
    :param batch_size: requests per batch.
    """

    def __init__(self, predictor: Predictor, batch_size: int):
        self.predictor = predictor
        self.host = _language_model(predictor.model)
        network = next(m for m in predictor.model.modules() if isinstance(m, PreTrainedModel))
        super().__init__(
            network,
            backend="causal",
            tokenizer=self.host.tokenizer,
            max_length=self.host.max_length,
            batch_size=batch_size,
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the greedy one."""
        # One token more than the model reads, as the last one is predicted alone.
        rows = [(context + continued)[-self.max_length - 1 :] for _, context, continued in requests]
        results: dict[int, tuple[float, bool]] = {}
        with evaluating(self.predictor.model):
            for batch in length_batches(rows, override_bs or self.batch_size):
                own = self._score([rows[i] for i in batch], [requests[i] for i in batch])
                results.update(zip(batch, own, strict=True))
        return [results[i] for i in range(len(rows))]

    def _score(
        self, rows: list[list[int]], requests: list[Request]
    ) -> Iterator[tuple[float, bool]]:
        tokens = pad_tokens([row[:-1] for row in rows]).to(self.device)
        targets = pad_tokens([row[1:] for row in rows]).to(self.device)
        for i, (row, (_, _, continued)) in enumerate(zip(rows, requests, strict=True)):
            targets[i, : len(row) - 1 - len(continued)] = IGNORED
            targets[i, len(row) - 1 :] = IGNORED
        if requests[0][0] is None:  # without a context: the text is its own prompt
            logits = self.predictor.model(tokens)
        else:
            targets = targets[:, int((targets != IGNORED).any(0).int().argmax()) :]
            logits = self.predictor.forward(tokens, targets)
        likelihoods = -TokenCrossEntropy(reduction="none")(logits, targets)
        counts = (targets != IGNORED).sum(1)
        guesses = logits[:, :, logits.shape[2] - targets.shape[1] :].argmax(1)
        greedy = ((guesses == targets) | (targets == IGNORED)).all(1)
        return zip((likelihoods * counts).tolist(), greedy.tolist(), strict=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns greedy continuations, each up to the first of its stop texts.

        :param requests: requests of a context and of arguments of generation.
        :param disable_tqdm: ignored.
        :raises ValueError: if a task asks for sampling.
        """
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        generator = find_text_generator(self.predictor.model)
        for group in alike.values():
            options = normalize_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
            if options.get("do_sample"):
                raise ValueError(
                    f"the harness task {requests[group[0]].task_name!r} should generate greedily, "
                    "but samples. Set do_sample: false in its generation_kwargs."
                )
            end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
            until = handle_stop_sequences(options.pop("until", None), eos=end)
            prompts: Any = [self.tok_encode(requests[i].args[0]) for i in group]
            with self._stopping([text for text in until if text != end]):
                own = generator.generate(prompts, options["max_gen_toks"], self.batch_size)
            for i, text in zip(group, own, strict=True):
                texts[i] = postprocess_generated_text(text, stop=until, think_end_token=None)
        return texts

    @contextmanager
    def _stopping(self, texts: list[str]) -> Iterator[None]:
        self.host.stop_strings = texts
        try:
            yield
        finally:
            self.host.stop_strings = None


def _language_model(model: nn.Module) -> LanguageModel:
    host = find_host(model)
    assert isinstance(host, LanguageModel)  # of a language run
    return host


def find_tasks(names: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[str]]:
    """Returns the harness's index of tasks, and the names of the tasks to run, all of which load.

    :param names: names of tasks, groups or tags; none for all tasks of the folder.
    :param include_path: folder of further tasks, as YAML files.
    :raises ValueError: if a name is unknown, or a task or its data cannot be loaded.
    """
    own = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    chosen = list(names) or (own.all_subtasks if own else [])
    if not chosen:
        raise ValueError(
            f"`--include_path` should hold YAML files of tasks, but {include_path} holds none."
        )
    if own is None or not set(chosen) <= set(own.all_tasks):  # the index of all takes seconds
        own = TaskManager(include_path=include_path)
    for name in chosen:
        if name not in own.all_tasks:
            raise ValueError(
                f"`--harness` should name tasks of lm_eval, but {name!r} is none."
                f"{did_you_mean(name, own.all_tasks)} See `lm_eval ls tasks`, or pass the folder "
                "of your own YAML files by `--include_path`."
            )
    try:
        own.load(chosen)
    except Exception as error:  # whatever a YAML file, its functions or its data raise
        raise ValueError(
            f"the harness tasks {', '.join(chosen)} cannot be loaded: {error}"
        ) from error
    return own, chosen


def run_tasks(model: HarnessModel, tasks: list[str], manager: TaskManager) -> dict[str, Any]:
    """Returns the harness's results.

    Prompts are put into the chat template where the run put them there.

    :param model: the model.
    :param tasks: names of the tasks.
    :param manager: the harness's index of tasks.
    """
    loaded = manager.load(tasks)
    for task in loaded["tasks"].values():  # as `lm_eval.simple_evaluate` does
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    templated = model.tokenizer.chat_template is not None
    results: Any = evaluate(
        lm=model,
        task_dict=loaded,
        apply_chat_template=templated,
        fewshot_as_multiturn=templated,
        log_samples=False,
    )
    return dict(results)


__all__ = ["HarnessModel", "find_tasks", "run_tasks"]
