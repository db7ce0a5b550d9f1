"""Runs and comparisons on streams of texts: folders, tables, resumption and errors."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from rapidfuzz import fuzz
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from treelora_avalanche.cli import main
from treelora_avalanche.evaluate.finished import FinishedRun
from treelora_avalanche.metrics import find_text_generator
from treelora_avalanche.models import LanguageModel
from treelora_avalanche.registry.methods import METHODS, check_models
from treelora_avalanche.registry.settings import RunSettings
from treelora_avalanche.registry.streams import build_stream
from treelora_avalanche.reports.figures import FIGURES, write_figures
from treelora_avalanche.reports.table import rich_table, summarise, write_table
from treelora_avalanche.runs import prepare, resolve_config, run
from treelora_avalanche.runs.plain_text import in_words
from treelora_avalanche.runs.schedule import epochs_per_task
from treelora_avalanche.runs.setup import language_model
from treelora_avalanche.scenarios.trace import TRACE_TASKS
from treelora_avalanche.tree import AdapterTree

pytestmark = pytest.mark.filterwarnings("ignore")

LANGUAGE = [name for name, entry in METHODS.items() if "language" in entry.models]
FOREIGN_TO = ("TreeLoRA", "TreeLoRA-routed", "InContext")
"""Methods that predict plain text by the base model."""
CONTINUES = ["TreeLoRA", "SeqLoRA", "EWCLoRA", "GEMLoRA", "Naive"]
TASKS = {"echo": "say {}", "shout": "shout, loudly: {}"}
WORDS = ("a", "bc", "def", "g", "hi", "j", "kl")
PASSAGES = ("The dog barked at a cat.", "It rained for so long that the river rose.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_tokenizer):
    """Returns a folder with a small random Llama on characters, and two tasks."""
    root = tmp_path_factory.mktemp("language")
    config = LlamaConfig(
        vocab_size=98,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,  # untrained, it repeats the last token: a score above 0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    for name, prompt in TASKS.items():
        (root / "tasks" / name).mkdir(parents=True)
        records = [{"prompt": prompt.format(word), "answer": word} for word in WORDS]
        for part, n in (("train", 7), ("test", 3)):
            (root / "tasks" / name / f"{part}.json").write_text(json.dumps(records[:n]))
    (root / "plain.txt").write_text("\n\n".join(PASSAGES))
    return root


@pytest.fixture(scope="module")
def settings(folder):
    """Returns a factory of settings for the two tasks."""

    def make(**changes):
        given = {
            "scenario": "text_tasks",
            "data": str(folder / "tasks"),
            "model": str(folder / "model"),
            "plain_text": str(folder / "plain.txt"),
            "metric": "edit_similarity",
            "max_new_tokens": 4,
            "max_length": 32,
            "scenario_options": {"allow_overlap": True},
            "lr": 0.01,
            "epochs": 2,
            "device": "cpu",
        }
        return RunSettings(**{**given, **changes})

    return make


@pytest.fixture(scope="module")
def ingredients(settings):
    return prepare(0, settings())


def plain_perplexity(network, tokenizer):
    """Returns the perplexity on the passages, by transformers' own loss."""
    total = n = 0
    for passage in PASSAGES:
        tokens = torch.tensor([tokenizer(passage)["input_ids"]])
        # 32 tokens are read at a time; every token but the first is predicted once.
        for window in (tokens[:, :33], tokens[:, 32:]):
            if window.shape[1] > 1:
                with torch.no_grad():
                    loss = network(input_ids=window, labels=window).loss.item()
                total, n = total + loss * (window.shape[1] - 1), n + window.shape[1] - 1
    return math.exp(total / n), n


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------ one run


