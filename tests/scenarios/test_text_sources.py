"""Text tasks in CSV, Parquet and data sets in Python; own keys, overlap, wrongly named parts."""

import builtins
import json
import logging

import pytest

from treelora_avalanche.models.tokenization import encode_answer
from treelora_avalanche.scenarios import OLoRAOrder, TextClasses, TextTasks
from treelora_avalanche.scenarios.data.text_records import TextRecord, read_records
from treelora_avalanche.scenarios.data.text_scoring import choose_scoring
from treelora_avalanche.scenarios.o_lora import classification_tasks
from treelora_avalanche.scenarios.trace import trace_tasks


def jsonl(*records):
    return "\n".join(json.dumps(record) for record in records)


def pairs(n, start=0, name=""):
    return [{"prompt": f"{name}{i}?", "answer": f"a{i}"} for i in range(start, start + n)]


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode("utf-8"))
    return file


# ---------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_cells_are_texts_as_written(tmp_path, mark, end):
    lines = ['prompt,answer,"note"', 'a,"b, ""c""",', '007,nan,"x', 'y"', "", "NA,1.50,null", ""]
    file = write(tmp_path / "a.csv", mark + end.join(lines))
    assert read_records(file).records == [
        TextRecord("a", 'b, "c"'),
        TextRecord("007", "nan"),
        TextRecord("NA", "1.50"),
    ]


def test_a_quoted_line_feed_is_part_of_the_cell(tmp_path):
    long = "word " * 40_000  # above the limit of csv
    file = write(tmp_path / "a.csv", f'text,label\n"one\ntwo",0\n"{long}",1\n')
    assert read_records(file).records == [TextRecord("one\ntwo", "0"), TextRecord(long, "1")]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('prompt,answer\n"a\nb",c\nd,\n', r"'answer' of record 1 of .*a\.csv \(line 4\) is empty"),
        ("prompt,reply\na,b\n", r"record 0 of .*a\.csv \(line 2\) lacks 'answer'; it has 'prompt'"),
        ("prompt,answer\na,b\nc\n", r"record 1 of .*a\.csv \(line 3\) should have 2 cells.*has 1"),
        ("prompt,answer\na,b, c\n", r"record 0 of .*\(line 2\) should have 2 cells.* but has 3"),
        ('prompt,answer\na,b\n"c,d\ne,f\n', r"a\.csv is not valid CSV \(from line 3: unexpected"),
        ('prompt,answer\n"a"b,c\n', r"a\.csv is not valid CSV \(from line 2: "),
        (
            "prompt;answer\na;b\n",
            r"a\.csv \(line 1\) should separate .* by commas.*'prompt;answer'",
        ),
        ("prompt,answer,prompt\na,b,c\n", r"a\.csv \(line 1\) .* has 'prompt' twice"),
        ("prompt,answer\n", r"a\.csv should hold a list of records, but holds none"),
    ],
)
def test_csv_that_cannot_be_read_is_refused_by_line(tmp_path, content, match):
    with pytest.raises(ValueError, match=match):
        read_records(write(tmp_path / "a.csv", content))


def test_formats_may_differ_between_tasks_and_parts(tmp_path, make_tokenizer):
    write(tmp_path / "both/train.csv", "prompt,answer\na,b\nc,d\n")
    write(tmp_path / "both/test.jsonl", jsonl({"prompt": "e", "answer": "f"}))
    write(tmp_path / "one.csv", "text,label\n" + "".join(f"t{i},{i}\n" for i in range(10)))
    benchmark = TextTasks(tmp_path, make_tokenizer())
    assert benchmark.task_names == ["both", "one"]
    assert benchmark.train_stream[0].prompts == ["a", "c"]
    assert benchmark.test_stream[0].answers == ["f"]
    drawn = benchmark.train_stream[1].prompts + benchmark.test_stream[1].prompts
    assert sorted(drawn) == [f"t{i}" for i in range(10)]


# ------------------------------------------------------------------------------------------ Parquet


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"a\.parquet .*pip install treelora-avalanche\[parquet"):
        read_records(write(tmp_path / "a.parquet", "PAR1"))


