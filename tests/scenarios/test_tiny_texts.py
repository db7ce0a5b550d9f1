"""Generated instruction tasks: disjoint, balanced, reproducible, with the right answers."""

import re
from collections import Counter

import pytest

from treelora_avalanche.models.tokenization import encode_sample
from treelora_avalanche.scenarios import TINY_TASKS, TinyTexts
from treelora_avalanche.scenarios.data.tiny_words import PAST_TENSES, PLURALS

PER_UNIT = {
    ("years", "decades"): 10,
    ("millimetres", "centimetres"): 10,
    ("years", "centuries"): 100,
    ("centimetres", "metres"): 100,
    ("cents", "euros"): 100,
    ("grams", "kilograms"): 1000,
    ("metres", "kilometres"): 1000,
    ("millilitres", "litres"): 1000,
    ("years", "millennia"): 1000,
    ("milliseconds", "seconds"): 1000,
    ("kilograms", "tonnes"): 1000,
}
IRREGULAR_PLURALS = {
    "man": "men", "woman": "women", "child": "children", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "mouse": "mice", "person": "people", "ox": "oxen", "photo": "photos",
    "piano": "pianos", "radio": "radios",
}  # fmt: skip
VOWEL = "[aeiou]"
WORDS_OF_PRAISE = {
    "excellent", "great", "superb", "amazing", "wonderful", "delicious", "tasty", "perfect",
    "fresh", "fantastic", "outstanding", "flavourful", "gripping", "brilliant", "touching",
    "clever", "moving", "funny", "unforgettable", "friendly", "polite", "helpful", "kind",
    "attentive", "charming", "welcoming", "cheerful", "convincing", "talented", "impressive",
    "believable", "inspired", "magnificent", "memorable",
}  # fmt: skip


