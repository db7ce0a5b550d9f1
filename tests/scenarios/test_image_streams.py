"""Streams of images that people have: a folder per task, uneven tasks, listed classes, a limit."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from treelora_avalanche.cli import build_parser
from treelora_avalanche.models import ImagePreprocessing
from treelora_avalanche.registry import RunSettings
from treelora_avalanche.registry.streams import build_stream
from treelora_avalanche.runs import resolve_config
from treelora_avalanche.runs.fingerprints import fingerprints
from treelora_avalanche.scenarios import DomainImageFolder, ImageTasks, SplitImageFolder
from treelora_avalanche.scenarios.data.class_incremental import divide_classes
from treelora_avalanche.scenarios.data.limit import limit_rows

TINY = ImagePreprocessing(input_size=(3, 8, 8))
PETS = ["ant", "bee", "cat", "dog", "eel"]


def write(folder, n, seed):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture
def pets(tmp_path):
    """Five classes in a given split, 4 to 8 images for training and 2 for testing."""
    for k, name in enumerate(PETS):
        write(tmp_path / "pets" / "train" / name, 4 + k, seed=k)
        write(tmp_path / "pets" / "test" / name, 2, seed=10 + k)
    return tmp_path / "pets"


@pytest.fixture
def tasks(tmp_path):
    """Two tasks of two and one classes, 5 images each."""
    for k, name in enumerate(["b_birds/owl", "b_birds/001", "a_cars/van"]):
        write(tmp_path / "tasks" / name, 5, seed=20 + k)
    return tmp_path / "tasks"


def names(benchmark):
    """The names of the classes in each experience, from its samples; equal in both streams."""
    train, test = (
        [sorted({benchmark.class_names[y] for _, y, *_ in e.dataset}) for e in stream]
        for stream in (benchmark.train_stream, benchmark.test_stream)
    )
    assert train == test
    return train


def per_class(benchmark, stream="train_stream"):
    """The number of samples of each class, by experience."""
    return [
        Counter(benchmark.class_names[y] for y in experience.dataset.targets)
        for experience in getattr(benchmark, stream)
    ]


def split(root, n_experiences=None, **options):
    return SplitImageFolder(root, n_experiences, preprocessing=TINY, seed=0, **options)


def from_command_line(*arguments):
    options = build_parser().parse_args(["train", "--model=vit_tiny_patch16_224", *arguments]).train
    settings = RunSettings(**{name: options[name] for name in RunSettings.__dataclass_fields__})
    return build_stream(settings, 0, preprocessing=TINY)


# --------------------------------------------------------------------------------- folder per task


def test_each_task_folder_is_an_experience_with_its_own_classes(tasks):
    benchmark = ImageTasks(tasks, preprocessing=TINY, seed=0)
    assert benchmark.task_names == ["a_cars", "b_birds"]
    assert benchmark.class_names == ["van", "001", "owl"]
    assert names(benchmark) == [["van"], ["001", "owl"]]
    assert per_class(benchmark) == [{"van": 4}, {"001": 4, "owl": 4}]
    assert type(benchmark).__name__ == "NCScenario"
    for label, folder in enumerate(("a_cars/van", "b_birds/001", "b_birds/owl")):
        files = {TINY(Image.open(f)).numpy().tobytes() for f in (tasks / folder).iterdir()}
        streams = (benchmark.train_stream, benchmark.test_stream)
        samples = [s for stream in streams for e in stream for s in e.dataset]
        assert {x.numpy().tobytes() for x, y, *_ in samples if y == label} == files


def test_tasks_arrive_in_the_order_given_on_the_command_line(tasks):
    common = ("--scenario=image_tasks", f"--data={tasks}")
    benchmark = from_command_line(*common, "--tasks=[b_birds, a_cars]")
    assert names(benchmark) == [["001", "owl"], ["van"]]
    assert names(from_command_line(*common, "--classes=[001, van]")) == [["van"], ["001"]]


@pytest.mark.parametrize("layout", ["{task}/{part}/{name}", "{part}/{task}/{name}"])
def test_tasks_with_a_given_split(tmp_path, layout):
    for k, (task, name) in enumerate((("a", "x"), ("a", "y"), ("b", "z"))):
        for part, n in (("train", 3), ("test", 2)):
            write(tmp_path / layout.format(task=task, part=part, name=name), n, 2 * k + n % 2)
    benchmark = ImageTasks(tmp_path, preprocessing=TINY)
    assert per_class(benchmark) == [{"x": 3, "y": 3}, {"z": 3}]
    assert per_class(benchmark, "test_stream") == [{"x": 2, "y": 2}, {"z": 2}]


def test_a_class_in_two_tasks_is_refused_by_name(tasks):
    write(tasks / "a_cars" / "owl", 5, seed=30)
    match = r"class 'owl' .*in 'a_cars' and in 'b_birds'\. Rename .*`DomainImageFolder`"
    with pytest.raises(ValueError, match=match):
        ImageTasks(tasks, preprocessing=TINY)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tasks": ["a_cars", "birds"]}, r"\(a_cars, b_birds\), but contains 'birds'\. Did you"),
        ({"tasks": ["a_cars", "a_cars"]}, "list of different task names"),
        ({"classes": ["van"]}, "names none of 'b_birds'. Leave the task out"),
        ({"classes": ["vann", "owl"]}, "contains 'vann'. Did you mean 'van'"),
    ],
)
def test_wrong_tasks_are_named(tasks, options, match):
    with pytest.raises(ValueError, match=match):
        ImageTasks(tasks, preprocessing=TINY, **options)


def test_the_three_readers_of_folders_name_each_other(tasks, pets):
    with pytest.raises(
        ValueError, match=r"lie in subfolders.*one folder per task is for `ImageTasks`"
    ):
        SplitImageFolder(tasks, preprocessing=TINY)
    with pytest.raises(ValueError, match=r"should hold the same classes.*tasks for `ImageTasks`"):
        DomainImageFolder(tasks, preprocessing=TINY)
    with pytest.raises(ValueError, match=r"holds no class folders\. Accepted are <root>/<task>"):
        ImageTasks(pets / "train", preprocessing=TINY)


# ------------------------------------------------------------------------------ uneven and listed


def test_uneven_numbers_of_classes(pets):
    uneven = split(pets, 3, per_exp_classes={0: 3}, fixed_class_order=["eel", "cat", "ant", 1, 3])
    assert names(uneven) == [["ant", "cat", "eel"], ["bee"], ["dog"]]
    # The same order as without, and as Avalanche's.
    assert split(pets, 2, per_exp_classes={1: 2}).classes_order == split(pets, 5).classes_order
    assert list(map(len, names(split(pets, per_exp_classes={0: 1, 1: 4})))) == [1, 4]


LISTED = {"b": ["eel", "ant"], "a": ["dog"], "c": ["cat", "bee"]}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_classes_of_each_task_from_a_file(pets, tmp_path, suffix):
    file = tmp_path / f"tasks{suffix}"
    # JSON is YAML.
    file.write_text(json.dumps(LISTED))
    expected = [["ant", "eel"], ["dog"], ["bee", "cat"]]
    assert names(split(pets, task_classes=file)) == expected
    common = ("--scenario=image_folder", f"--data={pets}")
    option = f"--scenario_options={{task_classes: {file}}}"
    assert names(from_command_line(*common, option)) == expected
    option = "--scenario_options={task_classes: [[eel, ant], [dog], [cat, bee]]}"
    assert names(from_command_line(*common, option)) == expected


def test_names_in_a_file_of_tasks_stay_as_written(tmp_path):
    known = ["001", "1e3", "on", "null", "1"]
    (tmp_path / "t.yaml").write_text("first: [on, 001]\nsecond:\n- 1e3\n- null\n- 1\n")
    (tmp_path / "t.json").write_text('{"first": ["on", "001"], "second": ["1e3", "null", 1]}')
    for file in ("t.yaml", "t.json"):
        assert divide_classes(known, task_classes=tmp_path / file) == [[2, 0], [1, 3, 4]]


def test_a_changed_file_of_tasks_is_another_input(pets, tmp_path):
    file = tmp_path / "tasks.json"
    options = {"scenario": "image_folder", "data": str(pets)}
    settings = RunSettings(**options, scenario_options={"task_classes": str(file)})
    config = resolve_config("SeqLoRA", 0, settings)
    assert config["n_experiences"] is None
    found = []
    for content in (LISTED, {**LISTED, "a": ["cat"], "c": ["dog", "bee"]}):
        file.write_text(json.dumps(content))
        found.append(fingerprints(config)["task_classes"])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"task_classes": [["ant"], ["bee", "catt", "dog", "eel"]]},
            r"unknown: 'catt' Did you mean",
        ),
        ({"task_classes": [["ant", "bee"], ["cat", "ant", "dog", "eel"]]}, "more than once: 'ant'"),
        ({"task_classes": [["ant", "bee"], ["cat"]]}, "missing: 'dog', 'eel'"),
        ({"task_classes": {"a": "ant"}}, "task 'a' is 'ant'"),
        ({"task_classes": {"a": [True]}}, "task 'a' holds True"),
        ({"task_classes": LISTED, "per_exp_classes": {0: 1}}, "`per_exp_classes` are both given"),
        ({"task_classes": LISTED, "n_experiences": 2}, "should be the 3 tasks .* but is 2"),
        (
            {"fixed_class_order": ["ant", "bee", "cat", "dog", "elk"], "n_experiences": 5},
            "unknown: 'elk'.*missing: 'eel'",
        ),
        (
            {"fixed_class_order": [0, 1, 2, 3, 3], "n_experiences": 5},
            "more than once: 3; missing: 4",
        ),
        ({"per_exp_classes": {0: 2, 1: 4}, "n_experiences": 2}, "sum up to the 5 .* sums up to 6"),
        ({"per_exp_classes": {0: 2}, "n_experiences": 3}, "other 2 of 3 .* leaves 3 of 5"),
        ({"per_exp_classes": {3: 2}, "n_experiences": 3}, "3 experiences from 0 to 2, but holds 3"),
        ({"per_exp_classes": {0: 0}, "n_experiences": 3}, "but is 0 for experience 0"),
        ({"n_experiences": 2}, "`n_experiences` .* evenly, but is 2.*`per_exp_classes=`"),
    ],
)
def test_wrong_divisions_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        divide_classes(PETS, **options)


def test_wrong_files_of_tasks_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml' is not a file"):
        divide_classes(PETS, task_classes=tmp_path / "none.yaml")
    for name, content in (("t.yaml", b"a: [ant"), ("t.json", b"{a"), ("u.yaml", b"a: [\xff]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}' cannot be read"):
            divide_classes(PETS, task_classes=tmp_path / name)


# ------------------------------------------------------------------------------- names as written


@pytest.mark.parametrize("flag", ["classes", "exclude_classes", "domains", "tasks"])
def test_names_on_the_command_line_stay_as_written(flag, tmp_path):
    written = ["001", "1e3", "on", "null", "~", "0x1f", "1_000", "12:30", "a b"]
    value = f"[{', '.join(written)}]"
    file = tmp_path / "c.yaml"
    file.write_text(f"{flag}: {value}\nvariant: 500\nlr: 1e-3\n")
    for arguments in ([f"--{flag}={value}"], [f"--{flag}", value], ["--config", str(file)]):
        assert build_parser().parse_args(["train", *arguments]).train[flag] == written
    options = build_parser().parse_args(["train", "--config", str(file), f"--{flag}=null"]).train
    assert (options[flag], options.variant, options.lr) == (None, "500", 0.001)


def test_numeric_class_folders_are_excluded_by_name(tmp_path):
    for k, name in enumerate(("001", "1", "1e3", "on")):
        write(tmp_path / name, 3, seed=k)
    common = ("--scenario=image_folder", f"--data={tmp_path}", "--n_experiences=1")
    assert names(from_command_line(*common, "--exclude_classes=[001, on]")) == [["1", "1e3"]]
    order = "--scenario_options={fixed_class_order: [on, 001, 1e3, 1]}"
    assert from_command_line(*common, order).classes_order == [3, 0, 2, 1]
    order = "--scenario_options={fixed_class_order: [3, 0, 2, 1]}"
    with pytest.raises(ValueError, match="unknown: '3'"):  # one is a name, so all are
        from_command_line(*common, order)


# ------------------------------------------------------------------------------------------- limit


def test_limit_is_balanced_and_follows_the_seed(pets):
    def kept(limit, seed=0):
        options = {"preprocessing": TINY, "task_classes": [["ant", "eel", "bee"], ["cat", "dog"]]}
        return SplitImageFolder(pets, limit=limit, seed=seed, **options)

    def pixels(benchmark):
        return {x.numpy().tobytes() for e in benchmark.train_stream for x, *_ in e.dataset}

    assert per_class(kept(4)) == [{"ant": 1, "bee": 1, "eel": 2}, {"cat": 2, "dog": 2}]
    # ant has only four images: the others fill up.
    assert per_class(kept(15)) == [{"ant": 4, "bee": 5, "eel": 6}, {"cat": 6, "dog": 7}]
    assert per_class(kept(4), "test_stream") == [
        {"ant": 1, "bee": 2, "eel": 1},
        {"cat": 2, "dog": 2},
    ]
    assert pixels(kept(4)) == pixels(kept(4)) < pixels(kept(9)) < pixels(kept(None))
    assert any(pixels(kept(4, seed)) != pixels(kept(4)) for seed in (1, 2, 3))
    with pytest.raises(ValueError, match=r"`limit` should be at least 3, .* but is 2"):
        kept(2)
    with pytest.raises(ValueError, match="`limit` should be at least 1, but is 0"):
        kept(0)


def test_limit_of_every_kind_of_stream_on_the_command_line(pets, tasks, tmp_path):
    pacs = tmp_path / "pacs"
    for k in range(4):
        write(pacs / ("photo", "sketch")[k // 2] / ("ant", "bee")[k % 2], 5, seed=40 + k)
    for scenario, data, *more in (
        ("image_folder", pets, "--n_experiences=5"),
        ("image_tasks", tasks),
    ):
        common = (f"--scenario={scenario}", f"--data={data}", "--limit=2")
        benchmark = from_command_line(*common, *more)
        assert {count.total() for count in per_class(benchmark)} == {2}
    benchmark = from_command_line("--scenario=domains", f"--data={pacs}", "--limit=4")
    assert per_class(benchmark) == [{"ant": 2, "bee": 2}] * 2


def test_limited_rows_are_those_of_the_labels():
    rows = limit_rows([[1, 0, 1, 2, 1], [2, 1, 0]], [[0, 1], [2]], ["a", "b", "c"], 2, seed=3)
    assert len(rows[0]) == 3
    assert {1, 3} < set(rows[0])
    assert rows[1] == [0, 1, 2]


def test_a_run_without_a_limit_has_the_configuration_it_had():
    images = {"scenario": "image_folder", "data": "d"}
    assert "limit" not in resolve_config("SeqLoRA", 0, RunSettings(**images))
    assert resolve_config("SeqLoRA", 0, RunSettings(**images, limit=3))["limit"] == 3
