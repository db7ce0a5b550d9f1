"""Text tasks from a user's folder, and O-LoRA's text classifications."""

import json

import pytest

from treelora_avalanche.scenarios import LongSequence, OLoRAOrder, TextTasks
from treelora_avalanche.scenarios.o_lora import FAMILY_OF, LONG_SEQUENCE, O_LORA_ORDERS


def records(n, name="task"):
    return [{"prompt": f"{name} {i}?", "answer": str(i)} for i in range(n)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "train.json").write_text(json.dumps(records(4, "given")))
    lines = "\n".join(json.dumps(r) for r in records(3, "held out"))
    (tmp_path / "given" / "test.jsonl").write_text(lines + "\n")
    (tmp_path / "drawn.jsonl").write_text("\n".join(json.dumps(r) for r in records(10, "drawn")))
    (tmp_path / "notes.txt").write_text("no task")
    return tmp_path


def test_both_layouts_in_one_folder(folder, make_tokenizer):
    benchmark = TextTasks(folder, make_tokenizer())
    assert benchmark.task_names == ["drawn", "given"]
    drawn, given = benchmark.train_stream
    assert given.prompts == [r["prompt"] for r in records(4, "given")]
    assert benchmark.test_stream[1].prompts == [r["prompt"] for r in records(3, "held out")]
    test = benchmark.test_stream[0].prompts
    assert len(test) == 2
    assert sorted(drawn.prompts + test) == sorted(r["prompt"] for r in records(10, "drawn"))


def test_drawn_test_set_follows_the_seed_and_the_share(folder, make_tokenizer):
    def test_prompts(**options):
        return (
            TextTasks(folder, make_tokenizer(), tasks=["drawn"], **options).test_stream[0].prompts
        )

    assert test_prompts(seed=1) == test_prompts(seed=1)
    assert len({tuple(test_prompts(seed=seed)) for seed in range(6)}) > 1
    assert len(test_prompts(test_fraction=0.5)) == 5


def test_metrics_and_lengths_for_all_tasks_or_by_name(folder, make_tokenizer):
    benchmark = TextTasks(
        folder,
        make_tokenizer(),
        tasks=["given", "drawn"],
        metric={"given": "sari"},
        max_new_tokens={"given": 7},
    )
    given, drawn = benchmark.test_stream
    assert (given.metric, given.max_new_tokens, given.sources) == ("sari", 7, given.prompts)
    assert (drawn.metric, drawn.max_new_tokens, drawn.sources) == ("rouge_l", 128, None)
    assert TextTasks(folder, make_tokenizer(), order=[1, 0], metric="accuracy").task_names == [
        "given",
        "drawn",
    ]


def test_new_tokens_leave_room_for_the_prompt(folder, make_tokenizer):
    benchmark = TextTasks(folder, make_tokenizer(), max_length=64)
    assert [e.max_new_tokens for e in benchmark.test_stream] == [32, 32]


