"""Rows of other packages."""

import logging
from importlib.metadata import EntryPoint

import pytest

from treelora_avalanche.registry import METHODS, Method, RegistrationError
from treelora_avalanche.registry.entry_points import Registry, load_object

ROW = Method("avalanche.training:Naive", "a row of somebody else's")


def registry(monkeypatch, **values):
    """A table with one row of its own, and entry points by name and value."""
    points = [EntryPoint(name, value, "group") for name, value in values.items()]
    monkeypatch.setattr(
        "treelora_avalanche.registry.entry_points.entry_points", lambda group: points
    )
    return Registry("method", "group", Method, {"Own": METHODS["SeqLoRA"]})


def test_rows_of_others_follow_our_own(monkeypatch):
    rows = registry(monkeypatch, Theirs=f"{__name__}:ROW")
    monkeypatch.setattr(EntryPoint, "load", lambda self: ROW)
    assert list(rows) == ["Own", "Theirs"]
    assert len(rows) == 2
    assert "Theirs" in rows
    assert rows["Theirs"] is ROW
    assert dict(rows.loadable()) == {"Own": METHODS["SeqLoRA"], "Theirs": ROW}


def test_nothing_is_imported_before_it_is_used(monkeypatch):
    def load(self):
        raise AssertionError("imported")

    monkeypatch.setattr(EntryPoint, "load", load)
    rows = registry(monkeypatch, Theirs="their_package:ROW")
    assert list(rows) == ["Own", "Theirs"]
    assert rows["Own"] is METHODS["SeqLoRA"]


def test_a_fault_costs_its_own_row_alone(monkeypatch, caplog):
    rows = registry(monkeypatch, Broken="no_such_package:ROW")
    with caplog.at_level(logging.WARNING):
        assert [name for name, _ in rows.loadable()] == ["Own"]
    (record,) = caplog.records
    assert "Broken" in record.getMessage()
    with pytest.raises(RegistrationError, match="Broken of the package no_such_package cannot be"):
        rows["Broken"]


def test_another_kind_of_object_is_refused(monkeypatch):
    rows = registry(monkeypatch, Strange="json:dumps")
    with pytest.raises(RegistrationError, match="should be a Method, but json:dumps is a function"):
        rows["Strange"]


def test_our_names_cannot_be_taken(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        rows = registry(monkeypatch, Own="json:dumps")
        assert list(rows) == ["Own"]
    assert "the other one is ignored" in caplog.text
    assert rows["Own"] is METHODS["SeqLoRA"]


def test_unknown_names_have_the_nearest_match(monkeypatch):
    with pytest.raises(ValueError, match="Did you mean 'Own'"):
        registry(monkeypatch)["Owm"]


@pytest.mark.parametrize("path", ["no_such_package:x", "json:no_such_name"])
def test_what_cannot_be_imported_is_one_line(path):
    with pytest.raises(RegistrationError, match=f"{path} cannot be imported"):
        load_object(path)
    assert load_object("json:dumps").__name__ == "dumps"
