"""Command line: arguments, files, messages and exit codes."""

import json
import subprocess
import sys

import pytest
import yaml

from treelora_avalanche._version import __version__
from treelora_avalanche.cli import build_parser, main
from treelora_avalanche.registry import METHODS, SCENARIOS, Family, Method

QUICK = ["--epochs", "1", "--n_experiences", "2", "--layers", "last:1", "--device", "cpu"]


@pytest.fixture
def unpretrained(monkeypatch):
    """Skips the pretraining of the digits' backbone, where accuracy is not tested."""
    from treelora_avalanche import models

    monkeypatch.setattr(models, "pretrained_digits_vit", lambda seed: models.digits_vit())


def call(*arguments):
    """Returns the exit code of ``treelora ...``."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def one_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, treelora_avalanche, treelora_avalanche.cli as cli\n"
        "try:\n"
        f"    cli.main({arguments})\n"
        "finally:\n"
        "    heavy = {'torch', 'avalanche', 'timm', 'peft', 'numpy', 'matplotlib'}\n"
        "    assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if arguments != ["--help"]:
        for option in ("--tree_lambda", "--config", "--print_config", "--seed", "--output"):
            assert option in done.stdout


def test_files_and_methods_are_checked_before_heavy_imports(tmp_path):
    (tmp_path / "model").mkdir()
    texts = ["train", "--scenario=text_tasks", f"--data={tmp_path}", f"--output={tmp_path}/run"]
    images = ["train", "--scenario=image_folder", f"--data={tmp_path}", f"--output={tmp_path}/run"]
    wrong = {
        "should hold a config.json": [*texts, f"--model={tmp_path / 'model'}"],
        "HiDePrompt is not defined": [*texts, "--model=m", "--method=HiDePrompt"],
        "nowhere is not a folder": [*texts, "--model=m", "--data=nowhere"],
        "w.pth does not exist": [*images, "--checkpoint=w.pth"],
        "SAPT is not defined": ["compare", "--methods", "SeqLoRA", "SAPT"],
    }
    code = (
        "import sys, treelora_avalanche.cli as cli\n"
        f"for arguments in {list(wrong.values())}:\n"
        "    assert cli.main(arguments) == 2\n"
        "heavy = {'torch', 'avalanche', 'timm', 'peft', 'numpy', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for message, line in zip(wrong, done.stderr.splitlines(), strict=True):
        assert message in line


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"treelora {__version__}"


def test_list(capsys):
    assert call("list") == 0
    printed = capsys.readouterr().out
    for name in [*METHODS, *SCENARIOS]:
        assert name in printed
    for kind in ("ours", "Avalanche's", "frozen", "upper bound"):
        assert kind in printed
    for line in printed.splitlines():
        if line.split()[:1] == ["FrozenNCM"]:
            assert "language" not in line
        if line.split()[:1] == ["EWCLoRA"]:
            assert "vision, language" in line


def test_list_one_kind(capsys):
    assert call("list", "scenarios") == 0
    printed = capsys.readouterr().out
    assert "o_lora_order" in printed
    assert "FrozenNCM" not in printed


@pytest.mark.usefixtures("unpretrained")
def test_compare_on_digits(tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["compare", "--methods", "SeqLoRA", "Naive", "--seeds", 0, "--output", output]
    arguments += QUICK
    assert call(*arguments) == 0
    printed = capsys.readouterr()
    assert "SeqLoRA" in printed.out
    assert "Bwt ↓" in printed.out
    assert "Traceback" not in printed.err
    assert {path.name for path in output.iterdir() if path.is_file()} == {
        "table.md",
        "comparison.json",
    }
    assert len(list((output / "figures").glob("*.png"))) == 3
    assert len(list(output.glob("*/results.json"))) == 2
    assert call(*arguments) == 0
    assert capsys.readouterr().err.count("finished before") == 2


@pytest.mark.usefixtures("unpretrained")
def test_train_accepts_the_config_of_a_run(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert call("train", "--method", "TreeLoRA", "--seed", 0, "--output", first, *QUICK) == 0
    assert str(first) in capsys.readouterr().out
    assert call("train", "--config", first / "config.yaml", "--output", second) == 0
    results = [json.loads((path / "results.json").read_text()) for path in (first, second)]
    assert results[0]["config"] == results[1]["config"]
    assert results[0]["seed"] == 0
    assert results[0]["accuracy_matrix"] == results[1]["accuracy_matrix"]
    assert call("train", "--config", first / "config.yaml", "--output", second) == 0
    assert "finished before" in capsys.readouterr().err


@pytest.mark.usefixtures("unpretrained")
def test_verbose_attaches_the_interactive_logger(tmp_path, capsys):
    arguments = ["train", "--method", "Naive", "--output", tmp_path / "run", "--verbose", *QUICK]
    assert call(*arguments) == 0
    assert "OverallPerformance/eval_phase/test_stream = " in capsys.readouterr().out


def test_printed_config_can_be_loaded(tmp_path, capsys):
    assert call("compare", "--methods", "Naive", "--layers", "[0,1]", "--print_config") == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["methods"] == ["Naive"]
    assert config["layers"] == [0, 1]
    path = tmp_path / "config.yaml"
    path.write_text(printed)
    assert call("compare", "--config", path, "--lr", "0.5", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == {**config, "lr": 0.5}


@pytest.mark.usefixtures("unpretrained")
def test_failed_run_gives_exit_code_one(tmp_path, capsys, monkeypatch):
    def build(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(
        METHODS, "Broken", Method("avalanche.training:Naive", "fails", Family(build))
    )
    output = tmp_path / "out"
    assert (
        call("compare", "--methods", "Broken", "Naive", "--seeds", 0, "--output", output, *QUICK)
        == 1
    )
    printed = capsys.readouterr()
    assert "failed  Broken, seed 0: RuntimeError: out of luck" in printed.err
    assert "1 of 2 runs failed" in printed.out
    assert "Naive" in (output / "table.md").read_text()


@pytest.mark.usefixtures("unpretrained")
def test_non_finite_loss_gives_exit_code_one(tmp_path, capsys):
    arguments = ["train", "--method", "SeqLoRA", "--lr", "1e30", "--output", tmp_path / "run"]
    assert call(*arguments, *QUICK) == 1
    message = one_line(capsys.readouterr().err)
    assert "step" in message
    assert "saved" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["trian"], "invalid choice: 'trian'"),
        (["list", "recipe"], "Did you mean 'recipes'?"),
        (["compare", "--epocs", "3"], "--epocs"),
        (["compare", "--epochs", "three"], 'Parser key "epochs"'),
        (["compare", "--epochs", "0"], "`--epochs` should be at least 1, but is 0"),
        (["train", "--rank", "0"], "`--rank` should be at least 1, but is 0"),
        (["train", "--tree_lambda=-1"], "`--tree_lambda` should be at least 0"),
        (["train", "--method", "TreLoRA"], "but is 'TreLoRA'"),
        (["train", "--method", "TreLoRA"], "Did you mean 'TreeLoRA'?"),
        (["compare", "--methods", "Naive", "naiv"], "Did you mean 'Naive'?"),
        (["compare", "--scenario", "digit"], "Did you mean 'digits'?"),
        (["compare", "--selection", "nearst"], "Did you mean 'nearest'?"),
        (["compare", "--scenario", "image_folder"], "Pass `--data FOLDER`"),
        (["compare", "--scenario", "image_folder", "--data", "nowhere"], "nowhere is not a folder"),
        (["compare", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["compare", "--device", "abacus"],
            "`--device` should be a device of torch, but is 'abacus'",
        ),
        (
            ["train", "--device", "cuda:77"],
            "`--device` should be cpu where torch sees no GPU, but is 'cuda:77'",
        ),
        (["compare", "--n_experiences", "3"], "10"),
        (["train", "--layers", "frist:2"], "frist"),
        (["train", "--target_modules", "[qkw]"], "qkw"),
        (["train", "--output", "."], "is not empty"),
        (["compare", "--methods", "Naive", "TreeLoRA", "--depth", "50"], "matrices, 5, but is 50"),
        (["compare", "--methods", "Naive", "SeqLoRA", "--layers", "frist:2"], "frist"),
        (
            ["train", "--scenario", "domains", "--data", ".", "--n_experiences", "4"],
            "does not use it",
        ),
        (["train", "--scenario", "cub200", "--data", "nowhere"], "nowhere"),
    ],
)
@pytest.mark.usefixtures("unpretrained")
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("")
    assert call(*arguments) == 2
    assert message in one_line(capsys.readouterr().err)
    # No run was started, so no results may be left.
    assert not list(tmp_path.rglob("results.json"))


def test_wrong_data_folders(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = ["compare", "--scenario", "image_folder", "--model", "deit_tiny_patch16_224"]
    output = ["--output", tmp_path / "out"]
    assert call(*arguments, "--data", empty, *output) == 2
    assert str(empty) in one_line(capsys.readouterr().err)
    (empty / "cats").mkdir()
    assert call(*arguments, "--data", empty, "--exclude_classes", "[cast]", *output) == 2
    assert "Did you mean 'cats'?" in one_line(capsys.readouterr().err)
    arguments[-1] = "deit_tny_patch16_224"
    assert call(*arguments, "--data", empty, *output) == 2
    assert "deit_tiny_patch16_224" in one_line(capsys.readouterr().err)


def test_image_folder_from_a_checkpoint(data_root, tmp_path, capsys):
    code = call(
        "compare",
        "--methods=TreeLoRA",
        "--seeds=0",
        "--scenario=image_folder",
        f"--data={data_root / 'caltech101'}",
        "--classes=[accordion,Leopards,Faces,yin_yang,anchor]",
        "--exclude_classes=[Faces]",
        "--model=deit_tiny_patch16_224",
        f"--checkpoint={data_root / 'deit_tiny_patch16_224_in1k'}",
        "--img_size=32",
        "--n_experiences=2",
        "--epochs=1",
        "--layers=last:1",
        "--device=cpu",
        f"--output={tmp_path}",
    )
    assert code == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("*/results.json")
    stream = json.loads(path.read_text())["stream"]
    names = ["accordion", "Leopards", "yin_yang", "anchor"]
    assert stream["class_names"] == names
    images = [len(list((data_root / "caltech101" / "train" / n).glob("*.jpg"))) for n in names]
    assert sum(stream["train_samples"]) == sum(images)


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--tasks", "a", "b"], ["a", "b"]),
        (["--tasks", "a"], ["a"]),
        (["--tasks", "007", "true"], ["007", "true"]),
        (["--tasks", "[a, b]"], ["a", "b"]),
        (["--tasks=[a, b]"], ["a", "b"]),
        (["--tasks", "null"], None),
        ([], None),
    ],
)
def test_names_of_a_list_with_and_without_brackets(command, given, expected):
    arguments = [command, "--data", "d", *given, "--classes", "x", "y", "--limit", "3"]
    options = build_parser().parse_args(arguments)[command]
    assert options.tasks == expected
    assert options.classes == ["x", "y"]
    assert (options.data, options.limit, options.eval_limit) == ("d", 3, None)


@pytest.mark.parametrize(("given", "expected"), [("5", 5), ("all", "all")])
def test_limit_of_test_samples(given, expected):
    options = build_parser().parse_args(["train", "--eval_limit", given]).train
    assert options.eval_limit == expected
