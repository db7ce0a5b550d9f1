"""Runs and comparisons: run folders, reuse of finished runs, failures, tables and figures."""

import inspect
import io
import json
import math
import re
from importlib import import_module

import pytest
import torch
import yaml
from avalanche.core import SupervisedPlugin
from avalanche.training import Naive
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from support import FEW_PROJECTIONS
from treelora_avalanche.compare import compare, comparison, earlier_results, executors
from treelora_avalanche.metrics import backward_transfer, forgetting, overall_performance
from treelora_avalanche.models.features.random_projection import project_classifier
from treelora_avalanche.models.vision import ImagePreprocessing
from treelora_avalanche.plugins import NonFiniteLossError
from treelora_avalanche.registry import METHODS, SCENARIOS, Family, Method, RunSettings
from treelora_avalanche.registry.streams import DATA_FOLDERS, build_stream
from treelora_avalanche.reports.figures import FIGURES, write_figures
from treelora_avalanche.reports.table import rich_table, summarise, write_table
from treelora_avalanche.reports.tree_growth import tree_growth
from treelora_avalanche.runs import (
    SCHEMA_VERSION,
    Ingredients,
    finished_results,
    git_hash,
    prepare,
    resolve_config,
    run,
    run_name,
    stored_bytes,
    write_text,
)
from treelora_avalanche.tree import AdapterTree

SETTINGS = RunSettings(
    epochs=2,
    batch_size=8,
    rank=2,
    layers="all",
    lr=0.01,
    device="cpu",
    method_options=FEW_PROJECTIONS,
)
VISION = [name for name, entry in METHODS.items() if "vision" in entry.models]


def changed(**changes):
    values = {name: getattr(SETTINGS, name) for name in SETTINGS.__dataclass_fields__}
    return RunSettings(**{**values, **changes})


@pytest.fixture
def ingredients(tiny_benchmark, tiny_vit):
    return Ingredients(0, tiny_benchmark, tiny_vit())


@pytest.fixture
def five_blocks(tiny_benchmark, tiny_vit):
    """Returns ingredients for all methods: some have prompts in the first five blocks."""
    return Ingredients(0, tiny_benchmark, tiny_vit(depth=5))


def json_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------ one run


def as_tensor(matrix):
    """Returns a matrix of ``results.json`` with NaN for null."""
    return torch.tensor([[math.nan if a is None else a for a in row] for row in matrix])