# DualPrompt has prompts in five layers; the model has two.
@pytest.mark.parametrize("method", [name for name in LANGUAGE if name != "DualPrompt"])
def test_run_folder(method, settings, ingredients, folder, tmp_path):
    results = run(method, 0, settings(), tmp_path, ingredients=ingredients)
    entry = METHODS[method]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config == results["config"] == resolve_config(method, 0, settings())

    # The scores match the stored texts.
    texts = json_lines(tmp_path / "generated.jsonl")
    matrix = results["accuracy_matrix"]["generated"]
    for after, row in enumerate(matrix):
        for place, task in enumerate(TASKS):
            own = [t for t in texts if (t["after_task"], t["task"]) == (after, task)]
            known = place <= after and not (entry.joint and after == 0)
            assert len(own) == (3 if known else 0)
            assert [t["prompt"] for t in own] == [
                TASKS[task].format(word) for word in WORDS[: len(own)]
            ]
            scores = [round(fuzz.ratio(t["generated"], t["answer"])) / 100 for t in own]
            assert row[place] == (pytest.approx(sum(scores) / 3) if known else None)
    assert matrix[-1][-1] > 0
    final = results["metrics"]["generated"]
    assert final["overall_performance"] == pytest.approx(sum(matrix[1]) / 2)
    drop = None if entry.joint else pytest.approx((matrix[0][0] - matrix[1][0]) / 2)
    assert final["backward_transfer"] == drop

    epochs = 1 if entry.frozen else 2
    assert results["epochs"] == [epochs, epochs]
    stream = results["stream"]
    assert (stream["task_names"], stream["train_samples"]) == (["echo", "shout"], [7, 7])
    # One token per character; the end token is predicted but not read.
    tokens = [sum(len(p.format(w)) + len(w) for w in WORDS) for p in TASKS.values()]
    assert stream["train_tokens"] == tokens
    timings = results["timings"]
    seconds = timings["train_seconds"]
    assert timings["tokens_per_second"] == pytest.approx(epochs * sum(tokens) / seconds)
    assert timings["samples_per_second"] == pytest.approx(epochs * 14 / seconds)
    # 2 batches per task and epoch; Cumulative trains on the first task again, in 4 batches of 14.
    steps = {"Cumulative": 2 * (2 + 4), "InContext": 0}.get(method, 8)
    assert timings["steps"] == steps
    lines = json_lines(tmp_path / "metrics.jsonl")
    assert all(line["loss"] > 0 for line in lines if line["event"] == "epoch")
    assert lines[-1]["task_name"] == "shout"

    network = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = ingredients.backbone.tokenizer
    measured = results["plain_text"]
    before, n_tokens = plain_perplexity(network, tokenizer)
    assert measured["perplexity_before"] == pytest.approx(before)
    assert measured["tokens"] == n_tokens
    change = measured["perplexity_after"] / measured["perplexity_before"] - 1
    assert measured["change"] == pytest.approx(change)
    assert (change == 0) == (method in FOREIGN_TO)

    if method in ("Naive", "EWC", "GEM"):  # it would be a copy of the whole model
        assert not (tmp_path / "model").exists()
    else:
        finished = FinishedRun.read(tmp_path)
        generator = find_text_generator(finished.strategy(finished.base_model()).model)
        for task in TASKS:
            own = [t for t in texts if (t["after_task"], t["task"]) == (1, task)]
            again = generator.generate([t["prompt"] for t in own], max_new_tokens=4, batch_size=16)
            assert again == [t["generated"] for t in own]

    names = sorted(path.name for path in tmp_path.glob("adapters/*"))
    assert names == ([] if not entry.uses_lora else ["task_001"] if entry.joint else names)
    assert results["parameters"]["trainable"] <= results["parameters"]["total"]
    if method in ("SeqLoRA", "TreeLoRA", "Replay"):  # other methods use earlier adapters
        restored = PeftModel.from_pretrained(network, str(tmp_path / "adapters" / "task_001"))
        if method != "TreeLoRA":
            after, _ = plain_perplexity(restored, tokenizer)
            assert measured["perplexity_after"] == pytest.approx(after)
        model = LanguageModel(restored, tokenizer, max_length=32)
        again = model.generate([t["prompt"] for t in texts[-3:]], max_new_tokens=4, batch_size=3)
        assert again == [t["generated"] for t in texts[-3:]]


def test_tree_is_noted_after_every_task(settings, ingredients, tmp_path):
    notes = []
    results = run("TreeLoRA", 0, settings(), tmp_path, ingredients=ingredients, note=notes.append)
    assert notes.pop() == in_words(results["plain_text"])
    assert [note.splitlines()[0] for note in notes] == [
        "trains LoRA of rank 8 (α 32) on 4 matrices; learning rate 0.01; batches of 4; "
        "epochs 2, 2; λ 0, a tree of depth 4; predictions routed",
        "the tree after echo",
        "the tree after shout",
    ]
    drawing = "\n".join(notes[2].splitlines()[1:])
    assert "0 (echo)" in drawing
    assert "1 (shout)" in drawing
    assert drawing in (tmp_path / "tree.txt").read_text()
    assert (tmp_path / "tree.txt").read_text().count("After") == 2


