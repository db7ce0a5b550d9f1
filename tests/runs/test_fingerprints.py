"""Fingerprints of data, weights and code."""

import os
import sys

import pytest

from treelora_avalanche.registry import RunSettings
from treelora_avalanche.runs import fingerprints, resolve_config
from treelora_avalanche.runs.fingerprints import SAMPLED_BYTES, of_code, of_files


@pytest.fixture
def folder(tmp_path):
    for name, content in (("a/1", b"one"), ("a/2", b"two"), ("b/1", b"six")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "data"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a/1").write_bytes(b"ten"),
        lambda folder: (folder / "a/1").write_bytes(b"three"),
        lambda folder: (folder / "a/1").rename(folder / "a/3"),
        lambda folder: (folder / "a/1").unlink(),
        lambda folder: (folder / "c").write_bytes(b""),
    ],
)
def test_any_change_of_the_files_changes_it(folder, change):
    before = of_files(folder)
    assert of_files(folder) == before
    change(folder)
    assert of_files(folder) != before


def test_it_depends_on_content_alone(folder, tmp_path):
    before = of_files(folder)
    os.utime(folder / "a/1", (0, 0))
    folder.rename(tmp_path / "elsewhere")
    assert of_files(tmp_path / "elsewhere") == before


def test_both_ends_of_a_large_file_count(tmp_path):
    file = tmp_path / "weights"
    content = bytearray(3 * SAMPLED_BYTES)
    seen = set()
    for place in (0, len(content) - 1):
        file.write_bytes(content)
        seen.add(of_files(file))
        content[place] = 1
    file.write_bytes(content)
    assert len({*seen, of_files(file)}) == 3


def test_comments_and_docstrings_are_no_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def fingerprint(source):
        (tmp_path / "some_module.py").write_text(source)
        of_code.cache_clear()
        sys.modules.pop("some_module", None)
        return of_code("some_module")

    plain = fingerprint("def f(x):\n    return x\n")
    assert fingerprint('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x  # why\n') == plain
    assert fingerprint("def f(x):\n    return -x\n") != plain
    of_code.cache_clear()


def test_a_run_has_those_of_its_inputs(folder, tmp_path):
    settings = RunSettings(scenario="image_folder", data=str(folder), model="vit_tiny_patch16_224")
    config = resolve_config("SeqLoRA", 0, settings)
    known = {}
    assert set(fingerprints(config, known)) == {"data", "code"}
    assert fingerprints(config)["data"] == of_files(folder)
    assert known == {folder.resolve(): of_files(folder)}
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"w")
    found = fingerprints({**config, "checkpoint": str(weights)})
    assert found["checkpoint"] == of_files(weights)
    assert set(fingerprints(resolve_config("Naive", 0, RunSettings()))) == {"code"}