@pytest.mark.parametrize("method", VISION)
def test_run_folder(method, five_blocks, tiny_vit, tmp_path):
    folder = tmp_path / "run"
    results = run(method, 0, SETTINGS, folder, ingredients=five_blocks)
    entry = METHODS[method]
    epochs = 1 if entry.frozen else 2

    assert json.loads((folder / "results.json").read_text()) == results
    assert results["schema_version"] == SCHEMA_VERSION
    assert (results["method"], results["seed"], results["epochs"]) == (method, 0, epochs)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == results["config"] == resolve_config(method, 0, SETTINGS)
    assert config.get("lr") == (None if entry.frozen else 0.01)

    for kind in ("class_incremental", "within_task"):
        matrix = as_tensor(results["accuracy_matrix"][kind])
        known = torch.ones(3, 3).tril().bool()  # a task is not evaluated before it is seen
        if entry.joint:
            known[:2] = False
        assert torch.equal(~matrix.isnan(), known)
        assert results["metrics"][kind] == {
            "overall_performance": pytest.approx(overall_performance(matrix)),
            "backward_transfer": None if entry.joint else pytest.approx(backward_transfer(matrix)),
            "forgetting": None if entry.joint else pytest.approx(forgetting(matrix)),
        }
    assert results["stream"]["trained"] == [0, 1, 2]
    assert results["stream"]["classes"] == [[0, 1], [2, 3], [4, 5]]
    assert results["stream"]["train_samples"] == [32, 32, 32]
    # 4 batches per task and epoch; frozen methods have no steps, RanPAC those of the first task,
    # Cumulative repeats past tasks.
    steps = dict.fromkeys(("FrozenNCM", "FrozenGaussian", "FrozenRanPAC"), 0)
    steps |= {"StreamingLDA": 12, "RanPAC": 8, "Cumulative": 2 * 24}
    assert results["timings"]["steps"] == steps.get(method, 24)
    assert (results["timings"]["ms_per_step"] is None) == (steps.get(method) == 0)
    assert all(results["timings"][f"{kind}_seconds"] > 0 for kind in ("train", "eval"))
    assert results["memory"]["peak_bytes"] > 0
    trainable, total = (results["parameters"][key] for key in ("trainable", "total"))
    assert 0 <= trainable <= total
    assert (trainable == 0) == entry.frozen
    assert (trainable == total) == (method in ("Naive", "EWC", "GEM", "SLCA"))
    assert results["versions"]["torch"]
    assert results["git_hash"] is None or re.fullmatch("[0-9a-f]{40}", results["git_hash"])

    lines = json_lines(folder)
    n_lines = 0 if not steps.get(method, 24) else epochs
    later = 0 if method == "RanPAC" else n_lines
    assert [line["event"] for line in lines] == [*["epoch"] * n_lines, "task"] + [
        *["epoch"] * later,
        "task",
    ] * (0 if entry.joint else 2)
    losses = [line["loss"] for line in lines if line["event"] == "epoch"]
    # The loss of HiDe can be negative.
    assert all(math.isfinite(loss) if "HiDe" in method else loss > 0 for loss in losses)
    last = lines[-1]
    assert last["class_incremental"] == results["metrics"]["class_incremental"]
    assert last["accuracy"]["within_task"] == results["accuracy_matrix"]["within_task"][-1]
    assert list((folder / "tensorboard").glob("events.*"))
    evaluated = 3 if entry.joint else 1 + 2 + 3
    assert len((folder / "eval_results.csv").read_text().splitlines()) == 1 + evaluated
    assert not (folder / "state").exists(), "a finished run keeps no state"

    names = sorted(path.name for path in folder.glob("adapters/*"))
    if not entry.uses_lora:
        assert not names
    else:
        assert names == ["task_002"] if entry.joint else ["task_000", "task_001", "task_002"]
    if entry.uses_lora and method not in (
        "TreeLoRA-routed",
        "HiDeLoRA",
    ):  # predictions use all adapters
        backbone = tiny_vit(depth=5)
        if method == "RanPAC":
            project_classifier(backbone, n_projections=20, seed=0)
        restored = PeftModel.from_pretrained(backbone, str(folder / "adapters" / "task_002"))
        correct = 0
        with torch.no_grad():
            restored.eval()
            for x, y, *_ in five_blocks.benchmark.test_stream[2].dataset:
                correct += int(restored(x[None]).argmax()) == int(y)
        count = results["stream"]["test_samples"][2]
        assert correct / count == pytest.approx(
            results["accuracy_matrix"]["class_incremental"][2][2]
        )
    if method.startswith("TreeLoRA"):
        state = json.loads((folder / "tree.json").read_text())
        tree = AdapterTree.from_dict({**state, **load_file(folder / "tree.safetensors")})
        assert tree.n_tasks == 3
        assert results["memory"]["stored_bytes"] > 0
        assert [tree["level"] for tree in results["trees"]] == [0, 0, 0]
        assert sorted(t for tasks in results["trees"][-1]["adapters"] for t in tasks) == [0, 1, 2]
        drawings = (folder / "tree.txt").read_text()
        assert re.findall("After (.) tasks", drawings) == ["1", "2", "3"]
    assert not list(folder.rglob("*.tmp"))


