"""TRACE: the samples of the benchmark against the release's files."""

import json
import logging

import pytest
import torch

from treelora_avalanche.models.tokenization import encode_sample
from treelora_avalanche.scenarios import (
    FULL_EPOCHS,
    LORA_EPOCHS,
    TRACE,
    TREELORA_EPOCHS,
    MathLLM,
)

ORDER = [
    "C-STANCE", "FOMC", "MeetingBank", "Py150",
    "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten",
]  # fmt: skip
METRICS = [
    "accuracy", "accuracy", "rouge_l", "edit_similarity",
    "accuracy", "accuracy", "accuracy", "sari",
]  # fmt: skip


@pytest.fixture(scope="module")
def release(data_root):
    folder = data_root / "TRACE-Benchmark"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    return folder


@pytest.fixture
def tiny(tmp_path):
    """Makes a TRACE of two records per file, or of those given."""

    def make(names=ORDER, variant="500", **replaced):
        for name in names:
            folder = tmp_path / "TRACE-Benchmark" / f"LLM-CL-Benchmark_{variant}" / name
            folder.mkdir(parents=True)
            for part in ("train", "test"):
                records = [{"prompt": f"{name} {part} {n}?", "answer": f"{n}{n}"} for n in range(2)]
                content = replaced.get(part, records)
                text = content if isinstance(content, str) else json.dumps(content)
                (folder / f"{part}.json").write_text(text)
        return tmp_path

    return make


def test_release_comes_in_the_papers_order_with_its_texts(release, make_tokenizer):
    tokenizer = make_tokenizer()
    benchmark = TRACE(release.parent, tokenizer, limit=3, max_length=256)
    assert benchmark.task_names == ORDER
    assert [e.task_name for e in benchmark.train_stream] == ORDER
    assert [e.metric for e in benchmark.test_stream] == METRICS
    for stream, part in ((benchmark.train_stream, "train"), (benchmark.test_stream, "test")):
        for place, (experience, name) in enumerate(zip(stream, ORDER, strict=True)):
            file = release / "LLM-CL-Benchmark_500" / name / f"{part}.json"
            records = json.loads(file.read_text(encoding="utf-8"))[:3]
            assert experience.prompts == [r["prompt"] for r in records]
            assert experience.answers == [r["answer"] for r in records]
            assert experience.sources == (experience.prompts if name == "20Minuten" else None)
            assert experience.current_experience == place
            assert experience.task_label == 0
            assert len(experience.dataset) == 3
            # The limit never cuts a complete answer.
            longest = max(len(a) for a in experience.answers)
            if experience.metric == "accuracy" and name != "ScienceQA":
                assert experience.max_new_tokens > longest


def test_token_sequences_hold_the_sample_and_the_answer_shifted_by_one(release, make_tokenizer):
    tokenizer = make_tokenizer()
    experience = TRACE(
        release, tokenizer, tasks=["NumGLUE-cm"], limit=5, max_length=200
    ).train_stream[0]
    for n, (x, y, task) in enumerate(experience.dataset):
        tokens, n_prompt, *_ = encode_sample(
            tokenizer, experience.prompts[n], experience.answers[n], 200
        )
        assert task == 0
        assert x.shape == y.shape == (200,)
        assert x.dtype == y.dtype == torch.int64
        assert x[x >= 0].tolist() == tokens[:-1]
        assert y[y >= 0].tolist() == tokens[n_prompt:]
        last_of_prompt = n_prompt - 1
        assert y[:last_of_prompt].eq(-100).all()
        assert y[last_of_prompt] == tokens[n_prompt]
        assert experience.dataset.lengths[n] == len(tokens) - 1
        assert x[-1] == -1  # one more column marks sequences that are not cropped


def test_targets_are_the_labels_that_occur_also_of_parts_and_sums(release, make_tokenizer):
    benchmark = TRACE(release, make_tokenizer(), tasks=["FOMC", "NumGLUE-ds"], limit=6)
    one, two = (e.dataset for e in benchmark.train_stream)

    def labels(dataset):
        return {int(t) for _, y, _ in dataset for t in y[y >= 0]}

    assert one.targets.uniques == labels(one) != labels(two)
    assert one.subset([0, 2]).targets.uniques == labels(one.subset([0, 2]))
    both = one.concat(two)
    assert both.targets.uniques == labels(one) | labels(two)
    assert list(both.lengths) == [*one.lengths, *two.lengths]


