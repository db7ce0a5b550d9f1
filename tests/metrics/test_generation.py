"""Generation metrics: a model whose replies are scripted, and matrices worked by hand."""

import logging
import math

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset
from avalanche.training import EWC, Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.utils.data import TensorDataset

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.checkpoint import load_strategy, save_strategy
from treelora_avalanche.metrics import (
    AccuracyMatrix,
    GenerationBackwardTransfer,
    GenerationOverallPerformance,
    GenerationScore,
    GreedyGeneration,
    find_text_generator,
    generation_metrics,
)
from treelora_avalanche.models import create_language_model
from treelora_avalanche.state import load_state, save_state

TASKS = {
    "letters": {
        "metric": "accuracy",
        "prompts": ["first?", "second?", "third?", "fourth?"],
        "answers": ["A", "B", "C", "D"],
        "max_new_tokens": 1,
    },
    "code": {
        "metric": "edit_similarity",
        "prompts": ["def f"],
        "answers": ["ab"],
        "max_new_tokens": 8,
    },
    "simple": {
        "metric": "sari",
        "prompts": ["Simplify: a long sentence ."],
        "answers": ["a sentence ."],
        "sources": ["a long sentence ."],
        "max_new_tokens": 9,
    },
}
# By the number of experiences trained: the generated texts, and their scores.
REPLIES = [
    {"first?": "A", "second?": "?", "third?": "?", "fourth?": "?", "def f": "xy"},
    {"first?": "A", "second?": "B", "third?": "C", "fourth?": "?", "def f": "b"},
    {"first?": "A", "second?": "?", "third?": "?", "fourth?": "?", "def f": "ab"},
    {"first?": "?", "second?": "B", "third?": "C", "fourth?": "?", "def f": "xa"},
]
SIMPLIFIED = "a sentence ."
BY_HAND = [  # after training; the ratio of "b" to "ab" is 2/3, rounded to full percent
    [0.25, 0.0, 1.0],
    [0.75, 0.67, 1.0],
    [0.25, 1.0, 1.0],
    [0.5, 0.5, 1.0],
]


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [text.split() for text in texts]}


class Scripted(nn.Module):
    """Classifies, so that it can be trained, and replies from a script."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.tokenizer = Words()
        self.phase = 0
        self.calls = []

    def forward(self, x):
        return self.linear(x)

    def generate(self, prompts, max_new_tokens, batch_size, progress=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append((len(prompts), max_new_tokens, batch_size))
        progress(len(prompts))
        return [REPLIES[self.phase].get(prompt, SIMPLIFIED) for prompt in prompts]


class Chatter(nn.Module):
    """A wrapper with a `generate` from token ids, as a model of transformers has."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)

    def generate(self, input_ids):
        raise AssertionError("without a tokenizer it should not be called")


def give_texts(experience, task_name, **changes):
    for name, value in {**TASKS[task_name], "task_name": task_name, **changes}.items():
        setattr(experience, name, value)
    return experience


@pytest.fixture
def streams():
    """Three experiences to train on and three to evaluate, which carry texts."""
    generator = torch.Generator().manual_seed(0)

    def samples():
        dataset = TensorDataset(torch.randn(6, 4, generator=generator), torch.arange(6) % 3)
        dataset.targets = [0, 1, 2] * 2
        return dataset

    benchmark = nc_benchmark(samples(), samples(), n_experiences=3, task_labels=False, seed=0)
    test = [give_texts(e, name) for e, name in zip(benchmark.test_stream, TASKS, strict=True)]
    return list(benchmark.train_stream), test


def build(metrics, strategy=Naive, model=None, **kwargs):
    model = model or Scripted()
    return strategy(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=4,
        train_epochs=1,
        eval_mb_size=5,
        evaluator=EvaluationPlugin(metrics, loggers=[]),
        **kwargs,
    )


def scripted(strategy):
    return find_text_generator(strategy.model)


def on_stream(results, name):
    return results[f"{name}/eval_phase/test_stream"]


def on_experience(results, name, i):
    return results[f"{name}/eval_phase/test_stream/Task000/Exp00{i}"]


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: TrainableView(Chatter(m))])
@pytest.mark.parametrize(
    "strategy_class", [Naive, lambda **kwargs: EWC(ewc_lambda=1.0, **kwargs)], ids=["Naive", "EWC"]
)
def test_matrix_op_and_bwt_by_hand(streams, wrap, strategy_class):
    train, test = streams
    metrics = generation_metrics()
    strategy = build(metrics, strategy_class, wrap(Scripted()))
    model = scripted(strategy)
    for n, experience in enumerate(train, start=1):
        strategy.train(experience)
        model.phase, model.calls = n, []
        results = strategy.eval(test)
        expected = BY_HAND[1 : n + 1]
        torch.testing.assert_close(metrics[0].matrix(), torch.tensor(expected, dtype=torch.float64))
        assert on_stream(results, "OverallPerformance_Generation") == pytest.approx(
            sum(expected[-1][:n]) / n
        )
        drops = [expected[i][i] - expected[-1][i] for i in range(n)]
        assert on_stream(
            results, "BackwardTransfer_PositiveIsForgetting_Generation"
        ) == pytest.approx(sum(drops) / n)
        for i in range(n):
            assert on_experience(results, "GenerationScore", i) == pytest.approx(expected[-1][i])
            assert on_experience(
                results, "BackwardTransfer_PositiveIsForgetting_Generation", i
            ) == pytest.approx(drops[i])
        assert (
            f"BackwardTransfer_PositiveIsForgetting_Generation/eval_phase/test_stream/Task000/Exp00{n}"
            not in results
        )
        # Once per experience, although three metrics ask.
        assert model.calls == [(4, 1, 5), (1, 8, 5), (1, 9, 5)]