def test_runs_are_reproducible(ingredients, tmp_path):
    before = {k: v.clone() for k, v in ingredients.backbone.state_dict().items()}
    first, second = (
        run("TreeLoRA", 0, SETTINGS, tmp_path / name, ingredients=ingredients) for name in "ab"
    )
    assert first["accuracy_matrix"] == second["accuracy_matrix"]
    losses = [
        [line["loss"] for line in json_lines(tmp_path / name) if line["event"] == "epoch"]
        for name in "ab"
    ]
    assert losses[0] == losses[1]
    for name, value in ingredients.backbone.state_dict().items():
        assert torch.equal(value, before[name]), "the shared backbone is unchanged"


def test_config_is_written_first(ingredients, tmp_path, monkeypatch):
    def build(*args):
        assert (tmp_path / "config.yaml").is_file()
        raise RuntimeError("no such luck")

    monkeypatch.setitem(
        METHODS, "Broken", Method("avalanche.training:Naive", "fails", Family(build))
    )
    with pytest.raises(RuntimeError, match="no such luck"):
        run("Broken", 0, SETTINGS, tmp_path, ingredients=ingredients)
    assert not (tmp_path / "results.json").exists()


def test_finished_tasks_survive_a_crash(ingredients, tmp_path):
    def crash_in_task_two(now):
        if now.task == 2:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run("TreeLoRA", 0, SETTINGS, tmp_path, ingredients=ingredients, progress=crash_in_task_two)
    assert (tmp_path / "adapters" / "task_000" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "tree.json").is_file()
    assert [line["event"] for line in json_lines(tmp_path)] == ["epoch", "epoch", "task"]
    assert not (tmp_path / "results.json").exists()
    # A run with other settings replaces all files.
    run("TreeLoRA", 0, changed(epochs=1), tmp_path, ingredients=ingredients)
    assert len(json_lines(tmp_path)) == 6


@pytest.mark.parametrize("method", [name for name in VISION if not METHODS[name].frozen])
def test_non_finite_loss_stops_the_run(method, five_blocks, tmp_path):
    with pytest.raises(NonFiniteLossError, match="step"):
        run(method, 0, changed(lr=1e30), tmp_path, ingredients=five_blocks)
    assert not (tmp_path / "results.json").exists()


def test_progress_counts_to_the_end(ingredients, tmp_path):
    seen = []
    run("SeqLoRA", 0, SETTINGS, tmp_path, ingredients=ingredients, progress=seen.append)
    assert [now.step for now in seen if now.epoch] == sorted(now.step for now in seen)
    assert seen[0].accuracy is None
    assert (seen[0].task, seen[0].epoch, seen[0].step) == (1, 1, 1)
    assert (seen[-1].task, seen[-1].epoch, seen[-1].step) == (3, 2, 24)
    assert all((now.n_tasks, now.n_epochs, now.n_steps) == (3, 2, 24) for now in seen)


def test_ingredients_of_another_seed_are_refused(ingredients, tmp_path):
    with pytest.raises(ValueError, match="prepared for seed 1, but are for seed 0"):
        run("SeqLoRA", 1, SETTINGS, tmp_path, ingredients=ingredients)


