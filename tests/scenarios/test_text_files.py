"""Text files as people have them: encodings, lines, names, special tokens."""

import json

import pytest
from transformers import PreTrainedTokenizer

from treelora_avalanche.scenarios import TextClasses, TextTasks
from treelora_avalanche.scenarios.data.text_files import read_json
from treelora_avalanche.scenarios.data.text_records import TextRecord, read_records

SEPARATORS = "\u2028\u2029\x85\x1c\x0b\x0c"
"""Where `str.splitlines` ends a line and JSON does not; the last three must be escaped in JSON."""


def lines(*records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def record(prompt, answer="b"):
    return {"prompt": prompt, "answer": answer}


# --------------------------------------------------------------------------------- lines, encodings


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_within_strings_do_not_end_a_line(tmp_path, separator, end):
    file = tmp_path / "a.jsonl"
    text = f"one{separator}two"
    file.write_bytes(end.join([lines(record(text)), "", lines(record("c")), ""]).encode())
    assert read_records(file).records == [TextRecord(text, "b"), TextRecord("c", "b")]


def test_line_of_an_error_is_the_editors(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(f"{lines(record('one' + SEPARATORS))}\n\n" + '{"prompt": }\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl is not valid JSONL \(line 3, column 12: Exp"):
        read_json(file)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_byte_order_mark_is_accepted(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    content = lines(record("grün")) if suffix == "jsonl" else json.dumps([record("grün")])
    file.write_bytes(b"\xef\xbb\xbf" + content.encode("utf-8"))
    assert read_records(file).records == [TextRecord("grün", "b")]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_other_encoding_is_named_with_its_position(tmp_path, mark):
    file = tmp_path / "a.jsonl"
    content = mark + (lines(record("plain"), record("grün"))).encode("latin-1")
    file.write_bytes(content)
    position = content.index(b"\xfc")
    with pytest.raises(
        ValueError, match=rf"a\.jsonl .* byte {position} \(0xfc, in line 2\) is not"
    ):
        read_json(file)


@pytest.mark.parametrize(
    ("encoding", "position"), [("utf-16", 0), ("utf-16-le", 1), ("utf-16-be", 0), ("utf-32", 0)]
)
def test_wide_encodings_are_named(tmp_path, encoding, position):
    file = tmp_path / "a.json"
    file.write_bytes(json.dumps([record("plain")]).encode(encoding))
    with pytest.raises(
        ValueError, match=rf"a\.json should be encoded in UTF-8, but byte {position}"
    ):
        read_json(file)


def test_lines_in_a_json_file_are_explained(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(lines(record("a"), record("b")))
    with pytest.raises(ValueError, match=r"not valid JSON \(Extra data: line 2.*name it \.jsonl"):
        read_json(file)


def test_half_a_character_is_refused_by_record(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(record("a")) + '\n{"prompt": "\\ud83d", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"'prompt' of record 1 of .*a\.jsonl .*lone surrogate"):
        read_records(file)


# -------------------------------------------------------------------------------------------- names


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(lines(*(record(str(i)) for i in range(5))))


@pytest.mark.parametrize("other", ["test.jsonl", "validation.jsonl"])
@pytest.mark.parametrize("stream", [TextTasks, TextClasses])
def test_parts_of_a_task_at_the_root_are_refused(tmp_path, make_tokenizer, stream, other):
    write(tmp_path, "train.jsonl", other)
    name = other.split(".")[0]
    called = (
        rf"would become tasks called (train, {name}|{name}, train)\..* move them to a subfolder"
    )
    with pytest.raises(ValueError, match=called):
        stream(tmp_path, make_tokenizer())
    write(tmp_path, "sums/train.jsonl", "sums/test.jsonl")
    for file in (tmp_path / "train.jsonl", tmp_path / other):
        file.unlink()
    stream = stream(tmp_path, make_tokenizer(), allow_overlap=True)
    assert stream.task_names == ["sums"]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a.json", "a.jsonl"], r"holds a\.json and a\.jsonl, .*both be the task 'a'"),
        (["a.jsonl", "a/train.jsonl", "a/test.jsonl"], r"a\.jsonl and a/, .*both be the task 'a'"),
        (["a.jsonl", "a/notes.txt"], r"a\.jsonl and a/, .*both be the task 'a'"),
        (
            ["a/train.json", "a/train.jsonl", "a/test.jsonl"],
            r"train\.json and train\.jsonl, .* one",
        ),
    ],
)
def test_two_sources_of_a_task_are_refused_by_name(tmp_path, make_tokenizer, names, match):
    write(tmp_path, *names)
    with pytest.raises(ValueError, match=match):
        TextTasks(tmp_path, make_tokenizer())


def test_hidden_files_and_those_of_systems_are_no_tasks(tmp_path, make_tokenizer):
    write(tmp_path, "a.jsonl", "._a.jsonl", ".cache/train.jsonl", ".cache/test.jsonl")
    write(tmp_path, "__MACOSX/train.jsonl", "__MACOSX/test.jsonl", ".a.jsonl.swp")
    assert TextTasks(tmp_path, make_tokenizer()).task_names == ["a"]


# ----------------------------------------------------------------------------------- special tokens

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<u>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def characters(text):
    """The ids of the tiny tokenizer, which has a token per ASCII character."""
    return [ord(character) - 31 for character in text]


class PythonTokenizer(PreTrainedTokenizer):
    """The tiny tokenizer without the Rust library, whose tokenizers transformers calls slow."""

    def get_vocab(self):
        return {"<unk>": 0, **{chr(31 + i): i for i in range(1, 96)}, "<s>": 96, "</s>": 97}

    @property
    def vocab_size(self):
        return 98

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_special_tokens_in_texts_stay_text(tmp_path, make_tokenizer, template, is_fast):
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = make_tokenizer(**special) if is_fast else PythonTokenizer(**special)
    assert tokenizer.is_fast == is_fast
    tokenizer.chat_template = template
    records = [record("a</s>b<s>c", "d</s>e<unk>"), record("plain")]
    (tmp_path / "a.jsonl").write_text(lines(*records))
    benchmark = TextTasks(tmp_path, tokenizer, test_fraction=0.5, max_length=60)
    before, after = ([96, *characters("<u>")], [97, *characters("<a>")]) if template else ([], [])
    found = {}
    for experience in (benchmark.train_stream[0], benchmark.test_stream[0]):
        ((x, y, _),) = experience.dataset
        found[experience.prompts[0]] = x[x >= 0].tolist(), y[y >= 0].tolist()
    for prompt, answer in records_as_pairs(records):
        target = [*characters(answer), 97]
        assert found[prompt] == (
            [*before, *characters(prompt), *after, *target[:-1]],
            target,
        )


def records_as_pairs(records):
    return [(r["prompt"], r["answer"]) for r in records]


def test_special_tokens_in_prompts_to_generate_from_stay_text(make_language_model):
    model = make_language_model()
    assert model.encode_prompts(["a</s>"], 4)[0][-5:] == characters("a</s>")


def test_special_tokens_in_classified_texts_stay_text(tmp_path, make_tokenizer):
    (tmp_path / "a.jsonl").write_text(lines(record("a</s>b"), record("a</s>b")))
    benchmark = TextClasses(tmp_path, make_tokenizer(), max_length=20, allow_overlap=True)
    x, *_ = benchmark.train_stream[0].dataset[0]
    assert x[x >= 0].tolist() == characters("a</s>b")


@pytest.mark.parametrize("text", ["Once </s> upon <s>a time", "</s>", "a<unk>", "</s></s> b"])
def test_pretrained_tokenizer_reads_special_tokens_as_text(data_root, tmp_path, text):
    transformers = pytest.importorskip("transformers")
    folder = data_root / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (tmp_path / "a.jsonl").write_text(lines(record(text, text), record(text, text)))
    experience = TextTasks(tmp_path, tokenizer, max_length=80, allow_overlap=True).train_stream[0]
    ((x, y, _),) = experience.dataset
    tokens = x[x >= 0].tolist()
    assert tokens[0] == tokenizer.bos_token_id
    assert not set(tokens[1:]) & set(tokenizer.all_special_ids)
    answer = y[y >= 0].tolist()
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == text


# --------------------------------------------------------------------------------------------- keys


def user(text, answer="b", *before):
    turns = [*before, ("user", text), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("as_written", "prompt", "answer"),
    [
        ({"prompt": "a", "answer": "b"}, "a", "b"),
        ({"prompt": "a", "answer": "b", "completion": "c", "text": "d", "label": "e"}, "a", "b"),
        ({"prompt": "a", "completion": " b"}, "a", " b"),
        ({"instruction": "a", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": "", "output": "b", "text": "whole"}, "a", "b"),
        ({"instruction": "a", "input": "c\nd", "output": "b"}, "a\nc\nd", "b"),
        ({"text": "a", "label": "b", "idx": 4}, "a", "b"),
        ({"text": "a", "label": 0}, "a", "0"),
        (user("a"), "a", "b"),
        (user("a", "b", ("system", "c")), "c\n\na", "b"),
    ],
)
def test_keys_as_people_have_them(tmp_path, as_written, prompt, answer):
    (tmp_path / "a.jsonl").write_text(lines(as_written, as_written))
    assert read_records(tmp_path / "a.jsonl").records == [TextRecord(prompt, answer)] * 2


@pytest.mark.parametrize(
    ("as_written", "match"),
    [
        ({"question": "a", "reply": "b"}, r"lacks 'prompt'; it has 'question', 'reply'\. Accep"),
        ({"instruction": "a"}, r"lacks 'prompt'.*instruction and output; text and label; messages"),
        (
            {"prompt": "a", "completion": "b", "text": "c", "label": "d"},
            "as well as text and label",
        ),
        ({"text": "a", "label": True}, "'label' of record 1 .* should be a text, but is a bool"),
        ({"text": "a", "label": 0.5}, "'label' of record 1 .* should be a text, but is a float"),
        ({"instruction": "a", "input": [1], "output": "b"}, "'input' of record 1 .* a list"),
        ({"prompt": "a", "completion": ""}, "'completion' of record 1 .* is empty"),
        (
            user("a", "b", ("user", "c"), ("assistant", "d")),
            "roles are .*one record of each answer",
        ),
        ({"messages": "a"}, "'messages' of record 1 .* roles are 'a'"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"roles are \['user'\]"),
        (user("a", [{"type": "text"}]), "'content' of record 1 .* should be a text, but is a list"),
    ],
)
def test_records_that_cannot_be_told_are_refused_by_number(tmp_path, as_written, match):
    (tmp_path / "a.jsonl").write_text(lines(record("x"), as_written))
    with pytest.raises(ValueError, match=match):
        read_records(tmp_path / "a.jsonl")