def test_parquet_columns_are_keys(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", "nan"], "label": [0, 7], "id": [1.5, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet").records == [
        TextRecord("a", "0"),
        TextRecord("nan", "7"),
    ]
    table = pyarrow.table({"prompt": ["a", "b"], "answer": ["c", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'answer' of record 1 of .*a\.parquet is empty"):
        read_records(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet is not valid Parquet"):
        read_records(write(tmp_path / "b.parquet", "no table"))


# --------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"prompt": "question", "answer": "reply"}, ("q", "r")),
        ({"instruction": "question", "input": "text", "output": "reply"}, ("q\nt", "r")),
        ({"text": "question"}, ("q", "l")),
        ({"label": "reply"}, ("t", "r")),
    ],
)
def test_own_keys_in_every_format(tmp_path, name, keys, expected):
    record = {"question": "q", "reply": "r", "text": "t", "label": "l"}
    content = {
        "a.csv": "question,reply,text,label\nq,r,t,l",
        "a.jsonl": jsonl(record),
        "a.json": json.dumps([record]),
    }[name]
    file = write(tmp_path / name, content)
    assert read_records(file, keys).records == [TextRecord(*expected)]


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"promt": "question"}, r"key in `keys` .* but is 'promt'\. Did you mean 'prompt'"),
        ({"prompt": "question", "label": "reply"}, "should name keys of one record, but names"),
        (
            {"prompt": "query"},
            r"record 0 of .* lacks 'query', its 'prompt' in `keys`; it has 'ques",
        ),
        ({"prompt": "question", "answer": "reply"}, r"'reply' of record 0 of .* is empty"),
    ],
)
def test_wrong_own_keys_are_named(tmp_path, keys, match):
    file = write(tmp_path / "a.jsonl", jsonl({"question": "q", "reply": "", "answer": "r"}))
    with pytest.raises(ValueError, match=match):
        read_records(file, keys)


# ------------------------------------------------------------------------------ data sets in Python


def test_splits_in_python(make_tokenizer):
    tasks = {
        "two": {"train": pairs(3), "test": pairs(2, 3), "validation": pairs(1)},
        "one": pairs(10),
    }
    benchmark = TextTasks(tasks, make_tokenizer(), keys={"answer": "answer"})
    assert benchmark.task_names == ["two", "one"]
    assert benchmark.train_stream[0].prompts == ["0?", "1?", "2?"]
    assert benchmark.test_stream[0].answers == ["a3", "a4"]
    assert len(benchmark.test_stream[1].prompts) == 2


class Labels:
    """Stands for ``datasets.ClassLabel``."""

    names = ("bad", "good")

    def int2str(self, label):
        return self.names[label]


class Split(list):
    """Stands for ``datasets.Dataset``."""

    def __init__(self, *labels):
        super().__init__({"text": f"{label} {n}", "label": label} for n, label in enumerate(labels))
        self.features = {"text": object(), "label": Labels()}


def test_class_labels_give_their_names(make_tokenizer):
    tasks = {"reviews": {"train": Split(0, 1, 1), "test": Split(1, 0)}}
    assert TextTasks(tasks, make_tokenizer()).test_stream[0].answers == ["good", "bad"]
    benchmark = TextClasses(tasks, make_tokenizer(), max_length=20)
    assert benchmark.class_names == ["bad", "good"]
    keys = {"prompt": "text", "answer": "label"}
    assert TextTasks(tasks, make_tokenizer(), keys=keys).train_stream[0].answers[0] == "bad"


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        ({}, "is empty"),
        (
            {"train": pairs(2), "test": pairs(2)},
            r"has the keys train, test\. .* splits of one task",
        ),
        (
            {"a": {"train": pairs(2), "validation": pairs(2)}},
            "'a' .* lacks test; it has train, val",
        ),
        ({"a": {"train": pairs(2), "test": []}}, "the test split of task 'a' .* holds none"),
        ({"a": ["text"]}, "record 0 of task 'a' should be an object .* is a str"),
        ({"a": Split(0, -1)}, "'label' of record 1 of task 'a' .* from 0 to 1, but is -1"),
        ({"a": Split(0, None)}, "'label' of record 1 of task 'a' is empty"),
        ({"a": {"train": pairs(2), "test": [{"prompt": "x"}]}}, "record 0 of the test split of"),
    ],
)
def test_data_sets_that_cannot_be_told_are_refused(make_tokenizer, tasks, match):
    with pytest.raises(ValueError, match=match):
        TextTasks(tasks, make_tokenizer())


def test_hugging_face_datasets(make_tokenizer):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )

    def split(*labels):
        columns = {"text": [f"{label} {n}" for n, label in enumerate(labels)], "label": [*labels]}
        return datasets.Dataset.from_dict(columns, features=features)

    reviews = datasets.DatasetDict({"train": split(0, 1, 1), "test": split(1, 0)})
    tasks = {"reviews": reviews, "more": split(*[0, 1] * 5)}
    benchmark = TextTasks(tasks, make_tokenizer())
    assert benchmark.task_names == ["reviews", "more"]
    assert benchmark.test_stream[0].prompts == ["1 0", "0 1"]
    assert benchmark.test_stream[0].answers == ["good", "bad"]
    assert len(benchmark.test_stream[1].prompts) == 2
    assert TextClasses(tasks, make_tokenizer(), max_length=20).class_names == ["bad", "good"]
    with pytest.raises(ValueError, match=r"has the keys train, test\. .* splits of one task"):
        TextTasks(reviews, make_tokenizer())