def test_foreign_files_are_not_deleted(ingredients, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run("SeqLoRA", 0, SETTINGS, tmp_path, ingredients=ingredients)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        run("SeqLoRA", 0, SETTINGS, tmp_path / "thesis.tex", ingredients=ingredients)


def test_another_finished_run_is_not_overwritten(ingredients, tmp_path):
    first = run("SeqLoRA", 0, SETTINGS, tmp_path, ingredients=ingredients)
    with pytest.raises(ValueError, match="another finished run"):
        run("Naive", 0, SETTINGS, tmp_path, ingredients=ingredients)
    assert json.loads((tmp_path / "results.json").read_text()) == first


def test_files_are_written_atomically(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"


def test_run_name_depends_on_settings_that_the_method_reads():
    def name(method, **changes):
        return run_name(resolve_config(method, 0, changed(**changes)))

    assert name("Naive", rank=3) == name("Naive")
    assert name("SeqLoRA", rank=3) != name("SeqLoRA")
    assert name("SeqLoRA", tree_lambda=0.7) == name("SeqLoRA")
    assert name("TreeLoRA", tree_lambda=0.7) != name("TreeLoRA")
    assert name("Naive", epochs=3) != name("Naive")
    assert name("Naive", lr=METHODS["Naive"].family.rates.digits) == name("Naive", lr=None)


def test_finished_results_match_configuration_and_version(ingredients, tmp_path):
    config = resolve_config("SeqLoRA", 0, SETTINGS)
    assert finished_results(tmp_path, config) is None
    results = run("SeqLoRA", 0, SETTINGS, tmp_path, ingredients=ingredients)
    assert finished_results(tmp_path, config) == results
    assert finished_results(tmp_path, resolve_config("SeqLoRA", 0, changed(epochs=3))) is None
    older = {**results, "versions": {**results["versions"], "treelora-avalanche": "0.0.1"}}
    for content in (json.dumps(older), "{", "[]", "{}"):
        (tmp_path / "results.json").write_text(content)
        assert finished_results(tmp_path, config) is None


def test_stored_bytes_counts_tensors_of_plugins():
    model = nn.Linear(4, 2)

    class Keeper(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            kept = torch.zeros(10)  # 40 bytes
            self.nested = {"a": [kept, kept[:3]], "b": (nn.Linear(2, 1),)}  # 12 more
            self.views_of_the_model = [model.weight[0], model.bias.detach()]

    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[Keeper()],
        evaluator=None,
    )
    assert stored_bytes(strategy) == 40 + 12


def test_git_hash_of_a_checkout():
    assert git_hash() is None or re.fullmatch("[0-9a-f]{40}", git_hash())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "`--rank` should be at least 1, but is 0"),
        ({"tree_lambda": -0.1}, "`--tree_lambda` should be at least 0, but is -0.1"),
        ({"tree_lambda": float("nan")}, "`--tree_lambda` should be at least 0"),
        ({"epochs": 0}, "`--epochs` should be at least 1"),
        ({"batch_size": 0}, "`--batch_size` should be at least 1"),
        ({"n_experiences": 0}, "`--n_experiences` should be at least 1"),
        ({"depth": 0}, "`--depth` should be at least 1"),
        ({"max_adapters": 0}, "`--max_adapters` should be at least 1"),
        ({"lr": 0.0}, "`--lr` should be a positive number"),
        ({"alpha": float("nan")}, "`--alpha` should be a positive number"),
        (
            {"scenario": "digit"},
            "`--scenario` should be one of .* but is 'digit'.*Did you mean 'digits'",
        ),
        (
            {"selection": "nearst"},
            "`--selection` should be one of .* but is 'nearst'.*Did you mean 'nearest'",
        ),
        ({"scenario": "image_folder"}, "Pass `--data FOLDER`"),
        ({"data": "x"}, "`--data` is 'x', but digits brings its own data"),
        ({"model": "deit_tiny_patch16_224"}, "`--model` is 'deit_tiny_patch16_224', but digits"),
        ({"head": "gaussian"}, "`--head` should be one of .* but is 'gaussian'"),
        ({"scenario": "cub200"}, "`--data` should be a folder for `--scenario cub200`"),
        (
            {"scenario": "domains", "data": "x", "n_experiences": 4},
            "`--n_experiences` is 4, but `--scenario domains` does not use it",
        ),
        (
            {"scenario": "image_folder", "data": "x", "download": True},
            "`--download` is True, but `--scenario image_folder` does not use it",
        ),
        (
            {"domains": ["photo"]},
            r"`--domains` is \['photo'\], but `--scenario digits` does not use it",
        ),
    ],
)
def test_wrong_settings_are_named_as_flags(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)