def test_drawing_without_names():
    tree = AdapterTree()
    tree.insert(torch.tensor([[0.5, 0.5]]))
    assert "task 0" in str(tree.draw().label)
    assert "task 0 (echo)" in str(tree.draw(["echo"]).label)


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("method", CONTINUES)
def test_resumed_run_equals_uninterrupted_run(method, settings, ingredients, tmp_path):
    """Checks that a run interrupted in its second task resumes after the first."""

    def cut(now):
        if (now.task, now.step) == (2, 6):
            raise PowerCutError

    whole = run(method, 0, settings(), tmp_path / "whole", ingredients=ingredients)
    notes = []
    with pytest.raises(PowerCutError):
        run(method, 0, settings(), tmp_path / "cut", ingredients=ingredients, progress=cut)
    continued = run(
        method, 0, settings(), tmp_path / "cut", ingredients=ingredients, note=notes.append
    )
    assert "continues after task 1 of 2" in notes
    for key in ("accuracy_matrix", "metrics", "trees", "epochs", "stream", "plain_text"):
        assert continued[key] == whole[key]
    assert continued["timings"]["steps"] == whole["timings"]["steps"]
    for name in ("generated.jsonl", "tree.txt"):
        texts = [
            (tmp_path / part / name).read_text() if (tmp_path / part / name).exists() else None
            for part in ("whole", "cut")
        ]
        assert texts[0] == texts[1]


def test_epochs_of_each_task(settings, ingredients, tmp_path):
    results = run(
        "SeqLoRA",
        0,
        settings(epochs=None, epochs_per_task=[1, 3]),
        tmp_path,
        ingredients=ingredients,
    )
    assert results["epochs"] == [1, 3]
    assert results["timings"]["steps"] == 2 * (1 + 3)
    epochs = [line for line in json_lines(tmp_path / "metrics.jsonl") if line["event"] == "epoch"]
    assert [(line["experience"], line["epoch"]) for line in epochs] == [
        (0, 1),
        (1, 1),
        (1, 2),
        (1, 3),
    ]
    with pytest.raises(ValueError, match="2 numbers, one for each of echo, shout, but has 3"):
        run(
            "SeqLoRA",
            0,
            settings(epochs=None, epochs_per_task=[1, 3, 1]),
            tmp_path / "wrong",
            ingredients=ingredients,
        )


def test_epochs_of_the_paper():
    """Checks Appendix A.3: TreeLoRA, other methods with LoRA, full fine-tuning."""
    treelora, lora, full = (
        (2, 1, 3, 2, 1, 2, 2, 3),
        (5, 3, 7, 5, 3, 5, 5, 7),
        (1, 1, 5, 5, 1, 5, 5, 5),
    )
    for method, own in (("TreeLoRA", treelora), ("OLoRA", lora), ("Naive", full)):
        assert epochs_per_task(METHODS[method], "paper", list(TRACE_TASKS)) == list(own)
        assert epochs_per_task(METHODS[method], "equal", list(TRACE_TASKS)) == list(treelora)
    two = ["Py150", "C-STANCE"]
    assert epochs_per_task(METHODS["SeqLoRA"], "paper", two) == [5, 5]


def test_gradient_accumulation(settings, ingredients, tmp_path):
    shared = settings(batch_size=2, accumulation_steps=3)
    results = run("SeqLoRA", 0, shared, tmp_path, ingredients=ingredients)
    # 7 samples: 4 batches, 2 steps; two tasks, two epochs.
    assert results["timings"]["steps"] == 2 * 2 * 2
    with pytest.raises(
        ValueError,
        match="should be 1, since Avalanche's Replay updates after every batch, but is 3",
    ):
        run("Replay", 0, shared, tmp_path / "other", ingredients=ingredients)


# ----------------------------------------------------------------------------------------- settings