def test_texts_of_the_last_evaluation_can_be_read(streams):
    train, test = streams
    metric = GenerationScore()
    strategy = build(metric)
    strategy.train(train[0])
    strategy.eval(test)
    assert list(metric.generated) == ["letters", "code", "simple"]
    assert metric.generated["letters"][:2] == [("first?", "A", "A"), ("second?", "B", "?")]
    assert metric.generated["simple"] == [
        ("Simplify: a long sentence .", "a sentence .", "a sentence .")
    ]
    strategy.eval(test[1])
    assert list(metric.generated) == ["code"]


def test_tokens_per_second_counts_the_tokens_of_the_text(streams, monkeypatch):
    _, test = streams
    now = iter((10.0, 10.5))
    monkeypatch.setattr(
        "treelora_avalanche.metrics.generation.time.perf_counter", lambda: next(now)
    )
    strategy = build(GenerationScore())
    results = strategy.eval(test[2])
    assert on_experience(results, "GenerationTokensPerSecond", 2) == 3 / 0.5


def test_each_metric_works_alone_and_next_to_accuracy(streams):
    train, test = streams
    transfer, performance = GenerationBackwardTransfer(), GenerationOverallPerformance()
    strategy = build([transfer, AccuracyMatrix(), performance])
    strategy.train(train[0])
    strategy.eval(test)
    assert len(scripted(strategy).calls) == 6, "they share nothing by default"
    strategy.train(train[1])
    scripted(strategy).phase = 2
    results = strategy.eval(test)
    assert performance.result() == pytest.approx((0.25 + 1.0) / 2)
    assert transfer.result() == 0.0  # 0.25 before and after
    assert on_stream(results, "BackwardTransfer_PositiveIsForgetting_Generation") == 0.0


def test_batch_size_can_differ_from_the_strategys(streams):
    _, test = streams
    strategy = build(generation_metrics(batch_size=2))
    strategy.eval(test[0])
    assert scripted(strategy).calls == [(4, 1, 2)]


def test_scores_not_evaluated_are_nan(streams):
    train, test = streams
    score, performance, transfer = generation_metrics()
    strategy = build([score, performance, transfer])
    results = strategy.eval(test[0])  # before any training
    assert score.untrained["test"] == {0: 0.25}
    assert not any(name.startswith(("Overall", "Backward")) for name in results)
    strategy.train(train[0])
    results = strategy.eval(test[1])  # and not of the first, which was trained
    assert performance.result() is None
    assert not any(name.startswith(("Overall", "Backward")) for name in results)
    strategy.train(train[1])
    results = strategy.eval(test[:2])
    assert math.isnan(score.matrix()[0, 0])
    assert on_stream(results, "OverallPerformance_Generation") == pytest.approx(0.125)
    assert not any(name.startswith("Backward") and "Exp000" in name for name in results)
    assert transfer.result() is None


def test_an_experience_without_prompts_has_no_score(streams):
    train, test = streams
    give_texts(test[0], "letters", prompts=[], answers=[])
    metric = GenerationScore()
    strategy = build(metric)
    strategy.train(train[0])
    results = strategy.eval(test[:2])
    assert metric.matrix().isnan().tolist() == [[True, False]]
    assert not any("Exp000" in name for name in results)
    assert len(scripted(strategy).calls) == 1


def test_resume_continues_the_matrix(streams, tmp_path):
    train, test = streams

    def run(strategy, *phases):
        for n in phases:
            strategy.train(train[n - 1])
            scripted(strategy).phase = n
            results = strategy.eval(test)
        return results

    whole = generation_metrics()
    expected = run(build(whole), 1, 2, 3)
    first = build(generation_metrics())
    run(first, 1, 2)
    save_strategy(first, tmp_path / "state")
    resumed = generation_metrics()
    second = build(resumed)
    load_strategy(second, tmp_path / "state")
    results = run(second, 3)
    assert torch.equal(resumed[0].matrix(), whole[0].matrix())
    for name in (
        "OverallPerformance_Generation",
        "BackwardTransfer_PositiveIsForgetting_Generation",
    ):
        assert on_stream(results, name) == on_stream(expected, name)


