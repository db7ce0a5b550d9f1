"""Files of a state: every value comes back, and a folder is complete at every moment."""

import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support import identical
from treelora_avalanche.state import clone_state, has_state, load_state, save_state

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.builds(
        lambda shape, dtype, seed: torch.randint(
            0, 2, shape, generator=torch.Generator().manual_seed(seed)
        ).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64]),
        st.integers(0, 9),
    ),
)


keys = st.one_of(
    st.text(max_size=4),
    st.sampled_from(["$tensor", "$float", "$$", "a/b", "__metadata__", "\ud800"]),
)


states = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@given(states)
@settings(max_examples=60, deadline=None)
def test_a_state_comes_back_as_it_was(state):
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "new" / "state", state)
        assert identical(load_state(Path(folder) / "new" / "state"), state)


def test_tensors_that_overlap_or_have_gradients():
    base = torch.arange(6.0, requires_grad=True)
    state = {"a": base, "b": base[2:], "c": base.view(2, 3).T, "d": [base[::2], nn.Parameter(base)]}
    with tempfile.TemporaryDirectory() as folder:
        save_state(folder, state)
        assert identical(load_state(folder), clone_state(state))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a": {"b": {1: 2}}},
            r"`state\['a'\]\['b'\]` should have strings as keys, but has 1 \(int\).*with str\(\)",
        ),
        ({"a": [1, (2,)]}, r"`state\['a'\]\['1'\]` should be .* but is a tuple.*Pass a list"),
        ({"a": object()}, r"`state\['a'\]` should be .* but is a object"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "should be a dense tensor.*complex128"),
        ({"a": torch.eye(2).to_sparse()}, "should be a dense tensor.*sparse"),
    ],
)
def test_other_values_are_refused(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path / "state", state)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch):
    save_state(tmp_path / "state", {"a": torch.ones(2)})

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            save_state(tmp_path / "state", {"a": torch.zeros(2)})
    assert identical(load_state(tmp_path / "state"), {"a": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_state_is_complete_after_every_rename(tmp_path, monkeypatch, step):
    folder = tmp_path / "state"
    save_state(folder, {"a": 1})
    done = []
    rename = Path.replace

    def stop(self, target):
        if len(done) == step:
            raise KeyboardInterrupt  # like a power cut: nothing after it runs
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        if step == 1:
            with pytest.raises(KeyboardInterrupt):
                save_state(folder, {"a": 2})
        else:
            save_state(folder, {"a": 2})
    assert has_state(folder)
    assert load_state(folder) == {"a": step}
    save_state(folder, {"a": 3})
    assert load_state(folder) == {"a": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_other_files_are_not_replaced(tmp_path):
    assert not has_state(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        save_state(tmp_path, {})
    with pytest.raises(ValueError, match="is a file"):
        save_state(tmp_path / "thesis.tex", {})
    assert (tmp_path / "thesis.tex").read_text() == "x"