# ------------------------------------------------------------------------------------------ overlap


@pytest.mark.parametrize("stream", [TextTasks, TextClasses])
def test_test_record_among_the_training_records_is_refused(tmp_path, make_tokenizer, stream):
    write(tmp_path / "a/train.jsonl", jsonl(*pairs(4)))
    other_answer = {"prompt": "0?", "answer": "other"}
    test = write(tmp_path / "a/test.jsonl", jsonl(other_answer, *pairs(2, 8), *pairs(2, 2)))
    match = (
        r"task 'a' should differ, but 2 of 5 .* record 3 of .*a/test\.jsonl, .* record 2 of "
        r".*a/train\.jsonl.*allow_overlap=True"
    )
    with pytest.raises(ValueError, match=match):
        stream(tmp_path, make_tokenizer())
    assert len(stream(tmp_path, make_tokenizer(), allow_overlap=True).test_stream[0].dataset) == 5
    write(test, jsonl(other_answer, *pairs(2, 8)))
    stream(tmp_path, make_tokenizer())
    write(tmp_path / "b.jsonl", jsonl(*pairs(4)))  # of another task
    stream(tmp_path, make_tokenizer())


def test_equal_records_in_a_drawn_split_are_refused(tmp_path, make_tokenizer):
    write(tmp_path / "a.jsonl", jsonl(*pairs(5), *pairs(5)))
    with pytest.raises(ValueError, match=r"record (\d) of .*a\.jsonl, .* record (\d) of") as error:
        TextTasks(tmp_path, make_tokenizer())
    records = read_records(tmp_path / "a.jsonl").records
    first, second = (int(part.split()[0]) for part in str(error.value).split(" record ")[1:])
    assert first != second
    assert records[first] == records[second]


def test_published_texts_are_taken_as_they_are(data_root):
    if not (data_root / "TRACE-Benchmark").is_dir():
        pytest.skip("TRACE is missing")
    (task,) = trace_tasks(data_root, "500", ["NumGLUE-ds"])
    train = set(task.train.records)
    assert sum(record in train for record in task.test.records) == 6  # of 100


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["b/training.json"], r"holds training\.json, and lacks train\.json and test\.json"),
        (["b/Train.json", "b/Test.json"], r"holds Test\.json, Train\.json, and lacks train\.json"),
        (["b/train.json", "b/testing.jsonl"], r"holds testing\.jsonl, and lacks test\.json\."),
        (["b/data.csv"], r"holds data\.csv, and lacks"),
        (["b/train.tsv", "b/test.txt"], r"holds test\.txt, train\.tsv, and lacks"),
        (["b/train.jsonl.gz"], r"holds train\.jsonl\.gz, and lacks"),
        (["b/train.json", "b/test.json", "b/train_2.json"], r"holds train_2\.json\. Rename"),
        (["b/train.JSON", "b/test.JSON"], r"holds test\.JSON, train\.JSON, and lacks"),
    ],
)
def test_wrongly_named_parts_are_refused(tmp_path, make_tokenizer, names, match):
    write(tmp_path / "a.jsonl", jsonl(*pairs(5)))
    for name in names:
        write(tmp_path / name, jsonl(*pairs(5)))
    with pytest.raises(ValueError, match=match) as error:
        TextTasks(tmp_path, make_tokenizer())
    assert "expected are train.json and test.json" in str(error.value)
    assert TextTasks(tmp_path, make_tokenizer(), tasks=["a"]).task_names == ["a"]


def test_other_files_of_a_task_are_left_alone(tmp_path, make_tokenizer):
    for part in ("train", "test", "validation", "labels", "dataset_info"):
        write(tmp_path / f"a/{part}.json", json.dumps(pairs(3, name=part)))
    write(tmp_path / "notes/readme.txt", "no task")
    assert TextTasks(tmp_path, make_tokenizer()).task_names == ["a"]


def test_formats_that_are_not_read_are_counted_in_one_line(tmp_path, make_tokenizer, caplog):
    for name in ("a.json", "b.txt", "c.tsv", "d.tsv", "e.jsonl.gz", "f.JSON", "README.md"):
        write(tmp_path / name, json.dumps(pairs(5)))
    with caplog.at_level(logging.WARNING):
        TextTasks(tmp_path, make_tokenizer(), metric="rouge_l", max_new_tokens=4)
    (line,) = caplog.messages
    assert "left out 5 files" in line
    assert "1 .JSON, 1 .jsonl.gz, 2 .tsv, 1 .txt; convert them to one of .json, .jsonl" in line