def test_state_is_plain_and_of_the_matrix_alone(streams, tmp_path):
    train, test = streams
    metric = GenerationScore()
    strategy = build(metric)
    strategy.train(train[0])
    strategy.eval(test)
    save_state(tmp_path / "state", metric.state_dict())
    twin = GenerationScore()
    twin.load_state_dict(load_state(tmp_path / "state"))
    assert twin.trained == [0]
    assert torch.equal(twin.matrix(), metric.matrix())
    with pytest.raises(ValueError, match="the state of GenerationScore lacks the key 'rows'"):
        GenerationScore().load_state_dict(
            {k: v for k, v in twin.state_dict().items() if k != "rows"}
        )
    metric.reset()
    assert metric.matrix().shape == (0, 0)
    assert metric.generated == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "rouge"}, r"`metric` should be one of .*'rouge'\. .* mean 'rouge_l'"),
        ({"sources": None}, r"experience 2 of the test stream has no `sources`"),
        ({"answers": []}, r"one of `answers` per prompt, but has 1 `prompts` and 0 `answers`"),
        ({"sources": ["a", "b"]}, r"has 1 `prompts` and 2 `sources`"),
    ],
)
def test_bad_texts_are_refused_before_anything_is_generated(streams, changes, message):
    _, test = streams
    give_texts(test[2], "simple", **changes)
    strategy = build(generation_metrics())
    with pytest.raises(ValueError, match=message):
        strategy.eval(test[2])
    assert scripted(strategy).calls == []


def test_an_experience_without_texts_is_refused(streams):
    train, _ = streams
    strategy = build(generation_metrics())
    with pytest.raises(ValueError, match=r"train stream has no `task_name`, `prompts`, `answers`"):
        strategy.eval(train[0])


def test_a_model_that_cannot_generate_is_refused(streams):
    _, test = streams
    strategy = build(generation_metrics(), model=nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"should hold a module with `generate` .* but is a Linear"):
        strategy.eval(test[0])


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="`batch_size` should be at least 1, but is 0"):
        GreedyGeneration(batch_size=0)


def test_no_bar_where_the_output_is_no_terminal(streams, capfd):
    _, test = streams
    build(generation_metrics()).eval(test[0])
    assert "letters" not in "".join(capfd.readouterr())


def test_a_pretrained_model_generates_what_transformers_generates(data_root):
    folder = data_root / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no data: {folder} is not a folder")
    model = create_language_model(folder)
    prompts = ["Once upon a time, there was a", "Tom and his dog went to the", "Die Sonne"]

    def reply(prompt):  # one at a time, so that nothing is padded
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            new = model.network.generate(input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :]
        return model.tokenizer.decode(new, skip_special_tokens=True)

    replies = [reply(prompt) for prompt in prompts]
    answers = [replies[0], "nothing of this", replies[2]]

    tokens = torch.tensor([[1, 2, 3]])
    dataset = TaskAwareSupervisedClassificationDataset(
        TensorDataset(tokens[:, :-1], tokens[:, 1:]),
        data_attributes=[
            DataAttribute([2], "targets", use_in_getitem=False),
            DataAttribute([0], "targets_task_labels", use_in_getitem=True),
        ],
    )
    stream = with_task_labels(benchmark_from_datasets(train=[dataset], test=[dataset])).test_stream
    experience = stream[0]
    for name, value in {
        "task_name": "stories",
        "prompts": prompts,
        "answers": answers,
        "metric": "accuracy",
        "max_new_tokens": 12,
    }.items():
        setattr(experience, name, value)
    metrics = generation_metrics(batch_size=2)
    results = build(metrics, model=TrainableView(model)).eval(experience)
    assert metrics[0].generated["stories"] == list(zip(prompts, answers, replies, strict=True))
    assert on_experience(results, "GenerationScore", 0) == pytest.approx(2 / 3)
    assert on_experience(results, "GenerationTokensPerSecond", 0) > 0


CONTINUED = ["A. Once", "A, and", "? B", " B \n"]


@pytest.mark.parametrize(
    ("replies", "n_continued"),
    [
        (CONTINUED, 3),
        (["A. Once", "?", "D!", "?"], 2),
        (["A. Once", "?", "?", "?"], None),
        (["Apple", "Bee", "Cat", "Dog"], None),  # other words
        (["B", "A", "D", "C"], None),  # they end
        (["A", "B. So", "C, so", "D so"], None),  # a score of 1/4
        (["", "", "", ""], None),
    ],
)
def test_texts_that_do_not_end_are_told_once(streams, replies, n_continued, caplog, monkeypatch):
    _, test = streams
    script = dict(zip(TASKS["letters"]["prompts"], replies, strict=True))
    monkeypatch.setattr(Scripted, "generate", lambda _, prompts, **__: [script[p] for p in prompts])
    strategy = build(generation_metrics())
    with caplog.at_level(logging.WARNING, logger="treelora_avalanche"):
        strategy.eval(test[:1])
        strategy.eval(test[:1])
    expected = [f"{n_continued} of 4 generated texts begin with an answer"] if n_continued else []
    assert [r.getMessage().split(", but ")[1].split(" and ")[0] for r in caplog.records] == expected
    assert all("`max_new_tokens`" in r.getMessage() for r in caplog.records)
