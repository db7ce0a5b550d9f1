"""Held-out training samples of the first tasks, in place of the test stream."""

from collections import Counter

import pytest
import torch

from support import images_of
from treelora_avalanche.experiences import classes_of
from treelora_avalanche.scenarios import validation_benchmark


def test_training_samples_are_divided_and_balanced_by_class(tiny_benchmark):
    built = validation_benchmark(tiny_benchmark, 2, share=0.25, seed=0)
    assert len(built.train_stream) == len(built.test_stream) == 2
    for original, train, held in zip(
        tiny_benchmark.train_stream, built.train_stream, built.test_stream, strict=False
    ):
        assert classes_of(train) == classes_of(held) == classes_of(original)
        assert Counter(held.dataset.targets) == dict.fromkeys(classes_of(original), 4)
        assert held.current_experience == original.current_experience
        assert held.task_label == 0
        parts = torch.cat([images_of([train]), images_of([held])]).flatten(1)
        whole = images_of([original]).flatten(1)
        assert sorted(parts.tolist()) == sorted(whole.tolist())
    assert built.n_classes == tiny_benchmark.n_classes


def test_the_draw_depends_on_the_seed_alone(tiny_benchmark):
    first, second = (
        images_of(validation_benchmark(tiny_benchmark, 1, seed=3).test_stream) for _ in range(2)
    )
    other = images_of(validation_benchmark(tiny_benchmark, 1, seed=4).test_stream)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_texts_keep_their_records(tiny_texts):
    built = validation_benchmark(tiny_texts, 2, share=0.25)
    assert built.task_names == ["zoo", "maths"]
    for number, name in enumerate(built.task_names):
        original = tiny_texts.train_stream[number]
        held = built.test_stream[number]
        assert held.task_name == name
        assert (held.metric, held.max_new_tokens) == (original.metric, original.max_new_tokens)
        assert len(held.prompts) == len(held.answers) == len(held.dataset) == 2
        for prompt, answer, sample in zip(held.prompts, held.answers, held.dataset, strict=True):
            index = original.prompts.index(prompt)
            assert answer == original.answers[index]
            assert torch.equal(sample[0], original.dataset[index][0])
        assert not set(held.prompts) & set(built.train_stream[number].prompts)
    # Two reference answers, eight records: one of each is held out.
    assert sorted(built.test_stream[0].answers) == ["ape", "apeape"]


@pytest.mark.parametrize("n_tasks", [0, 4])
def test_unknown_number_of_tasks(tiny_benchmark, n_tasks):
    with pytest.raises(ValueError, match=rf"`--tune_tasks`.*from 1 to 3.*is {n_tasks}"):
        validation_benchmark(tiny_benchmark, n_tasks)


def test_a_single_sample_cannot_be_divided():
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset

    data = _make_taskaware_tensor_classification_dataset(
        torch.zeros(1, 2), torch.tensor([0]), task_labels=0
    )
    with pytest.raises(ValueError, match=r"at least 2 training samples.*has 1"):
        validation_benchmark(benchmark_from_datasets(train=[data]), 1)
