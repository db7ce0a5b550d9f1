"""``treelora evaluate``: finished runs by plain text and by lm-evaluation-harness."""

import json
from functools import partial

import pytest
import torch
import yaml

from treelora_avalanche.cli import main
from treelora_avalanche.evaluate import command
from treelora_avalanche.evaluate.scores import Comparison

pytestmark = pytest.mark.filterwarnings("ignore")

STORIES = [
    {"text": "Once upon a time, there was a little", "choices": [" girl", " xqz"], "label": 0},
    {"text": "The sun was shining and the sky was", "choices": [" table", " blue"], "label": 1},
]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
GENERATION = """
task: tiny_generation
output_type: generate_until
doc_to_target: " girl."
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


def error_of(capsys, *arguments):
    """Returns the one line that a refused command prints."""
    assert main(["evaluate", *map(str, arguments)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def write_run(folder, method="SeqLoRA", scenario="tiny_texts", finished=True):
    """Writes the files of a run that are read before its weights."""
    folder.mkdir()
    config = {"method": method, "seed": 0, "scenario": scenario, "model": "m"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if finished:
        (folder / "results.json").write_text(json.dumps({"config": config}))
    return folder


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"finished": False}, "should be a finished run, but"),
        ({"scenario": "digits"}, "is of images (`--scenario digits`)"),
        ({"method": "InContext"}, "but InContext does not. Its final model is the base model"),
        ({"method": "Naive"}, "should hold its final model in model/, but"),
    ],
)
def test_wrong_runs_are_refused_in_one_line(run, message, tmp_path, capsys):
    assert message in error_of(capsys, write_run(tmp_path / "run", **run))


def test_wrong_arguments_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    assert "holds no config.yaml" in error_of(capsys, tmp_path / "nothing")
    run = write_run(tmp_path / "run")
    (run / "model").mkdir()
    assert "nowhere.txt is not a file" in error_of(capsys, run, "--plain_text=nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "empty.txt is empty" in error_of(capsys, run, f"--plain_text={tmp_path}/empty.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "should be in UTF-8" in error_of(capsys, run, f"--plain_text={tmp_path}/latin.txt")
    assert "nowhere is not a folder" in error_of(capsys, run, "--include_path=nowhere")
    both = error_of(capsys, run, "--plain_text=a.txt", "--harness", "piqa")
    assert "are both given" in both
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "lm_eval, which is not installed" in error_of(capsys, run, "--harness", "piqa")


def test_general_ability_delta_is_the_mean_over_tasks():
    def results(choice, rouge, words):
        return {
            "results": {
                "choice": {"alias": "c", "acc,none": choice, "acc_stderr,none": 0.1},
                "summary": {"rouge,none": rouge, "acc,strict": 0.5},
                "text": {"word_perplexity,none": words},
                "part": {"acc,none": 0.0},
            },
            "groups": {"whole": {"acc,none": 2 * choice}},
            "group_subtasks": {"whole": ["inner"], "inner": ["part"]},
            "higher_is_better": {
                "choice": {"acc": True},
                "summary": {"rouge": True, "acc": True},
                "text": {"word_perplexity": False},
            },
        }

    comparison = Comparison.of(results(0.5, 0.25, 10.0), results(0.25, 0.375, 20.0))
    assert [(s.task, s.metric, s.delta, s.main) for s in comparison.scores] == [
        ("choice", "acc", -0.25, True),
        ("summary", "rouge", 0.125, True),
        ("summary", "acc (strict)", 0.0, False),
        ("text", "word_perplexity", 10.0, True),
        ("part", "acc", 0.0, False),
        ("whole", "acc", -0.5, True),
    ]
    # The perplexity is better if lower: it is shown, and not in the mean.
    assert comparison.general_ability_delta == (-0.25 + 0.125 - 0.5) / 3
    assert "mean over 3 tasks of after - before: -0.2083" in comparison.in_words()


# ------------------------------------------------------------------- with the harness and weights


@pytest.fixture(scope="module")
def stories(data_root):
    """Returns the folder of a language model of 260,000 parameters."""
    folder = data_root / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    return folder


@pytest.fixture(scope="module")
def routed(stories, tmp_path_factory):
    """Returns the folder of a finished TreeLoRA run on two tasks."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    folder = tmp_path_factory.mktemp("run") / "TreeLoRA"
    arguments = ["train", "--scenario=tiny_texts", f"--model={stories}", f"--output={folder}"]
    arguments += ["--tasks=[plurals,films]", "--lr=0.05", "--max_length=128", "--device=cpu"]
    options = "{train_per_task: 8, test_per_task: 2}"
    assert main([*arguments, f"--scenario_options={options}"]) == 0
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Returns a folder of two harness tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, STORIES)))
    for name, text in (("choice", CHOICE), ("generation", GENERATION)):
        shared = TASK.format(data=folder / "data.jsonl")
        (folder / f"{name}.yaml").write_text(text + shared)
    return folder


