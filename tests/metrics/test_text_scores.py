"""Scores of text: golden values of the reference packages, and properties.

The golden values were computed once, in an environment of their own, by what the TRACE release
calls: `rouge` 1.0.1 through `Rouge(metrics=["rouge-l"]).get_scores(answer, prediction, avg=True)`,
`fuzzywuzzy` 0.18.0 with `python-Levenshtein` 0.27.5 after the release's own replacement of
literals, and the script of the metric `sari` of Hugging Face `evaluate` with `sacrebleu` 2.6.0.
"""

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_avalanche.metrics import (
    accuracy,
    edit_similarity,
    mean_score,
    rouge_l,
    sari,
)

ROUGE_L = [  # prediction, answer, golden
    ("the cat sat on the mat", "the cat was on the mat today", 0.7272727223140496),
    (
        "The council met on Monday. The budget was approved. Parks get more money.",
        "The budget was approved by the council. It met on Monday evening. Nothing else was said.",
        0.592592587654321,
    ),
    ("a b c d e f g", "g f e d c b a", 0.14285713785714302),
    ("a b a b b a", "b b a a b b", 0.999999995),  # sets of words
    ("one two. two one. ", "two one one. two", 0.7999999952000001),  # an empty last sentence
    # Two longest subsequences each: which one is taken depends on the direction.
    ("y u", "u y. u", 0.4999999950000001),
    ("u y. u", "y u", 0.999999995),
    ("y z", "z x y. y", 0.7999999952000001),
    (
        "Über die Straße fährt heute ein grüner Bus. Das Wetter ist schön.",
        "Ein grüner Bus fährt über die Straße. Schön ist das Wetter heute.",
        0.3333333283333334,
    ),
    ("今天 天气 很 好 。 我们 去 公园 .", "今天 我们 去 公园 , 天气 好 .", 0.5333333283555556),
    ("今天天气很好。", "今天天气很好。", 0.999999995),
    ("No. 5 costs 3.50 dollars", "No. 5 costs 3.5 dollars", 0.9090909041322315),
    ("completely different words", "nothing shared at all", 0.0),
]

EDIT_SIMILARITY = [  # prediction, answer, golden in percent
    ("return self . name", "return self . names", 97),
    ("if sig == signal . CTRL_C_EVENT :", "if sig != signal . SIGINT :", 73),
    ("x = '<STR_LIT>' + <NUM_LIT:1>", "x = '<STR_LIT:abc>' + <NUM_LIT>", 78),
    ("print ( '<STR_LIT:größer>' )", "print ( '<STR_LIT:große>' )", 91),
    ("今天天气很好", "今天的天气不好", 77),
    (
        "assert p . value == [ <NUM_LIT:1> , <NUM_LIT:2> ]",
        "assert p . value == [ <NUM_LIT:1> , <NUM_LIT:3> ]",
        97,
    ),
    ("ab", "abcdefghijkl", 29),
    ("c = <CHAR_LIT:a<NUM_LIT:7>b>", "c = a<7b", 64),
    ("'<STR_LIT>'", "''", 100),
    ("abc", "xyz", 0),
    ("", "return", 0),
]

SARI = [  # prediction, references, source, golden in percent
    (  # the example in the docstring of Hugging Face
        "About 95 you now get in .",
        [
            "About 95 species are currently known .",
            "About 95 species are now accepted .",
            "95 species are now accepted .",
        ],
        "About 95 species are currently accepted .",
        26.953601953601954,
    ),
    (
        "Die Maßnahmen werden verlängert.",
        ["Der Bundesrat verlängert die Maßnahmen."],
        "Der Bundesrat hat am Freitag beschlossen, die Maßnahmen zu verlängern.",
        64.67592592592594,
    ),
    (
        "Für Rückkehrer aus Mallorca gilt neu eine Quarantänepflicht, sagt das BAG.",
        ["Wer aus Mallorca kommt, muss in Quarantäne. Das sagt das BAG."],
        "Für Rückkehrer aus Mallorca gilt neu eine Quarantänepflicht, sagt das BAG.",
        47.412587412587406,
    ),
    (
        "今天 去 公园 。",
        ["天气 好 ， 去 公园 。"],
        "今天 天气 很 好 ， 我们 去 公园 吧 。",
        69.79166666666666,
    ),
    (
        "The firm paid 3.5% again.",
        ["The firm A&B paid 1,000 francs again and again."],
        'The well-known "A&amp;B" firm paid 3.5%, i.e. 1,000 francs-\nagain and again and again.',
        34.581922062572204,
    ),
    ("", ["Short."], "A long sentence here.", 73.33333333333334),
    ("the cat", ["the cat"], "the the the cat", 95.83333333333334),
]


@pytest.mark.parametrize(("prediction", "answer", "golden"), ROUGE_L)
def test_rouge_l_equals_the_package(prediction, answer, golden):
    assert rouge_l(prediction, answer) == pytest.approx(golden, abs=1e-12)


@pytest.mark.parametrize(("prediction", "answer", "golden"), EDIT_SIMILARITY)
def test_edit_similarity_equals_fuzzywuzzy(prediction, answer, golden):
    assert 100 * edit_similarity(prediction, answer) == pytest.approx(golden, abs=1e-12)