def test_resolved_config(settings):
    config = resolve_config("SeqLoRA", 0, settings())
    assert (config["rank"], config["alpha"], config["layers"]) == (8, 32, "all")
    assert (config["batch_size"], config["eval_batch_size"], config["epochs"]) == (4, 16, 2)
    assert not {"epochs_per_task", "head", "variant", "order", "n_experiences"} & set(config)
    trace = RunSettings(scenario="trace", data="x", model="y")
    config = resolve_config("TreeLoRA", 0, trace)
    assert (config["epochs_per_task"], config["lr"], config["tree_lambda"]) == ("equal", 1e-4, None)
    assert resolve_config("Naive", 0, trace)["lr"] == 1e-5
    assert "epochs" not in config


def test_config_of_image_runs_is_stable():
    """Checks the configuration, by which finished runs are recognised."""
    images = RunSettings(scenario="image_folder", data="d", head="task_adaptive", epochs=3)
    assert resolve_config("TreeLoRA", 1, images) == {
        "method": "TreeLoRA",
        "seed": 1,
        "scenario": "image_folder",
        "data": str(Path("d").resolve()),
        "classes": None,
        "exclude_classes": None,
        "n_experiences": 10,
        "model": "vit_base_patch16_224",
        "checkpoint": None,
        "img_size": None,
        "epochs": 3,
        "batch_size": 32,
        "eval_batch_size": 256,
        "lr": 0.005,
        "rank": 10,
        "alpha": 10.0,
        "layers": "first:5",
        "target_modules": None,
        "tree_lambda": None,  # the strategy's default, by inference mode
        "selection": "lcb",
        "head": "task_adaptive",
        "depth": None,
        "max_adapters": None,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    in_bf16 = resolve_config("TreeLoRA", 1, replace(images, precision="bf16"))
    assert in_bf16["precision"] == "bf16"
    assert "precision" not in resolve_config("FrozenNCM", 1, replace(images, precision="bf16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "`--model` should be a language model for `--scenario text_tasks`"),
        (
            {"data": None},
            "`--data` should be a folder for `--scenario text_tasks`, but is not given",
        ),
        (
            {"head": "task_adaptive"},
            "`--head` is 'task_adaptive', but `--scenario text_tasks` does not use it",
        ),
        ({"n_experiences": 3}, "`--n_experiences` is 3, but"),
        ({"img_size": 112}, "`--img_size` is 112, but"),
        ({"variant": "1000"}, "`--variant` is '1000', but"),
        (
            {"scenario": "trace", "variant": "50", "metric": "rouge_l"},
            "`--variant` should be one of .* but is '50'",
        ),
        ({"metric": "bleu"}, "`--metric` should be one of .* but is 'bleu'"),
        (
            {"dtype": "float31"},
            "`--dtype` should be one of .* but is 'float31'.*Did you mean 'float32'",
        ),
        ({"epochs_per_task": [1, 1]}, "`--epochs` and `--epochs_per_task` are both given"),
        ({"epochs": None, "epochs_per_task": []}, "at least 1 for each task"),
        ({"epochs": None, "epochs_per_task": [1, 0]}, "at least 1 for each task"),
        ({"epochs": None, "epochs_per_task": "papr"}, "Did you mean 'paper'"),
        ({"epochs": None, "epochs_per_task": "paper"}, "the paper gives no epochs for"),
        ({"limit": 0}, "`--limit` should be at least 1"),
        ({"eval_limit": 0}, "`--eval_limit` should be at least 1, or all, but is 0"),
        ({"eval_limit": "al"}, "`--eval_limit` should be at least 1, or all, but is al"),
        ({"accumulation_steps": 0}, "`--accumulation_steps` should be at least 1"),
        ({"order": 7}, "`--order` should be from 1 to 6, but is 7"),
    ],
)
def test_wrong_settings_are_named_as_flags(changes, message, settings):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    "option", ["eval_limit", "plain_text", "tasks", "max_length", "accumulation_steps", "dtype"]
)
def test_settings_of_texts_are_refused_for_images(option):
    value = {"tasks": ["a"], "dtype": "bfloat16"}.get(option, 3)
    with pytest.raises(ValueError, match=f"`--{option}` is .* does not use it"):
        RunSettings(scenario="image_folder", data="d", **{option: value})