# ---------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    ("scenario", "generator", "given", "expected"),
    [
        ("digits", "SplitDigits", {}, {"n_experiences": 5}),
        ("digits", "SplitDigits", {"n_experiences": 2}, {"n_experiences": 2}),
        ("image_folder", "SplitImageFolder", {"classes": ["a"]}, {"n_experiences": 10}),
        ("cifar100", "SplitCIFAR100", {"download": True}, {"n_experiences": 10, "download": True}),
        ("imagenet_r", "SplitImageNetR", {}, {"n_experiences": 10, "download": False}),
        ("cub200", "SplitCUB200", {"n_experiences": 20}, {"n_experiences": 20, "download": False}),
        ("domains", "DomainImageFolder", {"domains": ["b", "a"]}, {"domains": ["b", "a"]}),
    ],
)
def test_scenarios_by_name(scenario, generator, given, expected, tmp_path, monkeypatch):
    """Checks that each scenario passes given and default settings to its generator."""
    from treelora_avalanche import models, scenarios

    asked = {}
    real = inspect.signature(getattr(scenarios, generator))

    def build(*args, **kwargs):
        asked.update(real.bind(*args, **kwargs).arguments)
        raise StopIteration

    build.__signature__ = real
    monkeypatch.setattr(scenarios, generator, build)
    monkeypatch.setattr(models, "pretrained_digits_vit", lambda seed: None)
    images = {"data": str(tmp_path), "model": "vit_tiny_patch16_224"}
    settings = RunSettings(scenario=scenario, **({} if scenario == "digits" else images), **given)
    with pytest.raises(StopIteration):
        prepare(3, settings)
    assert asked["seed"] == 3
    for name, value in expected.items():
        assert asked[name] == value
    if scenario != "digits":
        assert str(asked["dataset_root"]) == str(tmp_path)
        assert asked["preprocessing"].input_size == (3, 224, 224)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_passes_on_what_it_takes(name):
    """Checks that settings of a scenario are parameters of its generator, or of the model."""
    scenario = SCENARIOS[name]
    of_model = {"model", "checkpoint", "img_size", "max_length", "dtype", "gradient_checkpointing"}
    of_model |= {"chat_template", "plain_text"}
    of_training = {"head", "epochs_per_task", "accumulation_steps"}
    folder = {"data", "exclude_classes"}
    parameters = inspect.signature(scenario.load()).parameters
    assert set(scenario.takes) - of_model - of_training - folder <= set(parameters)
    assert ("data" in scenario.takes) == bool(set(DATA_FOLDERS) & set(parameters))
    assert scenario.language == ("model" in parameters)
    if scenario.seeded:
        assert "seed" in parameters


def test_config_has_the_settings_that_the_scenario_reads():
    digits = resolve_config("SeqLoRA", 0, SETTINGS)
    assert digits["n_experiences"] == 5
    assert not {"data", "domains", "download"} & set(digits)
    domains = changed(scenario="domains", data="x", model="vit_tiny_patch16_224")
    config = resolve_config("FrozenNCM", 0, domains)
    assert "domains" in config
    assert not {"n_experiences", "download", "lr", "epochs", "rank", "head"} & set(config)