def test_bad_folders_are_refused(folder, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(FileNotFoundError, match="not a folder"):
        TextTasks(tmp_path / "missing", tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tasks"):
        TextTasks(tmp_path / "empty", tokenizer)
    with pytest.raises(ValueError, match="Did you mean 'given'"):
        TextTasks(folder, tokenizer, tasks=["givem"])
    with pytest.raises(ValueError, match=r"`metric` should be one of .* but is 'bleu'"):
        TextTasks(folder, tokenizer, metric="bleu")
    with pytest.raises(ValueError, match=r"`test_fraction` .* but is 1"):
        TextTasks(folder, tokenizer, test_fraction=1)
    (folder / "given" / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.json is missing"):
        TextTasks(folder, tokenizer)
    (folder / "given" / "test.json").write_text(json.dumps(records(1)))
    (folder / "drawn.jsonl").write_text(json.dumps({"prompt": "a"}))
    with pytest.raises(ValueError, match=r"record 0 of .*drawn\.jsonl lacks 'answer'"):
        TextTasks(folder, tokenizer)
    (folder / "drawn.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match="not valid JSONL"):
        TextTasks(folder, tokenizer)


def test_orders_are_o_loras():
    """Spelled as in its paper."""
    told = {
        1: "dbpedia amazon yahoo ag",
        2: "dbpedia amazon ag yahoo",
        3: "yahoo amazon ag dbpedia",
        4: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia ag multirc yahoo",
        5: "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia ag yelp amazon yahoo",
        6: "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia ag yahoo multirc boolqa wic",
    }
    for order, names in O_LORA_ORDERS.items():
        assert [n.lower().replace("agnews", "ag") for n in names] == told[order].split()
    assert set(O_LORA_ORDERS[4]) == set(FAMILY_OF)
    assert len(LONG_SEQUENCE) == len(set(LONG_SEQUENCE)) == 15


@pytest.mark.parametrize("argument", ["metric", "max_new_tokens"])
def test_values_of_unknown_tasks_are_refused(folder, make_tokenizer, argument):
    with pytest.raises(ValueError, match=f"a task in `{argument}` .* given, but is 'givn'"):
        TextTasks(folder, make_tokenizer(), **{argument: {"givn": 7}})


def test_prompt_is_instruction_options_text(o_lora, make_tokenizer):
    benchmark = OLoRAOrder(4, o_lora.parent, make_tokenizer(), skip_missing_tasks=True, limit=2)
    assert benchmark.task_names == [n for n in O_LORA_ORDERS[4] if n not in ("yelp", "yahoo")]
    experience = benchmark.test_stream[benchmark.task_names.index("MNLI")]
    raw = json.loads((o_lora / "NLI" / "MNLI" / "test.json").read_text())
    labelled = [r for r in raw if r["label"] != "-"][:2]
    assert experience.answers == [r["label"] for r in labelled]
    for prompt, record in zip(experience.prompts, labelled, strict=True):
        head, options, text = prompt.split("\n", 2)
        assert head.endswith("Choose one from the option.")
        assert options.strip() == "Option: neutral, entailment, contradiction"
        assert text == f"{record['sentence']}\nAnswer:"
    copa = benchmark.train_stream[benchmark.task_names.index("COPA")]
    raw = json.loads((o_lora / "COPA" / "COPA" / "train.json").read_text())
    assert copa.prompts[0] == f"{raw[0]['sentence']}\nAnswer:"


def test_samples_without_a_label_are_left_out(o_lora, make_tokenizer):
    from treelora_avalanche.scenarios.o_lora import classification_tasks

    (task,) = classification_tasks(o_lora, ["MNLI"])
    assert len(task.test.records) == 7600 - 131  # the README of the data counts them


def test_missing_tasks_are_named_and_skipped_only_if_asked(o_lora, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"lacks yahoo .*skip_missing_tasks=True"):
        OLoRAOrder(1, o_lora, tokenizer)
    with pytest.raises(FileNotFoundError, match="lacks yahoo, yelp"):
        LongSequence(o_lora.parent, tokenizer)
    skipped = OLoRAOrder(3, o_lora, tokenizer, skip_missing_tasks=True, limit=1)
    assert skipped.task_names == ["amazon", "agnews", "dbpedia"]
    with pytest.raises(FileNotFoundError, match="none of O-LoRA's tasks"):
        OLoRAOrder(1, tmp_path, tokenizer, skip_missing_tasks=True)
    with pytest.raises(ValueError, match=r"`order` .* but is 7"):
        OLoRAOrder(7, o_lora, tokenizer)


def test_label_that_is_not_listed_is_refused(tmp_path, make_tokenizer):
    for name in O_LORA_ORDERS[1]:
        folder = tmp_path / FAMILY_OF[name] / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text('["yes", "no"]')
        for part in ("train", "test"):
            (folder / f"{part}.json").write_text('[{"label": "yes", "sentence": "s"}]')
    assert OLoRAOrder(1, tmp_path, make_tokenizer()).train_stream[0].answers == ["yes"]
    (folder / "test.json").write_text(
        '[{"label": "yes", "sentence": "s"}, {"label": "yess", "sentence": "s"}]'
    )
    with pytest.raises(
        ValueError, match=r"record 1 of .*test\.json should .* but is 'yess'\. .* 'yes'"
    ):
        OLoRAOrder(1, tmp_path, make_tokenizer())
    (folder / "labels.json").write_text('{"yes": 1}')
    with pytest.raises(ValueError, match="list of labels"):
        OLoRAOrder(1, tmp_path, make_tokenizer())


def test_long_sequence_is_trace_then_seven_of_o_lora(o_lora, make_tokenizer):
    benchmark = LongSequence(o_lora.parent, make_tokenizer(), skip_missing_tasks=True, limit=1)
    assert benchmark.task_names == [n for n in LONG_SEQUENCE if n not in ("yelp", "yahoo")]
    assert [e.metric for e in benchmark.test_stream][8:] == ["accuracy"] * 5