def test_limit_is_refused_for_digits():
    with pytest.raises(ValueError, match=r"`--limit` is 3, but .* does not use it"):
        RunSettings(scenario="digits", limit=3)


def test_methods_are_defined_for_kinds_of_models(settings):
    with pytest.raises(ValueError, match="is for language models, but FrozenNCM is not") as error:
        check_models(["SeqLoRA", "FrozenNCM"], settings())
    possible = str(error.value).partition("Possible: ")[2].rstrip(".").split(", ")
    assert possible == LANGUAGE
    assert not {"StreamingLDA", "FrozenGaussian", "HiDePrompt"} & set(possible)
    check_models([m for m, entry in METHODS.items() if "vision" in entry.models], RunSettings())
    with pytest.raises(ValueError, match="is for vision models, but InContext is not defined"):
        check_models(["InContext"], RunSettings())


# --------------------------------------------------------------------------------- the command line


def arguments_of(settings, *, but=()):
    given = ("scenario", "data", "model", "metric", "max_new_tokens", "max_length", "epochs", "lr")
    given += ("scenario_options",)
    return [f"--{name}={getattr(settings, name)}" for name in given if name not in but]


def test_compare(settings, tmp_path, capsys):
    arguments = ["compare", "--methods", "TreeLoRA", "Replay", "--seeds", "0"]
    arguments += [*arguments_of(settings()), "--device=cpu", f"--output={tmp_path}"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "TreeLoRA, seed 0: the tree after shout" in printed.err
    assert "TreeLoRA, seed 0: done, Op" in printed.err
    for heading in ("Op ↑", "Bwt ↓", "tokens", "samples", "Epochs"):
        assert heading in printed.out
    assert "in task" not in printed.out
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(FIGURES)
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("finished before") == 2


def refuse_weights(monkeypatch):
    """Fails the test where weights are loaded."""

    def loaded(*args, **kwargs):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--methods", "FrozenNCM"], "FrozenNCM is not defined for them. Possible: TreeLoRA,"),
        (["--methods", "HiDePrompt"], "HiDePrompt is not defined for them"),
        (["--methods", "SeqLoRA", "--depth", "99"], None),  # SeqLoRA does not read it
        (
            ["--methods", "SeqLoRA", "TreeLoRA", "--depth", "99"],
            "`depth` should be at most the number of adapted matrices, 4, but is 99",
        ),
        (["--methods", "SeqLoRA", "--target_modules", "[q_prj]"], "q_prj"),
        (["--methods", "SeqLoRA", "--tasks", "[eco]"], "Did you mean 'echo'?"),
        (["--methods", "SeqLoRA", "--layers", "last:40"], "the model's 2 blocks, but is 'last:40'"),
        (
            ["--methods", "SAPT", "--method_options", "{SAPT: {bottleneck: 0}}"],
            "`bottleneck` should be at least 1, but is 0",
        ),
        (
            ["--methods", "SeqLoRA", "--data", "nowhere"],
            "`--data` should be a folder, but nowhere is not a folder",
        ),
        (
            ["--methods", "SeqLoRA", "--model", "./nowhere"],
            "a folder, but './nowhere' is none",
        ),
        (["--methods", "SeqLoRA", "--epochs_per_task", "[1]"], "both given"),
    ],
)
def test_bad_input_is_one_line(changes, message, settings, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if message is not None:
        refuse_weights(monkeypatch)
    own = [option[2:] for option in changes if option.startswith("--")]
    arguments = ["compare", *arguments_of(settings(), but=own), "--seeds", "0", *changes]
    code = main([*arguments, "--device=cpu", f"--output={tmp_path / 'out'}"])
    printed = capsys.readouterr().err
    if message is None:
        assert code == 0
        return
    assert code == 2
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.rglob("results.json"))


