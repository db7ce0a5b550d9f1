"""Scores of a generated text against a reference answer, as defined by the TRACE release.

Source: Wang et al., "TRACE: A Comprehensive Benchmark for Continual Learning in Large Language
Models", arXiv 2310.06762, in the version of its code of January 2024 (BeyonderXX/TRACE,
`metrics.py` and `evaluations/`). Every score lies in [0, 1] and **higher is better**, so that tasks
with different scores have a meaningful mean. The release gives edit similarity and SARI in percent,
100 times ours.

Texts are compared without stripping or change of case unless a score states it. As in the release,
an empty prediction scores 0 except in SARI.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rapidfuzz import fuzz
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from treelora_avalanche.choices import TEXT_METRICS, check_known

_ROUGE_EPSILON = 1e-8  # of the `rouge` package: a perfect match scores 0.999999995
_SARI_MAX_N = 4
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)

_tokenize_13a = Tokenizer13a()

NGram = tuple[str, ...]


def accuracy(prediction: str, answer: str) -> float:
    """Returns 1 if the prediction equals the answer, else 0: C-STANCE, FOMC, NumGLUE, ScienceQA.

    Whole strings are compared. Of an answer of one character, a newline and an explanation, the
    form of every answer of ScienceQA and of no other task, only the first character is compared, as
    in the release.

    >>> accuracy("12", "12"), accuracy("12.", "12")
    (1.0, 0.0)

    :param prediction: the generated text.
    :param answer: the reference answer.
    :return: 0 or 1; higher is better.
    """
    if not prediction or not answer:
        return 0.0
    part = compared_part(answer)
    return float((prediction if part == answer else prediction[0]) == part)


def compared_part(answer: str) -> str:
    """Returns the part of a reference answer that accuracy compares: all, or its first character.

    >>> compared_part("B\nOrganisms, including people"), compared_part("12")
    ('B', '12')

    :param answer: the reference answer.
    """
    return answer[0] if answer[1:2] == "\n" else answer


def rouge_l(prediction: str, answer: str) -> float:
    """Returns ROUGE-L as computed by the package `rouge` 1.0.1: MeetingBank.

    The summary-level score of Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004),
    section 3.2, over *sets* of words: with U the set of all words in the longest common
    subsequences of each pair of a predicted and a reference sentence,

        P = |U| / |words of the prediction|,   R = |U| / |words of the answer|,
        F = 2 P R / (P + R + 1e-8).

    Lin's beta is 1 here (1.2 elsewhere). Sentences end at every full stop, also at that of "3.5",
    and words at white space, in any script: Chinese without spaces is one word per sentence. Among
    several longest subsequences the package's choice is taken, since U depends on it.

    >>> round(rouge_l("the cat sat", "the cat ran"), 3)
    0.667

    :param prediction: the generated text.
    :param answer: the reference answer.
    :return: F in [0, 1); 0 if either text has no sentence. Higher is better.
    """
    predicted, expected = _sentences(prediction), _sentences(answer)
    if not predicted or not expected:
        return 0.0
    common = {w for p in predicted for e in expected for w in _longest_common_subsequence(p, e)}
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in expected for word in sentence})
    return 2 * (precision * recall / (precision + recall + _ROUGE_EPSILON))


def _sentences(text: str) -> list[list[str]]:
    # White space between or after full stops counts as a sentence of one empty word.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _longest_common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """Returns a longest common subsequence; of several, the one found by dropping from y first."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]  # of x[:i] and y[:j]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            length[i + 1][j + 1] = (
                length[i][j] + 1 if a == b else max(length[i][j + 1], length[i + 1][j])
            )
    common = []
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            common.append(x[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common[::-1]


def edit_similarity(prediction: str, answer: str) -> float:
    """Returns the similarity of two lines of code, (L - d) / L in full percent: Py150.

    L is the sum of the lengths and d the number of insertions and deletions from one text to the
    other: `fuzz.ratio` of the package `fuzzywuzzy` with `python-Levenshtein`. Before, the
    placeholders of CodeXGLUE's Py150 are resolved in both texts: `<STR_LIT:x>` to x, `<NUM_LIT>` to
    0, `<STR_LIT>` and `<CHAR_LIT>` to nothing.

    >>> edit_similarity("x = <NUM_LIT>", "x = 1")
    0.8

    :param prediction: the generated line.
    :param answer: the reference answer.
    :return: similarity in [0, 1], in steps of 0.01. Higher is better.
    """
    prediction, answer = _resolve_literals(prediction), _resolve_literals(answer)
    if not prediction or not answer:
        return 0.0
    return round(fuzz.ratio(prediction, answer)) / 100


def _resolve_literals(code: str) -> str:
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(r"\1", code)


def sari(prediction: str, references: Sequence[str], source: str) -> float:
    """Returns SARI of Xu et al. (2016), as in `sari` of Hugging Face `evaluate`: 20Minuten.

    The score measures which words are kept from the source, deleted from it and added to it. For n
    of 1 to 4, with the n-gram counts S of the source and C of the prediction, each times the number
    of references, and R of all references together:

    - keep: F1 of the precision, the mean of min(S, C, R) / min(S, C) over the n-grams kept, and
      the recall, sum min(S, C, R) / sum min(S, R);
    - delete: the precision alone, the mean of max(0, D - R) / D over the n-grams deleted,
      D = S - C > 0;
    - add: F1 of precision and recall of the set of n-grams that are new with respect to the source.

    0/0 is 1. The score is the mean over keep, delete and add, and over n. Texts are lower-cased
    and tokenized by sacrebleu's `13a`. The release passes the whole prompt as the source, and the
    answer as the only reference. A prediction equal to the only reference scores 1 unless the
    source repeats an n-gram more often than it.

    >>> sari("a sentence .", ["a sentence ."], "a long sentence .")
    1.0

    :param prediction: the generated text.
    :param references: the reference answers.
    :param source: the text to simplify.
    :return: SARI in [0, 1]. Higher is better.
    :raises ValueError: if there is no reference.
    """
    if not references:
        raise ValueError("`references` should hold at least one text, but is empty.")
    tokens = [_sari_tokens(text) for text in (source, prediction, *references)]
    total = 0.0
    for n in range(1, _SARI_MAX_N + 1):
        of_source, of_prediction, *of_references = (Counter(_ngrams(t, n)) for t in tokens)
        in_references = sum(of_references, Counter[NGram]())
        for counts in (of_source, of_prediction):
            for ngram in counts:
                counts[ngram] *= len(references)
        total += _keep_score(of_source, of_prediction, in_references)
        total += _delete_score(of_source, of_prediction, in_references)
        total += _add_score(set(of_source), set(of_prediction), set(in_references))
    return total / (3 * _SARI_MAX_N)


def _sari_tokens(text: str) -> list[str]:
    # A text without words has one empty token, as in `evaluate`.
    return _tokenize_13a(text.lower()).split(" ")


def _ngrams(tokens: Sequence[str], n: int) -> Iterator[NGram]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def _keep_score(
    source: Counter[NGram], prediction: Counter[NGram], references: Counter[NGram]
) -> float:
    kept, to_keep = source & prediction, source & references
    well_kept = kept & references
    precision = _ratio(sum(well_kept[g] / kept[g] for g in well_kept), len(kept))
    return _f1(precision, _ratio(well_kept.total(), to_keep.total()))


def _delete_score(
    source: Counter[NGram], prediction: Counter[NGram], references: Counter[NGram]
) -> float:
    deleted = source - prediction
    well_deleted = deleted - references
    return _ratio(sum(well_deleted[g] / deleted[g] for g in well_deleted), len(deleted))


def _add_score(source: set[NGram], prediction: set[NGram], references: set[NGram]) -> float:
    added, to_add = prediction - source, references - source
    well_added = len(added & to_add)
    return _f1(_ratio(well_added, len(added)), _ratio(well_added, len(to_add)))


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    both = precision + recall
    return 2 * precision * recall / both if both else 0.0


SCORES: dict[str, Callable[[str, str, str], float]] = dict(
    zip(
        TEXT_METRICS,
        (
            lambda prediction, answer, source: accuracy(prediction, answer),
            lambda prediction, answer, source: rouge_l(prediction, answer),
            lambda prediction, answer, source: edit_similarity(prediction, answer),
            lambda prediction, answer, source: sari(prediction, [answer], source),
        ),
        strict=True,
    )
)
"""The score of (prediction, answer, source), by the name of a metric."""


def mean_score(
    metric: str,
    predictions: Sequence[str],
    answers: Sequence[str],
    sources: Sequence[str] | None = None,
) -> float:
    """Returns the mean score of a task's predictions, including empty ones, as in the release.

    >>> mean_score("accuracy", ["A", "B"], ["A", "C"])
    0.5

    :param metric: a name in :data:`~treelora_avalanche.choices.TEXT_METRICS`.
    :param predictions: the generated texts.
    :param answers: the reference answer of each.
    :param sources: the text that each simplifies; only SARI needs it.
    :return: the mean in [0, 1]. Higher is better.
    :raises ValueError: if the metric is unknown, there are no predictions, their number differs
        from that of the answers or sources, or SARI has no sources.
    """
    check_known("`metric`", metric, SCORES)
    if sources is None:
        if metric == "sari":
            raise ValueError(
                "`sources` should hold one text per answer for SARI, but is None. Pass the prompts."
            )
        sources = [""] * len(answers)
    if not predictions or not len(predictions) == len(answers) == len(sources):
        raise ValueError(
            "`predictions`, `answers` and `sources` should have one text per sample, but have "
            f"{len(predictions)}, {len(answers)} and {len(sources)}."
        )
    score = SCORES[metric]
    return sum(map(score, predictions, answers, sources)) / len(predictions)


__all__ = [
    "SCORES",
    "accuracy",
    "compared_part",
    "edit_similarity",
    "mean_score",
    "rouge_l",
    "sari",
]