@pytest.mark.parametrize(("prediction", "references", "source", "golden"), SARI)
def test_sari_is_that_of_hugging_face(prediction, references, source, golden):
    assert 100 * sari(prediction, references, source) == pytest.approx(golden, abs=1e-10)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("B", "B", 1),
        ("b", "B", 0),
        (" B", "B", 0),
        ("B.", "B", 0),
        ("Friday", "Friday", 1),
        ("8840", "884", 0),
        ("", "", 0),
        # ScienceQA: the letter counts, not the explanation.
        ("B because", "B\nAn allusion is a brief mention.", 1),
        ("A\nAn allusion is a brief mention.", "B\nAn allusion is a brief mention.", 0),
        ("", "B\nAn allusion is a brief mention.", 0),
    ],
)
def test_accuracy_is_equality_or_that_of_the_first_character(prediction, answer, expected):
    assert accuracy(prediction, answer) == expected


@pytest.mark.parametrize("task", ["C-STANCE", "FOMC", "NumGLUE-cm", "NumGLUE-ds", "ScienceQA"])
def test_the_explained_answers_are_those_of_scienceqa(data_root, task):
    path = data_root / "TRACE-Benchmark" / "LLM-CL-Benchmark_500" / task / "test.json"
    if not path.is_file():
        pytest.skip(f"no data: {path} is not a file")
    answers = [record["answer"] for record in json.loads(path.read_text(encoding="utf-8"))]
    # Only where an answer is explained does a text that shares its first character score.
    scores = [accuracy(answer[0] + "?", answer) for answer in answers]
    assert scores == [1.0 if task == "ScienceQA" else 0.0] * len(answers)


def test_texts_without_a_sentence_score_nothing():
    assert rouge_l("", "a b") == rouge_l("a b", "") == rouge_l("...", "a b") == 0.0


texts = st.text(alphabet="ab .ü好<>:\n", max_size=30)
words = st.lists(st.sampled_from("abcde"), min_size=1, max_size=7)


@given(prediction=texts, answer=texts, source=texts)
def test_scores_lie_between_0_and_1(prediction, answer, source):
    assert 0 <= rouge_l(prediction, answer) <= 1
    assert 0 <= edit_similarity(prediction, answer) <= 1
    assert 0 <= sari(prediction, [answer, source], source) <= 1
    assert accuracy(prediction, answer) in (0, 1)


@given(text=texts.filter(lambda t: t.strip(" .\n")))
def test_the_answer_itself_scores_most(text):
    assert accuracy(text, text) == 1
    assert rouge_l(text, text) == pytest.approx(1, abs=1e-8)


@given(text=st.text(alphabet="abü好 =.", min_size=1, max_size=30))
def test_the_line_itself_scores_most(text):
    assert edit_similarity(text, text) == 1


@given(answer=words, source=st.permutations("abcdefgh"))
def test_the_only_reference_scores_most_in_sari(answer, source):
    reference = " ".join(answer)
    assert sari(reference, [reference], " ".join(source)) == pytest.approx(1)


@given(x=words, y=st.permutations("abcde"))
def test_rouge_l_by_trying_all_subsequences(x, y):
    x = list(dict.fromkeys(x))  # of distinct words the set is as long as the subsequence

    def subsequences(sentence):
        return {c for n in range(len(sentence) + 1) for c in combinations(sentence, n)}

    longest = max(map(len, subsequences(x) & subsequences(y)))
    precision, recall = longest / len(x), longest / len(y)
    f = 2 * precision * recall / (precision + recall) if longest else 0
    assert rouge_l(" ".join(x), " ".join(y)) == pytest.approx(f, abs=1e-7)


@given(x=st.text(alphabet="abc", min_size=1, max_size=7), y=st.permutations("abc"))
def test_edit_similarity_by_trying_all_subsequences(x, y):
    y = "".join(y)

    def subsequences(text):
        return {c for n in range(len(text) + 1) for c in combinations(text, n)}

    longest = max(map(len, subsequences(x) & subsequences(y)))
    # What is not common is deleted from one and inserted from the other.
    assert edit_similarity(x, y) == pytest.approx(2 * longest / (len(x) + len(y)), abs=0.00501)


def test_mean_score_is_over_all_samples():
    assert mean_score("accuracy", ["A", "", "C", "B"], ["A", "B", "C", "A"]) == 0.5
    assert mean_score("edit_similarity", ["ab", "abc"], ["ab", "xyz"]) == 0.5
    assert mean_score("rouge_l", ["a", "b"], ["a", "a"]) == pytest.approx(0.5, abs=1e-8)
    (prediction, references, source, golden) = SARI[1]
    pairs = ([prediction] * 2, references * 2, [source] * 2)
    assert 100 * mean_score("sari", *pairs) == pytest.approx(golden)


def test_mean_score_says_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"`metric` should be one of .*'rouge-l'\. .* mean 'rouge_l'"
    ):
        mean_score("rouge-l", ["a"], ["a"])
    with pytest.raises(ValueError, match=r"`sources` should .* for SARI, but is None"):
        mean_score("sari", ["a"], ["a"])
    with pytest.raises(ValueError, match=r"one text per sample, but have 1, 2 and 2"):
        mean_score("accuracy", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match=r"have 0, 0 and 0"):
        mean_score("accuracy", [], [])
    with pytest.raises(
        ValueError, match="`references` should hold at least one text, but is empty"
    ):
        sari("a", [], "a")