def test_compare_on_trace(data_root, tmp_path, capsys):
    arguments = [
        "compare",
        "--scenario=trace",
        f"--data={data_root / 'TRACE-Benchmark'}",
        f"--model={data_root / 'stories260K'}",
        "--tasks=[NumGLUE-cm,FOMC]",
        "--limit=4",
        "--max_length=64",
        "--methods=TreeLoRA",
        "--seeds=0",
        f"--output={tmp_path}",
        "--device=cpu",
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("*/results.json")
    results = json.loads(path.read_text())
    assert results["epochs"] == [2, 1]  # the paper's for these tasks
    assert results["stream"]["task_names"] == ["NumGLUE-cm", "FOMC"]
    assert results["stream"]["task_metrics"] == ["accuracy", "accuracy"]
    assert len(json_lines(path.parent / "generated.jsonl")) == 4 + 8


def test_a_run_is_refused_before_weights_are_loaded(settings, tmp_path, monkeypatch):
    refuse_weights(monkeypatch)
    with pytest.raises(ValueError, match="FrozenNCM is not defined for them"):
        run("FrozenNCM", 0, settings(), tmp_path / "run")
    three = settings(epochs=None, epochs_per_task=[1, 3, 1])
    with pytest.raises(ValueError, match="2 numbers, one for each of echo, shout, but has 3"):
        run("SeqLoRA", 0, three, tmp_path / "run")
    with pytest.raises(ValueError, match="`--accumulation_steps` should be 1, since"):
        run("Replay", 0, settings(accumulation_steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match="`--shard_backbone` should be used with several"):
        run("SeqLoRA", 0, settings(), tmp_path / "run", shard_backbone=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run("SeqLoRA", 0, settings(), tmp_path / "taken")
    assert not (tmp_path / "run").exists()


def test_model_without_weights_has_the_same_stream(settings, ingredients):
    unloaded = language_model(settings(), "float32", pretrained=False)
    assert {p.device.type for p in unloaded.parameters()} == {"meta"}
    assert (unloaded.max_length, unloaded.context) == (32, 64)
    benchmark = build_stream(settings(), 0, model=unloaded)
    for one, other in zip(benchmark.train_stream, ingredients.benchmark.train_stream, strict=True):
        assert one.prompts == other.prompts
        for (x, y, *_), (u, v, *_) in zip(one.dataset, other.dataset, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


# ---------------------------------------------------------------------------------------- reports


def test_table_and_figures(settings, ingredients, tmp_path):
    results = [
        run(method, 0, settings(epochs=1), tmp_path / method, ingredients=ingredients)
        for method in ("SeqLoRA", "JointTraining")
    ]
    results[0]["metrics"]["generated"] = {
        "overall_performance": 0.25,
        "backward_transfer": -0.125,
        "forgetting": math.nan,
    }
    results[0]["plain_text"]["change"] = 0.25
    del results[1]["plain_text"]  # of an earlier version
    row = summarise(results)[0]
    assert row.mean["score"] == 0.25
    assert row.mean["epochs"] == 2
    write_table(results, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith(
        "| Method | Op ↑ % | Bwt ↓ % | general Δ ↓ ppl % | Forget ↓ % | Epochs in all |"
    )
    assert lines[2].startswith("| SeqLoRA | 25.0 | -12.5 | +25.0 | – | 2 |")
    assert "text_tasks: 2 tasks, model, cpu" in lines[-2] + lines[-3]
    paths = write_figures(results, tmp_path / "figures")
    assert [path.name for path in paths] == [name for name in FIGURES if name != "tree.png"]

    # Both tasks have seven answers in seven samples, too many for a majority.
    assert results[0]["stream"]["constant_answers"] == [None, None]
    assert not any(line.startswith("| chance") for line in lines)
    known = {"n_answers": 3, "majority_answer": "C", "majority": 0.5, "chance": 1 / 3}
    for result, row in zip(results, ([0.5, 0.25], [None, 0.75]), strict=True):
        result["stream"]["constant_answers"] = [known, None]
        result["accuracy_matrix"]["generated"][-1] = row
    write_table(results, tmp_path)
    text = (tmp_path / "table.md").read_text()
    tasks = text.split("\n\n")[1].splitlines()
    assert tasks[0] == "| Method | echo % | shout % |"
    assert tasks[2:] == [
        "| SeqLoRA | 50.0 | 25.0 |",
        "| JointTraining | – | 75.0 |",
        "| majority answer | 50.0 | – |",
        "| chance | 33.3 | – |",
    ]
    assert "most frequent training answer" in text.split("\n\n")[2]
    for width, n_tables in ((200, 1), (24, 2)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(rich_table(results, width))
        printed = console.export_text()
        assert printed.count("majority answer") == printed.count("chance  ") == n_tables
        assert printed.count("33.3") == 1