def plural(noun):
    """The plural by the rules of English."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun == "leaf" or re.search("(af|ife|lf|ief)$", noun):
        return re.sub("fe?$", "ves", noun)
    if re.search(f"(?<!{VOWEL})y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(s|x|ch|sh|o)$", noun) else "s")


def regular_past(verb):
    """The past tense of a regular verb."""
    if verb.endswith("e"):
        return verb + "d"
    if re.search(f"(?<!{VOWEL})y$", verb):
        return verb[:-1] + "ied"
    # Verbs of one syllable double a consonant after one vowel.
    if re.fullmatch(f"[^aeiou]+{VOWEL}[^aeiouwxy]", verb):
        return verb + verb[-1] + "ed"
    return verb + "ed"


@pytest.fixture(scope="module")
def stream(make_tokenizer):
    return TinyTexts(make_tokenizer(), max_length=160)


def samples(benchmark, name):
    """Text and answer of all samples of a task."""
    i = benchmark.task_names.index(name)
    for experience in (benchmark.train_stream[i], benchmark.test_stream[i]):
        for prompt, answer in zip(experience.prompts, experience.answers, strict=True):
            _, text, end = prompt.split("\n")
            assert end == "Answer:"
            yield text, answer


def test_tasks_come_in_order_with_their_groups(stream):
    assert stream.task_names == list(TINY_TASKS)
    groups = dict(zip(stream.task_names, stream.groups, strict=True))
    assert groups["restaurants"] == groups["films"] == groups["restaurants_again"] == "sentiment"
    assert groups["plurals"] == groups["past_tenses"]
    assert len(set(groups.values())) == 4
    for experience in (*stream.train_stream, *stream.test_stream):
        assert experience.metric == "accuracy"
        assert len({prompt.split("\n")[0] for prompt in experience.prompts}) == 1
    first, again = stream.train_stream[0], stream.train_stream[-1]
    assert first.prompts[0].split("\n")[0] == again.prompts[0].split("\n")[0]


@pytest.mark.parametrize(("n_train", "n_test"), [(64, 32), (10, 7)])
def test_sizes_are_those_asked_for_and_no_prompt_occurs_twice(make_tokenizer, n_train, n_test):
    benchmark = TinyTexts(make_tokenizer(), train_per_task=n_train, test_per_task=n_test)
    prompts = []
    for stream, size in ((benchmark.train_stream, n_train), (benchmark.test_stream, n_test)):
        for experience in stream:
            assert len(experience.prompts) == len(experience.answers) == len(experience.dataset)
            assert len(experience.prompts) == size
            prompts += experience.prompts
    assert len(set(prompts)) == len(prompts) == 7 * (n_train + n_test)


def test_labels_are_balanced(stream):
    for name, labels in (
        ("restaurants", ["negative", "positive"]),
        ("films", ["negative", "positive"]),
        ("headlines", ["business", "politics", "science", "sport"]),
        ("restaurants_again", ["negative", "positive"]),
    ):
        i = stream.task_names.index(name)
        for experience in (stream.train_stream[i], stream.test_stream[i]):
            counts = Counter(experience.answers)
            assert sorted(counts) == labels
            assert len(set(counts.values())) == 1
            # Not one label after the other, which a model could learn in place of the task.
            assert len(set(experience.answers[: len(experience.answers) // 2])) == len(labels)


def test_seed_reproduces_the_samples_whatever_the_other_tasks(stream, make_tokenizer):
    def prompts(**options):
        benchmark = TinyTexts(make_tokenizer(), tasks=["restaurants_again", "plurals"], **options)
        assert benchmark.task_names == ["restaurants_again", "plurals"]
        assert benchmark.groups == ["sentiment", "inflection"]
        return [e.prompts for e in (*benchmark.train_stream, *benchmark.test_stream)]

    chosen = [stream.task_names.index(name) for name in ("restaurants_again", "plurals")]
    both = (stream.train_stream, stream.test_stream)
    assert prompts() == prompts(seed=0) == [part[i].prompts for part in both for i in chosen]
    assert prompts(seed=1) != prompts(seed=0)


def test_conversions_are_right(stream):
    for text, answer in samples(stream, "conversions"):
        small, number, unit = re.fullmatch(r"How many (\w+) are (\d+) (\w+)\?", text).groups()
        assert int(answer) == int(number) * PER_UNIT[small, unit]
        assert len(answer) <= 4


def test_plurals_follow_the_rules(stream):
    assert [(n, p) for n, p in PLURALS.items() if p != plural(n)] == []
    assert set(samples(stream, "plurals")) < set(PLURALS.items())


def test_past_tenses_of_regular_verbs_follow_the_rules(stream):
    assert set(samples(stream, "past_tenses")) < set(PAST_TENSES.items())
    regular = [(verb, past) for verb, past in PAST_TENSES.items() if past.endswith("ed")]
    assert len(regular) >= 50
    doubled = {"answer", "listen", "open", "visit", "play", "need"}  # none of them doubles
    assert [(v, p) for v, p in regular if p != regular_past(v) and v not in doubled] == []
    assert all(verb + "ed" == past for verb, past in regular if verb in doubled)


@pytest.mark.parametrize("name", ["restaurants", "films", "restaurants_again"])
def test_praise_is_positive(stream, name):
    for text, answer in samples(stream, name):
        words = re.fullmatch(r"The (\w+) was (\w+) and the (\w+) was (\w+)\.", text).groups()
        assert {word in WORDS_OF_PRAISE for word in words[1::2]} == {answer == "positive"}


def test_every_answer_can_be_generated(stream, make_tokenizer):
    tokenizer = make_tokenizer()
    for experience in stream.test_stream:
        for prompt, answer in zip(experience.prompts, experience.answers, strict=True):
            encoded = encode_sample(tokenizer, prompt, answer, 200)
            assert len(encoded.tokens) - encoded.n_prompt <= experience.max_new_tokens


def test_bad_arguments_are_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="Did you mean 'plurals'"):
        TinyTexts(tokenizer, tasks=["plural"])
    with pytest.raises(ValueError, match=r"`tasks` should name each task once, .* 'films' twice"):
        TinyTexts(tokenizer, tasks=["films", "films"])
    with pytest.raises(ValueError, match="`test_per_task` should be at least 1, but is 0"):
        TinyTexts(tokenizer, test_per_task=0)
    with pytest.raises(ValueError, match=r"at most \d+ together for the task 'plurals', .* 999"):
        TinyTexts(tokenizer, tasks=["plurals"], train_per_task=999)