# ----------------------------------------------------------------------------------- scores, limits


def labelled(*answers):
    return [{"prompt": f"{n}?", "answer": answer} for n, answer in enumerate(answers)]


def test_scores_are_chosen_from_the_training_answers(make_tokenizer, caplog):
    tasks = {
        "labels": {"train": labelled("yes", "no", "yes", "no"), "test": labelled("maybe not")},
        "texts": {"train": labelled("a", "b", "c"), "test": labelled("d")},
        "long": {"train": labelled("x" * 60, "x" * 60), "test": labelled("d")},
    }
    with caplog.at_level(logging.WARNING):
        chosen = TextTasks(tasks, make_tokenizer()).test_stream
    found = [(e.metric, e.max_new_tokens) for e in chosen]
    assert found == [("accuracy", 4), ("rouge_l", 128), ("rouge_l", 128)]  # "yes" and the end
    (line,) = caplog.messages
    assert "labels: accuracy, 4 tokens; texts: rouge_l, 128 tokens; long: rouge_l, 128" in line


@pytest.mark.parametrize(
    ("given", "metric", "length", "n_lines"),
    [
        ({"metric": "sari"}, "sari", 4, 1),
        ({"max_new_tokens": 9}, "accuracy", 9, 1),
        ({"metric": {"a": "rouge_l"}, "max_new_tokens": {"a": 7}}, "rouge_l", 7, 0),
        ({"metric": {}, "max_new_tokens": {"a": 7}}, "accuracy", 7, 1),
    ],
)
def test_given_scores_win(make_tokenizer, caplog, given, metric, length, n_lines):
    tasks = {"a": {"train": labelled("yes", "no", "yes", "no"), "test": labelled("maybe")}}
    with caplog.at_level(logging.WARNING):
        (experience,) = TextTasks(tasks, make_tokenizer(), **given).test_stream
    assert (experience.metric, experience.max_new_tokens) == (metric, length)
    assert len(caplog.messages) == n_lines


def test_chosen_scores_are_those_of_published_classifications(o_lora, make_tokenizer):
    tokenizer = make_tokenizer()
    for task in classification_tasks(o_lora, ["RTE", "COPA", "CB"]):
        scoring = choose_scoring(task.train.records, tokenizer)
        assert scoring.metric == task.metric == "accuracy"
        longest = max((record.answer for record in task.train.records), key=len)
        assert scoring.max_new_tokens == len(encode_answer(tokenizer, longest)) == len(longest) + 1


def test_tasks_of_an_order(o_lora, make_tokenizer):
    tokenizer = make_tokenizer()
    benchmark = OLoRAOrder(4, o_lora, tokenizer, tasks=["COPA", "CB"], limit=1)
    assert benchmark.task_names == ["COPA", "CB"]  # and no other is missing
    with pytest.raises(ValueError, match="task in `tasks` of order 1 should be one of dbpedia"):
        OLoRAOrder(1, o_lora, tokenizer, tasks=["RTE"])
    with pytest.raises(ValueError, match="list of different task names"):
        OLoRAOrder(1, o_lora, tokenizer, tasks=["agnews", "agnews"])


@pytest.mark.parametrize(
    ("limits", "n_train", "n_test"),
    [
        ({}, 5, 4),
        ({"limit": 3}, 3, 3),
        ({"limit": 3, "eval_limit": 2}, 3, 2),
        ({"limit": 3, "eval_limit": "all"}, 3, 4),
        ({"eval_limit": 1}, 5, 1),
    ],
)
@pytest.mark.parametrize("stream", [TextTasks, TextClasses])
def test_limits_of_training_and_testing(make_tokenizer, stream, limits, n_train, n_test):
    tasks = {"a": {"train": pairs(5), "test": pairs(4, 5)}}
    benchmark = stream(tasks, make_tokenizer(), **limits)
    streams = benchmark.train_stream, benchmark.test_stream
    assert [len(s[0].dataset) for s in streams] == [n_train, n_test]
    with pytest.raises(
        ValueError, match="`eval_limit` should be at least 1, or 'all', but is 'al'"
    ):
        stream(tasks, make_tokenizer(), eval_limit="al")
    with pytest.raises(ValueError, match=r"`eval_limit` .* but is 0"):
        stream(tasks, make_tokenizer(), eval_limit=0)