def test_evaluate_by_the_harness(routed, tasks, capsys, monkeypatch):
    capsys.readouterr()
    assert main(["evaluate", str(routed), "--include_path", str(tasks)]) == 0
    printed = capsys.readouterr().out
    assert "tiny_choice: acc ↑" in printed
    written = json.loads((routed / "harness.json").read_text())
    scores = {score["task"]: score for score in written["scores"]}
    assert scores["tiny_choice"]["before"] == 1.0  # a model of children's stories
    assert scores["tiny_choice"]["after"] == 1.0
    assert set(scores) == {"tiny_choice", "tiny_generation"}
    # Stories are foreign to both tasks, and so are given to the base model.
    assert all(score["delta"] == 0 for score in scores.values())
    assert written["general_ability_delta"] == 0
    assert not list(routed.glob("*.tmp"))

    from treelora_avalanche.evaluate import harness

    # The index of the harness's own tasks takes seconds.
    own_tasks = partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, **_: own_tasks(include_path=include_path)
    )
    unknown = error_of(capsys, routed, "--include_path", tasks, "--harness", "tiny_choce")
    assert "'tiny_choce' is none. Did you mean 'tiny_choice'?" in unknown


def test_requests_are_routed_as_the_harness_itself_evaluates_each_model(routed):
    """Checks against the harness's own model on the base model, and on that of each task."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    from treelora_avalanche.evaluate.finished import FinishedRun, Predictor
    from treelora_avalanche.evaluate.harness import HarnessModel

    def requests(kind, *arguments):
        return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]

    def answers(model, text):
        rest = (" and the", " girl")
        pairs = requests("loglikelihood", *((text, continued) for continued in rest))
        until = requests("generate_until", (text, {"until": ["."], "max_gen_toks": 6}))
        rolling = requests("loglikelihood_rolling", (text,))
        return (
            torch.tensor(model.loglikelihood(pairs, disable_tqdm=True)),
            model.generate_until(until, disable_tqdm=True),
            torch.tensor(model.loglikelihood_rolling(rolling, disable_tqdm=True)),
        )

    run = FinishedRun.read(routed)
    base = run.base_model()
    strategy = run.strategy(base)
    model = HarnessModel(Predictor.of_strategy(strategy), batch_size=4)
    prompts = [json.loads(line) for line in (routed / "generated.jsonl").open()]
    cases = {STORIES[0]["text"]: None}
    cases |= {line["prompt"]: line["task"] for line in prompts if line["after_task"] == 1}
    references = {}
    for task, name in ((None, None), ("plurals", "task_000"), ("films", "task_001")):
        network = run.base_model().network
        if name is not None:
            network = PeftModel.from_pretrained(network, str(routed / "adapters" / name))
            network = network.merge_and_unload()
        references[task] = HFLM(network, tokenizer=base.tokenizer, max_length=128, batch_size=4)
    routes = strategy.route(list(cases))
    assert [route.task_name for route in routes] == list(cases.values())
    for text, task in list(cases.items())[:4]:
        own, expected = answers(model, text), answers(references[task], text)
        torch.testing.assert_close(own[0], expected[0], atol=1e-3, rtol=1e-4)
        assert own[1] == expected[1]
        # A text without a context is its own prompt, after the harness's prefix token.
        possible = [answers(reference, text)[2] for reference in references.values()]
        assert any(torch.allclose(own[2], of_one, atol=1e-3, rtol=1e-4) for of_one in possible)
        if task is None:
            torch.testing.assert_close(own[2], expected[2], atol=1e-3, rtol=1e-4)
