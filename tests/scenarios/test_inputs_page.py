"""The table of inputs in the documentation: every test that it names exists."""

import re

import pytest


@pytest.fixture
def sections(repository):
    return (repository / "docs" / "inputs.md").read_text(encoding="utf-8").split("\n## ")[1:]


def test_named_tests_exist(sections, repository):
    for section in sections:
        default = re.search(r"tests in\s`(tests/[\w/]+\.py)`", section)[1]
        rows = [line for line in section.splitlines() if line.startswith("|")][2:]
        for row in rows:
            *_, tests, _ = row.split("|")
            names = re.findall(r"`(test_\w+)`", tests)
            other = re.search(r"\(`(tests/[\w/]+\.py)`\)", tests)
            source = (repository / (other[1] if other else default)).read_text(encoding="utf-8")
            assert names, row
            assert [name for name in names if f"def {name}(" not in source] == []