def test_tasks_and_order(tiny, make_tokenizer):
    root, tokenizer = tiny(), make_tokenizer()
    chosen = TRACE(root, tokenizer, tasks=["FOMC", "C-STANCE", "Py150"], order=[2, 0, 1])
    assert chosen.task_names == ["Py150", "FOMC", "C-STANCE"]
    assert MathLLM(root, tokenizer).task_names == ["ScienceQA", "NumGLUE-cm", "NumGLUE-ds"]
    assert MathLLM(root / "TRACE-Benchmark", tokenizer, order=[2, 1, 0]).task_names == [
        "NumGLUE-ds",
        "NumGLUE-cm",
        "ScienceQA",
    ]


def test_epochs_are_the_papers():
    assert [TREELORA_EPOCHS[name] for name in ORDER] == [2, 1, 3, 2, 1, 2, 2, 3]
    assert [LORA_EPOCHS[name] for name in ORDER] == [5, 3, 7, 5, 3, 5, 5, 7]
    assert [FULL_EPOCHS[name] for name in ORDER] == [1, 1, 5, 5, 1, 5, 5, 5]


def test_answers_that_do_not_fit_are_reported_and_the_rest_is_kept(tiny, make_tokenizer, caplog):
    records = [
        {"prompt": "p" * 50, "answer": "short"},
        {"prompt": "p" * 50, "answer": "a" * 70},
        {"prompt": "p" * 50, "answer": "b" * 90},
    ]
    root = tiny(["FOMC"], train=records)
    with caplog.at_level(logging.INFO):
        benchmark = TRACE(root, make_tokenizer(), tasks=["FOMC"], max_length=80)
    shortened, message = (r.getMessage() for r in caplog.records if r.name.startswith("treelora"))
    assert "FOMC/train.json" in message.replace("\\", "/")
    assert "prompts of 2 of 3 records lose their beginnings" in shortened
    assert "2 of 3 records" in message
    assert "first is record 1" in message
    assert "record 2, loses 43 tokens" in message  # 91 with the end, 48 next to 32 of the prompt
    dataset = benchmark.train_stream[0].dataset
    assert [int((y >= 0).sum()) for _, y, _ in dataset] == [6, 48, 48]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"train\.json is not valid JSON"),
        ("[]", "but holds none"),
        ('{"prompt": "a", "answer": "b"}', "should hold a list of records"),
        ("[1]", r"record 0 of .*train\.json should be an object .* but is a int"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a"}], r"record 1 of .*lacks 'answer'"),
        ([{"prompt": "a", "answer": 3}], r"'answer' of record 0 of .* but is a int"),
        ([{"prompt": "a", "answer": " \n"}], r"'answer' of record 0 of .* is empty"),
        ([{"prompt": "", "answer": "b"}], r"'prompt' of record 0 of .* is empty"),
    ],
)
def test_broken_files_are_refused_with_file_and_record(tiny, make_tokenizer, content, message):
    with pytest.raises(ValueError, match=message):
        TRACE(tiny(["FOMC"], train=content), make_tokenizer(), tasks=["FOMC"])


def test_missing_tasks_and_unknown_names_are_refused(tiny, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(FileNotFoundError, match="holds no TRACE of variant 500"):
        TRACE(tmp_path, tokenizer)
    root = tiny(["FOMC", "Py150"])
    with pytest.raises(FileNotFoundError, match=r"lacks C-STANCE/train\.json.*\(FOMC, Py150\)"):
        TRACE(root, tokenizer)
    with pytest.raises(
        ValueError, match=r"`variant` should be one of 500, 1000, 5000, but is '50'"
    ):
        TRACE(root, tokenizer, "50")
    with pytest.raises(ValueError, match="Did you mean 'FOMC'"):
        TRACE(root, tokenizer, tasks=["FOMCA"])
    with pytest.raises(ValueError, match="list of different task names"):
        TRACE(root, tokenizer, tasks=["FOMC", "FOMC"])
    with pytest.raises(ValueError, match="every number from 0 to 1 once"):
        TRACE(root, tokenizer, tasks=["FOMC", "Py150"], order=[0, 0])
    with pytest.raises(ValueError, match="`limit` should be at least 1, but is 0"):
        TRACE(root, tokenizer, tasks=["FOMC"], limit=0)
    with pytest.raises(ValueError, match="should have an end token"):
        TRACE(root, make_tokenizer(eos_token=None), tasks=["FOMC"])
    with pytest.raises(ValueError, match="or a tokenizer"):
        TRACE(root, None, tasks=["FOMC"])


def test_variant_1000_of_this_copy_lacks_its_tests(release, make_tokenizer):
    with pytest.raises(FileNotFoundError, match=r"variant 1000.*lacks.*ScienceQA/test\.json"):
        TRACE(release, make_tokenizer(), "1000", tasks=["ScienceQA"])
