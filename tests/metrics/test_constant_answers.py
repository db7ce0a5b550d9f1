"""Scores of the majority answer and of chance, against counts by hand."""

import pytest

from treelora_avalanche.metrics.constant_answers import constant_answers
from treelora_avalanche.metrics.text_scores import accuracy, rouge_l


def test_majority_and_chance_of_labels():
    training = ["A"] * 3 + ["C"] * 5 + ["B"] * 2
    found = constant_answers("accuracy", training, ["C", "C", "A", "B", "D"])
    assert found == (3, "C", 2 / 5, pytest.approx(1 / 3))
    # The first of several that are equally frequent.
    assert constant_answers("accuracy", ["x", "y", "y", "x"], ["y"])[1:3] == ("x", 0.0)


def test_explained_letters_are_one_answer_each():
    """ScienceQA: a letter, a line feed and an explanation, of which accuracy reads the letter."""
    training = [f"{letter}\nsince {n}" for n, letter in enumerate("ABABBA" + "B")]
    tests = ["B\nas it is", "A\nwhy not", "B\n"]
    found = constant_answers("accuracy", training, tests)
    assert found == (2, "B", pytest.approx(2 / 3), 0.5)
    assert [accuracy("B", answer) for answer in tests] == [1, 0, 1]


def test_other_metrics_score_the_majority_answer_by_themselves():
    tests = ["very good", "bad"]
    found = constant_answers("rouge_l", ["good", "good", "good", "bad"], tests)
    assert found[:2] == (2, "good")
    assert found.majority == (rouge_l("good", "very good") + rouge_l("good", "bad")) / 2
    found = constant_answers("sari", ["good"] * 4, tests, ["a good text", "a bad text"])
    assert 0 < found.majority < 1


def test_tasks_of_many_answers_have_none():
    assert constant_answers("accuracy", ["1", "2", "3", "1", "2"], ["1"]) is None
    assert constant_answers("accuracy", [], ["1"]) is None
    assert constant_answers("accuracy", ["1", "2", "3", "1", "2", "3"], ["1"]) is not None