@pytest.fixture
def pacs(tmp_path):
    """Returns a folder of two domains with three classes, in the layout of PACS."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", 4), ("test", 2)):
        for domain in ("photo", "sketch"):
            for name in ("dog", "horse", "person"):
                folder = tmp_path / "pacs" / part / domain / name
                folder.mkdir(parents=True)
                for k in range(n):
                    pixels = torch.randint(256, (16, 16, 3), generator=generator)
                    Image.fromarray(pixels.byte().numpy()).save(folder / f"{k}.png")
    return tmp_path / "pacs"


@pytest.mark.parametrize("method", ["TreeLoRA-routed", "FrozenNCM", "JointTraining"])
def test_domains_from_folders(method, pacs, tmp_path, tiny_vit):
    """Checks a domain-incremental run, down to the names in the results."""
    settings = changed(
        scenario="domains",
        data=str(pacs),
        exclude_classes=["person"],
        domains=["sketch", "photo"],
        model="vit_tiny_patch16_224",
        epochs=1,
        head="task_adaptive",
    )
    benchmark = build_stream(settings, 0, preprocessing=ImagePreprocessing((3, 8, 8)))
    model = tiny_vit(num_classes=2)
    model.patch_embed.proj = nn.Conv2d(3, 16, 4, 4)
    results = run(
        method, 0, settings, tmp_path / "run", ingredients=Ingredients(0, benchmark, model)
    )
    assert results["stream"]["domain_names"] == ["sketch", "photo"]
    assert results["stream"]["class_names"] == ["dog", "horse"]
    assert results["stream"]["classes"] == [[0, 1], [0, 1]]
    assert results["stream"]["train_samples"] == [8, 8]
    matrices = results["accuracy_matrix"]
    # Each task has all classes.
    assert matrices["class_incremental"] == matrices["within_task"]


# --------------------------------------------------------------------------------------- many runs


@pytest.fixture
def counted(monkeypatch, tiny_benchmark, tiny_vit):
    """Replaces the stream by a tiny one; returns lists of prepared seeds and trained cells."""
    calls = {"prepared": [], "trained": []}

    def prepare(seed, settings, methods):
        calls["prepared"].append(seed)
        return Ingredients(seed, tiny_benchmark, tiny_vit())

    def counting_run(method, seed, *args, **kwargs):
        calls["trained"].append((method, seed))
        return run(method, seed, *args, **kwargs)

    monkeypatch.setattr(comparison, "prepare", prepare)
    monkeypatch.setattr(executors, "run", counting_run)
    return calls


def quiet_compare(*args, **kwargs):
    stream = io.StringIO()
    cells = compare(*args, console=Console(file=stream, width=100), **kwargs)
    return cells, stream.getvalue()


def test_finished_cells_are_not_run_again(counted, tmp_path):
    one_epoch = changed(epochs=1)
    cells, _ = quiet_compare(["SeqLoRA", "Naive"], [0, 1], one_epoch, tmp_path)
    assert sorted(counted["trained"]) == [
        ("Naive", 0),
        ("Naive", 1),
        ("SeqLoRA", 0),
        ("SeqLoRA", 1),
    ]
    assert counted["prepared"] == [0, 1], "methods of one seed share stream and backbone"
    assert not any(cell.reused for cell in cells)

    again, printed = quiet_compare(["SeqLoRA", "Naive"], [0, 1], one_epoch, tmp_path)
    assert len(counted["trained"]) == 4
    assert counted["prepared"] == [0, 1]
    assert all(cell.reused for cell in again)
    assert [cell.results for cell in again] == [cell.results for cell in cells]
    assert printed.count("finished before") == 4

    # New cells run; after a change of settings, only cells that read them.
    quiet_compare(["SeqLoRA", "Naive"], [0, 1, 2], one_epoch, tmp_path)
    assert counted["trained"][4:] == [("SeqLoRA", 2), ("Naive", 2)]
    quiet_compare(["SeqLoRA", "Naive"], [0], changed(epochs=1, rank=1), tmp_path)
    assert counted["trained"][6:] == [("SeqLoRA", 0)]


def test_cells_run_again_when_their_inputs_change(counted, tmp_path, monkeypatch):
    data, output = tmp_path / "data", tmp_path / "out"
    (data / "train" / "ant").mkdir(parents=True)
    image = data / "train" / "ant" / "1.png"
    image.write_bytes(b"first")
    settings = changed(scenario="domains", data=str(data), epochs=1)
    (cell,), _ = quiet_compare(["Naive"], [0], settings, output)
    _, printed = quiet_compare(["Naive"], [0], settings, output)
    assert "finished before" in printed

    image.write_bytes(b"other")  # as many bytes
    read = []
    fingerprinting = import_module("treelora_avalanche.runs.fingerprints")
    of_files = fingerprinting.of_files
    monkeypatch.setattr(
        fingerprinting, "of_files", lambda path: read.append(path) or of_files(path)
    )
    (again,), printed = quiet_compare(["Naive"], [0], settings, output)
    assert read == [data]
    assert len(counted["trained"]) == 2
    assert "runs again (data changed since)" in " ".join(printed.split())
    assert again.results["fingerprints"]["data"] != cell.results["fingerprints"]["data"]
    kept = output / f"{cell.folder.name}.old1"
    assert json.loads((kept / "results.json").read_text()) == cell.results
    assert (kept / "metrics.jsonl").is_file()

    _, printed = quiet_compare(["Naive"], [0], settings, output, force=True)
    assert "runs again (`--force`)" in " ".join(printed.split())
    assert len(counted["trained"]) == 3
    assert (output / f"{cell.folder.name}.old2" / "results.json").is_file()


def test_the_table_covers_earlier_comparisons_in_the_folder(counted, tmp_path):
    cells, _ = quiet_compare(["SeqLoRA"], [0], changed(epochs=1), tmp_path)
    assert earlier_results(tmp_path, cells) == ([], 0)
    later, _ = quiet_compare(["SeqLoRA", "Naive"], [0], changed(epochs=1, rank=1), tmp_path)
    found, n_others = earlier_results(tmp_path, later)
    assert (found, n_others) == ([cells[0].results], 0)

    rows = summarise([*(cell.results for cell in later), *found])
    assert [row.method for row in rows] == ["SeqLoRA (rank=1)", "Naive", "SeqLoRA (rank=2)"]
    # One on another stream, one that was set aside, one of another version.
    other = json.loads(json.dumps(cells[0].results))
    other["stream"]["trained"].append(3)
    old = {**cells[0].results, "schema_version": -1}
    for name, results in (("other", other), ("run.old1", cells[0].results), ("old", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    assert earlier_results(tmp_path, later) == (found, 1)


def test_unfinished_cells_are_run_again(counted, tmp_path):
    cells, _ = quiet_compare(["Naive"], [0], changed(epochs=1), tmp_path)
    (cells[0].folder / "results.json").unlink()
    quiet_compare(["Naive"], [0], changed(epochs=1), tmp_path)
    assert len(counted["trained"]) == 2


def test_failing_method_does_not_stop_the_others(counted, tmp_path, monkeypatch):
    def build(*args):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(
        METHODS, "Broken", Method("avalanche.training:Naive", "fails", Family(build))
    )
    cells, printed = quiet_compare(["Broken", "Naive"], [0], changed(epochs=1), tmp_path)
    broken, naive = cells
    assert broken.results is None
    assert broken.error == "RuntimeError: first line second line"
    assert "failed  Broken, seed 0: RuntimeError: first line second line" in printed
    assert "Traceback" in (broken.folder / "error.txt").read_text()
    assert naive.results is not None


def test_names_are_checked_before_any_run(counted, tmp_path):
    with pytest.raises(
        ValueError, match=r"method should be one of .* but is 'TreeLora'.*Did you mean 'TreeLoRA'"
    ):
        compare(["Naive", "TreeLora"], [0], SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="`--methods` and `--seeds`"):
        compare(["Naive"], [], SETTINGS, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        compare(["Naive"], [0], SETTINGS, tmp_path / "file")
    assert not counted["trained"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_lines(counted, tmp_path, terminal):
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=terminal)
    compare(["Naive", "SeqLoRA"], [0], changed(epochs=1), tmp_path, console=console)
    printed = stream.getvalue()
    # Any of them: the last may end between two refreshes of the terminal.
    assert bool(re.search(r"task [123]/3", printed)) == terminal
    assert "Naive" in printed
    assert "SeqLoRA" in printed
    assert printed.count("done, acc") >= 2


# ---------------------------------------------------------------------------------------- reports


@pytest.fixture
def results(counted, tmp_path):
    cells, _ = quiet_compare(["SeqLoRA", "Naive"], [0, 1], changed(epochs=1), tmp_path / "runs")
    return [cell.results for cell in cells]


def test_table(results, tmp_path):
    for result, accuracy in zip(results, (0.5, 0.6, 0.2, 0.2), strict=True):
        result["metrics"]["class_incremental"]["overall_performance"] = accuracy
    rows = summarise(results)
    assert [(row.method, row.seeds) for row in rows] == [("SeqLoRA", [0, 1]), ("Naive", [0, 1])]
    assert rows[0].mean["accuracy"] == pytest.approx(0.55)
    assert rows[0].std["accuracy"] == pytest.approx(0.05 * 2**0.5)  # over n - 1
    write_table(results, tmp_path)
    assert "| SeqLoRA | 55.0 ± 7.1 |" in (tmp_path / "table.md").read_text()
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["rows"][1]["mean"]["accuracy"] == pytest.approx(0.2)


def test_one_seed_has_no_standard_deviation(results, tmp_path):
    write_table(results[:1], tmp_path)
    assert "±" not in (tmp_path / "table.md").read_text()
    assert (
        json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["std"]["accuracy"] is None
    )


def test_undefined_number_of_several_seeds_is_a_dash(results, tmp_path):
    for result in results[:2]:
        result["timings"]["ms_per_step"] = None
    row = summarise(results)[0]
    assert math.isnan(row.mean["ms_per_step"])
    assert math.isnan(row.std["ms_per_step"])
    assert row.std["train_seconds"] >= 0
    write_table(results, tmp_path)
    assert " – |" in (tmp_path / "table.md").read_text().splitlines()[2]


def test_undefined_number_is_a_dash(ingredients, tmp_path):
    result = run("JointTraining", 0, changed(epochs=1), tmp_path / "run", ingredients=ingredients)
    write_table([result], tmp_path)
    row = (tmp_path / "table.md").read_text().splitlines()[2]
    accuracy, within, transfer, forgotten = row.split(" | ")[1:5]
    assert float(accuracy) > 0
    assert float(within) > 0
    assert (transfer, forgotten) == ("–", "–")


@pytest.mark.parametrize("n_tasks", [1, 2, 40])
def test_tree_figure_of_any_number_of_tasks(n_tasks):
    def node(tasks, level=0):
        half = len(tasks) // 2
        parts = [tasks[:half], tasks[half:]] if len(tasks) > 2 else []
        return {
            "level": level,
            "delta": 0.1 if parts else None,
            "adapters": [[task] for task in tasks],
            "children": [node(part, level + 1) for part in parts],
        }

    tasks = list(range(n_tasks))
    result = {
        "method": "TreeLoRA",
        "seed": 0,
        "trees": [node(tasks[: k + 1]) for k in tasks],
        "stream": {
            "trained": tasks,
            "classes": [[3 * k, 3 * k + 1, 3 * k + 2, 0] for k in tasks],
            "class_names": [f"class_{k}" for k in range(3 * n_tasks)],
        },
    }
    figure = tree_growth([{"trees": None}, result])
    assert len(figure.axes) == 1 + min(n_tasks - 1, 12)
    # One dot for every adapter of the last tree.
    assert len(figure.axes[0].collections) == n_tasks
    figure.canvas.draw()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_table_fits_the_terminal(results, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_table(results, width))
    text = console.file.getvalue()
    assert "…" not in text
    for heading in ("Acc ↑", "in task ↑", "Bwt ↓", "Forget ↓", "Time", "/step", "params"):
        assert text.count(heading) == 1
    assert max(len(line) for line in text.splitlines()) <= width


def test_figures(ingredients, results, tmp_path):
    one_epoch = changed(epochs=1)
    more = [
        run(method, 0, one_epoch, tmp_path / method, ingredients=ingredients)
        for method in ("TreeLoRA", "JointTraining", "FrozenNCM")
    ]
    paths = write_figures([*results, *more], tmp_path / "figures")
    assert [path.name for path in paths] == list(FIGURES)
    # Without a tree, the figure of an earlier comparison is deleted.
    paths_without = write_figures(results, tmp_path / "figures")
    assert [path.name for path in paths_without] == [name for name in FIGURES if name != "tree.png"]
    assert not (tmp_path / "figures" / "tree.png").exists()
    assert len(write_figures(more[1:2], tmp_path / "alone")) == 3
    for path in paths_without:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
