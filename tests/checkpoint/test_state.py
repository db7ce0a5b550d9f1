"""State: its files, the objects that have it, and streams that go on as if uninterrupted."""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from avalanche.checkpointing import save_checkpoint
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    forward_transfer_metrics,
)
from avalanche.training.plugins import EvaluationPlugin, LwFPlugin
from avalanche.training.supervised import Naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from treelora_avalanche.adapters import AdapterBank, LoRAFactors, TrainableView, add_lora
from treelora_avalanche.bandit import LCBSearch
from treelora_avalanche.checkpoint import load_strategy, save_strategy
from treelora_avalanche.metrics import AccuracyMatrix, continual_metrics
from treelora_avalanche.plugins import (
    FiniteLossPlugin,
    RandomSelectorPlugin,
    SparseUpdatePlugin,
    TreeBuilderPlugin,
)
from treelora_avalanche.state import (
    TENSOR_FILE,
    VALUE_FILE,
    backbone_fingerprint,
    clone_state,
    has_state,
    load_state,
    random_state,
    save_state,
    set_random_state,
)
from treelora_avalanche.strategies import (
    L2P,
    DualPrompt,
    EWCLoRA,
    GEMLoRA,
    HiDeLoRA,
    HiDePrompt,
    SeqLoRA,
    TreeLoRAStrategy,
)
from treelora_avalanche.tree import AdapterTree

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore:Avalanche is transitioning"),
]

CHILD = "TREELORA_TEST_RESUME_FOLDER"
VARIANTS = {
    "SeqLoRA": (SeqLoRA, {}),
    "lcb": (TreeLoRAStrategy, {"selection": "lcb"}),
    "nearest": (TreeLoRAStrategy, {"selection": "nearest"}),
    "random": (TreeLoRAStrategy, {"selection": "random"}),
    "merging": (TreeLoRAStrategy, {"selection": "lcb", "max_adapters": 1}),
    "task-adaptive head": (TreeLoRAStrategy, {"head": "task_adaptive"}),
    "last": (TreeLoRAStrategy, {"head": "task_adaptive", "inference": "last"}),
    "routed": (TreeLoRAStrategy, {"head": "task_adaptive", "inference": "routed"}),
    "EWC online": (EWCLoRA, {"ewc_lambda": 5.0}),
    "EWC separate": (EWCLoRA, {"mode": "separate"}),
    "GEM": (GEMLoRA, {"patterns_per_experience": 5}),
    "L2P": (L2P, {}),
    "DualPrompt": (
        DualPrompt,
        {"general_layers": [0], "expert_layers": [1, 2], "head": "task_adaptive"},
    ),
    "HiDePrompt": (HiDePrompt, {"prompt_layers": [0, 1]}),
    "HiDeLoRA": (HiDeLoRA, {}),
    "SGD": (SeqLoRA, {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)}),
}
# The methods that are continued in a new process too, which is slow to start.
IN_NEW_PROCESS = (
    *("SeqLoRA", "lcb", "nearest", "random", "merging"),
    *("L2P", "DualPrompt", "HiDePrompt", "HiDeLoRA"),
)


def same(a, b):
    """Bit for bit, so NaN is NaN and 0.0 is not -0.0."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = a.detach().cpu().contiguous().flatten(), b.detach().cpu().contiguous().flatten()
        equal = bits[0].numpy().tobytes() == bits[1].numpy().tobytes()
        return a.dtype == b.dtype and a.shape == b.shape and equal
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and a == b


class Picks(SupervisedPlugin):
    """Writes down what the selector picks; draws from all generators, as an augmentation would."""

    def __init__(self):
        super().__init__()
        self.picks = []

    def after_training_iteration(self, strategy, **kwargs):
        random.gauss(0, 1)
        np.random.randn()
        selector = getattr(strategy, "selector", None)
        if selector is not None and selector.picks is not None:
            self.picks.append(selector.picks.tolist())

    def state_dict(self):
        return {"picks": self.picks}

    def load_state_dict(self, state):
        self.picks = list(state["picks"])


def make(variant, model, seed=1, **options):
    strategy_class, own = VARIANTS[variant]
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)
    evaluator = EvaluationPlugin(
        continual_metrics(),
        accuracy_metrics(experience=True),
        forgetting_metrics(experience=True, stream=True),
        bwt_metrics(experience=True, stream=True),
        forward_transfer_metrics(experience=True, stream=True),
        loggers=[],
    )
    options = {"train_epochs": 2, "evaluator": evaluator, **own, **options}
    return strategy_class(
        model,
        plugins=[Picks(), *options.pop("plugins", ())],
        train_mb_size=8,
        eval_every=0,
        **options,
    )


def train(strategy, benchmark, *experiences):
    for index in experiences:
        # Evaluates before and after, which the metrics of forward transfer need.
        strategy.train(benchmark.train_stream[index], eval_streams=[benchmark.test_stream])
        results = strategy.eval(benchmark.test_stream)
    return results


def outcome(strategy):
    state = clone_state(strategy.state_dict())
    state["matrix"] = strategy.evaluator.metrics[0].matrix()
    return state


def fresh(variant, tiny_vit, **options):
    """A strategy as in a new process: other random factors, another random head."""
    model = tiny_vit()
    nn.init.normal_(model.head.weight)
    return make(variant, model, seed=99, **options)


@pytest.fixture
def saved(tiny_vit, tiny_benchmark, tmp_path):
    """A TreeLoRA strategy of two tasks, and the folder where it was saved."""
    strategy = make("lcb", tiny_vit(), train_epochs=1)
    train(strategy, tiny_benchmark, 0, 1)
    strategy.save(tmp_path / "state")
    return strategy, tmp_path / "state"


# ------------------------------------------------------------------ the stream goes on, bit for bit


@pytest.mark.parametrize("variant", VARIANTS)
def test_continued_stream_equals_the_uninterrupted_one(tiny_vit, tiny_benchmark, tmp_path, variant):
    whole = make(variant, tiny_vit())
    train(whole, tiny_benchmark, 0, 1)
    whole.save(tmp_path / "state")
    expected = train(whole, tiny_benchmark, 2)

    resumed = fresh(variant, tiny_vit)
    resumed.load(tmp_path / "state")
    assert resumed.clock.train_exp_counter == 2
    results = train(resumed, tiny_benchmark, 2)
    assert same(outcome(resumed), outcome(whole))
    assert outcome(whole)["matrix"].shape == (3, 3)
    picks = outcome(whole)["plugins"]["Picks.0"]["picks"]
    assert len(picks) == (16 if VARIANTS[variant][0] is TreeLoRAStrategy else 0)
    assert "StreamForgetting/eval_phase/test_stream" in results
    assert results == {name: expected[name] for name in results}


def test_three_plugins_share_the_loaded_tree_and_bank(tiny_vit, saved):
    strategy, folder = saved
    resumed = fresh("lcb", tiny_vit, train_epochs=1)
    tree, bank = resumed.tree, resumed.bank
    resumed.load(folder)
    builder, selector, update = (
        p for p in resumed.plugins if hasattr(p, "tree") or hasattr(p, "bank")
    )
    assert resumed.tree is tree is builder.tree is selector.tree
    assert resumed.bank is bank is builder.bank is update.bank
    assert tree.tasks == strategy.tree.tasks == [[0], [1]]
    assert torch.equal(bank.factors, strategy.bank.factors)


@pytest.mark.skipif(CHILD not in os.environ, reason="run by the test below, in a new process")
def test_in_the_new_process(tiny_vit, tiny_benchmark):
    root = Path(os.environ[CHILD])
    for variant in IN_NEW_PROCESS:
        resumed = fresh(variant, tiny_vit)
        resumed.load(root / variant)
        train(resumed, tiny_benchmark, 2)
        save_state(root / f"{variant}-outcome", outcome(resumed))


def test_a_new_process_continues_the_stream(tiny_vit, tiny_benchmark, tmp_path):
    expected = {}
    for variant in IN_NEW_PROCESS:
        whole = make(variant, tiny_vit())
        train(whole, tiny_benchmark, 0, 1)
        whole.save(tmp_path / variant)
        train(whole, tiny_benchmark, 2)
        expected[variant] = outcome(whole)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    child = subprocess.run(
        [*command, f"{__file__}::test_in_the_new_process"],
        env={**os.environ, CHILD: str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    for variant, state in expected.items():
        assert same(load_state(tmp_path / f"{variant}-outcome"), state), variant


def test_avalanches_own_strategies_go_on_too(tiny_benchmark, tmp_path):
    def build():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
        # Only some parameters: Avalanche adds the rest at the first experience.
        optimizer = torch.optim.Adam(model[3].parameters(), lr=0.01)
        return Naive(
            model=model,
            optimizer=optimizer,
            train_mb_size=8,
            evaluator=None,
            plugins=[FiniteLossPlugin()],
        )

    whole = build()
    whole.train(tiny_benchmark.train_stream[0])
    save_strategy(whole, tmp_path / "state")
    whole.train(tiny_benchmark.train_stream[1])
    resumed = build()
    load_strategy(resumed, tmp_path / "state")
    resumed.train(tiny_benchmark.train_stream[1])
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_saving_before_any_training(tiny_vit, tiny_benchmark, tmp_path):
    whole = make("lcb", tiny_vit(), train_epochs=1)
    whole.save(tmp_path / "state")
    train(whole, tiny_benchmark, 0)
    resumed = fresh("lcb", tiny_vit, train_epochs=1)
    resumed.load(tmp_path / "state")
    train(resumed, tiny_benchmark, 0)
    assert same(outcome(resumed), outcome(whole))


def test_saving_changes_nothing(tiny_vit, tiny_benchmark, tmp_path):
    def run(save):
        strategy = make("merging", tiny_vit(), train_epochs=1)
        for index in range(2):
            train(strategy, tiny_benchmark, index)
            if save:
                strategy.save(tmp_path / "state")
        return outcome(strategy)

    assert same(run(save=True), run(save=False))


def test_frozen_weights_are_not_saved_and_nothing_is_pickled(saved):
    _, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == [VALUE_FILE, TENSOR_FILE]
    names = safetensors.torch.load_file(folder / TENSOR_FILE)
    parameters = [name for name in names if name.startswith("model/parameters/")]
    assert len(parameters) == 3 * 2 + 2
    assert all("lora_" in name or "modules_to_save" in name for name in parameters)
    document = json.loads((folder / VALUE_FILE).read_text())
    assert document["format_version"] == 1
    assert document["state"]["strategy"] == "TreeLoRAStrategy"
    assert document["state"]["versions"]["torch"] == torch.__version__.split("+")[0]


# ---------------------------------------------------------------------- when it must not be saved


class Interrupts(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.error = None

    def before_backward(self, strategy, **kwargs):
        if strategy.clock.train_exp_counter == 1:
            with pytest.raises(RuntimeError, match="experience 1 is being trained") as caught:
                strategy.save("never")
            self.error = caught
            raise KeyboardInterrupt

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_the_middle_of_an_experience_cannot_be_saved(
    tiny_vit, tiny_benchmark, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    strategy = make("lcb", tiny_vit(), plugins=[Interrupts()])
    train(strategy, tiny_benchmark, 0)
    strategy.save("state")
    before = outcome(strategy)
    with pytest.raises(KeyboardInterrupt):
        train(strategy, tiny_benchmark, 1)
    assert not Path("never").exists()
    with pytest.raises(RuntimeError, match=r"was interrupted.*save when"):
        strategy.save("state")
    strategy.load("state")  # back to before the interrupted experience
    assert same(outcome(strategy), before)


def test_a_plugin_that_cannot_be_saved_is_named(tiny_vit, tmp_path):
    strategy = make("SeqLoRA", tiny_vit(), plugins=[LwFPlugin(), SupervisedPlugin()])
    with pytest.raises(TypeError, match="the plugins LwFPlugin have no `state_dict`"):
        strategy.save(tmp_path / "state")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- bad input


def rewrite(folder, change):
    state = load_state(folder)
    change(state)
    save_state(folder, state)


def refuse(strategy, folder, message, error=ValueError):
    before = outcome(strategy)
    optimized, groups = strategy.optimized_param_id, strategy.optimizer.param_groups
    with pytest.raises(error, match=message):
        strategy.load(folder)
    assert same(outcome(strategy), before)
    assert strategy.optimized_param_id is optimized
    assert strategy.optimizer.param_groups is groups


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_a_state_that_does_not_fit_is_refused_and_the_strategy_stays(
    tiny_vit, tiny_benchmark, saved, tmp_path, trained
):
    _, folder = saved
    strategy = fresh("lcb", tiny_vit, train_epochs=1)
    if trained:
        train(strategy, tiny_benchmark, 2)
    lora = "module.base_model.model.blocks.0.attn.qkv.lora_A.default.weight"
    cases = {
        "lacks the key 'clock'": lambda s: s.pop("clock"),
        "has the unknown key 'extra'": lambda s: s.update(extra=1),
        "checkpoint of another method: OGD": lambda s: s.update(strategy="OGD"),
        "another backbone, with other weights": lambda s: s["backbone"].update(values="0" * 64),
        "another backbone, with other layers": lambda s: s["backbone"].update(structure="0" * 64),
        rf"{lora} is missing in the state and \(10, 16\)": (
            lambda s: s["model"]["parameters"].pop(lora)
        ),
        r"new is \(1,\) float32 in the state and missing here": (
            lambda s: s["model"]["parameters"].update(new=torch.zeros(1))
        ),
        "list of plugins lacks the key 'TreeBuilderPlugin.0'": (
            lambda s: s["plugins"].pop("TreeBuilderPlugin.0")
        ),
        "list of metrics has the unknown key 'AccuracyMatrix.7'": (
            lambda s: s["metrics"].update({"AccuracyMatrix.7": {}})
        ),
        "TreeBuilderPlugin.0.*lacks the key 'bank'": (
            lambda s: s["plugins"]["TreeBuilderPlugin.0"].pop("bank")
        ),
        "2 adapters in the tree and 1 in the bank": (
            lambda s: s["plugins"]["TreeBuilderPlugin.0"]["bank"].update(
                factors=s["plugins"]["TreeBuilderPlugin.0"]["bank"]["factors"][:1]
            )
        ),
        "is not a tree": (
            lambda s: s["plugins"]["TreeBuilderPlugin.0"]["tree"].update(root={"left": [0]})
        ),
        "`tree_lambda` is 0.7 in the state, and 0.5 here": (
            lambda s: s["plugins"]["SparseUpdatePlugin.0"].update(tree_lambda=0.7)
        ),
        "has the seed 5, and this one has 0": (
            lambda s: s["plugins"]["LCBSelectorPlugin.0"].update(seed=5)
        ),
        "AccuracyMatrix.0.*lacks the key 'trained'": (
            lambda s: s["metrics"]["AccuracyMatrix.0"].pop("trained")
        ),
        "optimizer SGD, and this strategy has Adam": (
            lambda s: s["optimizer"]["state"].update({"class": "SGD"})
        ),
        "2 parameter groups in the state, and 1 here": (
            lambda s: s["optimizer"]["state"]["groups"].append({})
        ),
        "random state of numpy lacks the key 'keys'": lambda s: s["random"]["numpy"].pop("keys"),
        r"tensors of the random state do not fit: torch is \(3,\) uint8": (
            lambda s: s["random"].update(torch=torch.zeros(3, dtype=torch.uint8))
        ),
    }
    whole = load_state(folder)
    for message, change in cases.items():
        state = clone_state(whole)
        change(state)
        other = tmp_path / "altered"
        save_state(other, state)
        refuse(strategy, other, message)
    strategy.load(folder)
    assert same(clone_state(strategy.state_dict()), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, r"lora_A.default.weight is \(10, 16\).*in the state and \(4, 16\)"),
        ({"layers": "last:1"}, "blocks.0.attn.qkv.lora_A.*missing here.*same rank, layers"),
        ({"target_modules": ["attn.proj"]}, "do not fit.*and 9 more.*target_modules"),
        ({"max_adapters": 3}, "`max_adapters` of the tree is None in the state and 3 here"),
        ({"depth": 2}, "`depth` of the tree is None in the state and 2 here"),
        ({"selection": "nearest"}, "'NearestSelectorPlugin.0'.*unknown key 'LCBSelectorPlugin.0'"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, "the optimizer Adam"),
        ({"evaluator": None}, "list of metrics has the unknown keys"),
    ],
)
def test_a_strategy_built_otherwise_is_told_what_differs(tiny_vit, saved, options, message):
    _, folder = saved
    strategy = fresh("lcb", tiny_vit, **{"train_epochs": 1, **options})
    before = clone_state(strategy.state_dict())
    with pytest.raises(ValueError, match=f"(?s)state in .* cannot be loaded: .*{message}"):
        strategy.load(folder)
    assert same(clone_state(strategy.state_dict()), before)


def test_another_method_backbone_or_head_is_refused(tiny_vit, saved):
    _, folder = saved
    refuse(fresh("SeqLoRA", tiny_vit), folder, "TreeLoRAStrategy was saved, and this is SeqLoRA")
    model = tiny_vit()
    model.reset_classifier(4)
    refuse(make("lcb", model), folder, r"\(6, 16\).*\(4, 16\).*number of classes")
    refuse(make("lcb", tiny_vit(depth=4)), folder, "another backbone, with other layers")
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] += 1e-3
    refuse(make("lcb", model), folder, "another backbone, with other weights")


def test_a_late_refusal_undoes_what_was_loaded_before(tiny_vit, tiny_benchmark, saved):
    class Refuses(SupervisedPlugin):
        refused = False

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            if not Refuses.refused:
                Refuses.refused = True
                raise IndexError("no")

    _, folder = saved
    strategy = fresh("lcb", tiny_vit, train_epochs=1)
    train(strategy, tiny_benchmark, 2, 0, 1)
    strategy.plugins.append(Refuses())
    rewrite(folder, lambda s: s["plugins"].update({"Refuses.0": {}}))
    refuse(strategy, folder, "plugins, Refuses.0: no")
    assert Refuses.refused
    strategy.load(folder)
    assert strategy.clock.train_exp_counter == 2


@pytest.mark.parametrize("file", [TENSOR_FILE, VALUE_FILE])
def test_damaged_files_are_named(tiny_vit, saved, file):
    _, folder = saved
    strategy = fresh("lcb", tiny_vit, train_epochs=1)
    content = (folder / file).read_bytes()

    (folder / file).write_bytes(content[: len(content) // 2])
    refuse(strategy, folder, rf"{file} is truncated or altered")
    altered = bytearray(content)
    altered[len(content) // 2] ^= 1
    (folder / file).write_bytes(altered)
    refuse(strategy, folder, rf"{file} is truncated or altered")
    (folder / file).write_bytes(b"")
    refuse(strategy, folder, rf"{file} is truncated or altered")
    (folder / file).unlink()
    refuse(strategy, folder, rf"holds no state: {file} is missing", FileNotFoundError)


def test_an_unknown_format_is_named(tiny_vit, saved):
    _, folder = saved
    strategy = fresh("lcb", tiny_vit)
    document = json.loads((folder / VALUE_FILE).read_text())
    for version in (2, None, "1"):
        document["format_version"] = version
        (folder / VALUE_FILE).write_text(json.dumps(document))
        refuse(strategy, folder, f"format version {version!r}, and this release reads version 1")
    (folder / VALUE_FILE).write_text("[]")
    refuse(strategy, folder, "format version None")


def test_another_strength_of_a_built_in_plugin_is_refused(tiny_vit, tmp_path):
    make("EWC online", tiny_vit()).save(tmp_path / "state")
    strategy = fresh("EWC online", tiny_vit, ewc_lambda=7.0)
    refuse(strategy, tmp_path / "state", "`ewc_lambda` of EWCPlugin is 5.0 in the state and 7.0")


def test_other_library_versions_are_told(tiny_vit, saved, caplog):
    _, folder = saved
    strategy = fresh("lcb", tiny_vit, train_epochs=1)
    caplog.set_level("WARNING")
    strategy.load(folder)
    assert not caplog.records
    rewrite(folder, lambda s: s["versions"].update(torch="1.0"))
    strategy.load(folder)
    assert "saved with torch 1.0" in caplog.text


# ------------------------------------------------------------------------------------- the files

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
        assert same(load_state(Path(folder) / "new" / "state"), state)


def test_tensors_that_overlap_or_have_gradients():
    base = torch.arange(6.0, requires_grad=True)
    state = {"a": base, "b": base[2:], "c": base.view(2, 3).T, "d": [base[::2], nn.Parameter(base)]}
    with tempfile.TemporaryDirectory() as folder:
        save_state(folder, state)
        assert same(load_state(folder), clone_state(state))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": {1: 2}}}, r"`state\['a'\]\['b'\]` has the key 1 \(int\).*with str\(\)"),
        ({"a": [1, (2,)]}, r"`state\['a'\]\['1'\]` is a tuple.*pass a list"),
        ({"a": object()}, r"`state\['a'\]` is a object"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "cannot be saved.*complex128"),
        ({"a": torch.eye(2).to_sparse()}, "cannot be saved.*sparse"),
    ],
)
def test_what_is_no_state_is_refused(tmp_path, state, message):
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
    assert same(load_state(tmp_path / "state"), {"a": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_state_is_there_whatever_rename_was_the_last(tmp_path, monkeypatch, step):
    folder = tmp_path / "state"
    save_state(folder, {"a": 1})
    done = []
    rename = Path.replace

    def stop(self, target):
        if len(done) == step:
            raise KeyboardInterrupt  # as good as a power cut: nothing after it runs
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


def test_other_peoples_files_are_not_replaced(tmp_path):
    assert not has_state(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        save_state(tmp_path, {})
    with pytest.raises(ValueError, match="is a file"):
        save_state(tmp_path / "thesis.tex", {})
    assert (tmp_path / "thesis.tex").read_text() == "x"


# ------------------------------------------------------------------------------------- the parts


def test_fingerprint_is_of_the_frozen_weights_alone(tiny_vit):
    def fingerprint(layers="last:5", change=None, dtype=None, **options):
        model = tiny_vit(**options)
        nn.init.normal_(model.head.weight)
        if change is not None:
            change(model)
        return backbone_fingerprint(TrainableView(add_lora(model.to(dtype), layers=layers)))

    def swap(model):
        weight = model.blocks[0].mlp.fc1.weight.data
        weight[[0, 1]] = weight[[1, 0]]

    def nudge(model):
        weight = model.blocks[0].norm1.weight.data
        weight[5] = math.nextafter(weight[5], 9)
        weight[5] += 1e-6

    first = fingerprint()
    assert first == fingerprint() == fingerprint(layers=[1])
    assert first["structure"] == fingerprint(change=swap)["structure"]
    assert first["values"] != fingerprint(change=swap)["values"]
    assert first["values"] != fingerprint(change=nudge)["values"]
    assert first["structure"] != fingerprint(depth=2)["structure"]
    assert first["structure"] != fingerprint(dtype=torch.bfloat16)["structure"]
    odd = nn.Linear(3, 1).requires_grad_(False)
    assert backbone_fingerprint(odd) == backbone_fingerprint(odd)


def test_random_generators_go_back_to_where_they_were():
    def draw():
        return random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()

    draw()  # so that a second gaussian number is waiting
    with tempfile.TemporaryDirectory() as folder:
        save_state(folder, random_state())
        first = draw()
        set_random_state(load_state(folder))
    assert draw() == first


@given(n=st.integers(0, 12), max_adapters=st.sampled_from([None, 3]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_loaded_tree_grows_like_the_saved_one(n, max_adapters, seed):
    generator = torch.Generator().manual_seed(seed)
    # Of such different sizes that the order of summation shows in the last bit.
    scales = 10.0 ** -torch.randint(0, 13, (n + 6, 3, 5), generator=generator)
    signatures = torch.randn(n + 6, 3, 5, generator=generator) * scales
    tree, other = (AdapterTree(max_adapters=max_adapters) for _ in range(2))
    for signature in signatures[:n]:
        tree.insert(signature)
    other.insert(torch.ones(2, 2))  # it is replaced
    other.load_state_dict(clone_state(tree.state_dict()))
    for signature in signatures[n:]:
        assert other.insert(signature) == tree.insert(signature)
        assert same(other.state_dict(), tree.state_dict())
    assert all(map(torch.equal, tree.flatten()[:2], other.flatten()[:2]))


def test_a_loaded_search_goes_on_like_the_saved_one():
    tree = AdapterTree.build(torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)))
    noise = torch.rand(60, 2, generator=torch.Generator().manual_seed(1))
    search = LCBSearch(tree.flatten(), 2, horizon=60)
    for xi in noise[:30]:
        search.select()
        search.update(xi)
    search.select()  # in the middle of a step
    other = LCBSearch(tree.flatten(), 2, horizon=9, seed=7)
    means = other.means
    other.load_state_dict(clone_state(search.state_dict()))
    assert other.means is means
    for xi in noise[30:]:
        for each in (search, other):
            each.update(xi)
        assert torch.equal(search.select(), other.select())
    assert same(search.state_dict(), other.state_dict())

    before = clone_state(other.state_dict())
    with pytest.raises(ValueError, match="keys"):
        other.load_state_dict({})
    larger = LCBSearch(tree.flatten(), 3, horizon=9)
    with pytest.raises(ValueError, match=r"should have the shape \(2, .*Use the tree"):
        other.load_state_dict(larger.state_dict())
    state = {**search.state_dict(), "children": search.state_dict()["children"].flip(0)}
    with pytest.raises(ValueError, match="another tree"):
        other.load_state_dict(state)
    assert same(other.state_dict(), before)


def test_plugins_attached_to_a_built_in_strategy_go_on(tiny_vit, tiny_benchmark, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = TrainableView(add_lora(tiny_vit()))
        tree, bank = AdapterTree(), AdapterBank()
        selector = RandomSelectorPlugin(tree, seed=3)
        return Naive(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
            train_mb_size=8,
            evaluator=EvaluationPlugin(AccuracyMatrix(), loggers=[]),
            plugins=[
                TreeBuilderPlugin(tree, bank),
                selector,
                SparseUpdatePlugin(selector, bank, 0.3),
            ],
        )

    whole, resumed = build(0), build(1)
    for experience in tiny_benchmark.train_stream[:2]:
        whole.train(experience)
    save_strategy(whole, tmp_path / "state")
    load_strategy(resumed, tmp_path / "state")
    stacks = []
    for strategy in (whole, resumed):
        load_strategy(strategy, tmp_path / "state")  # also back into the one it came from
        strategy.train(tiny_benchmark.train_stream[2])
        stacks.append(LoRAFactors(strategy.model).stack)
    assert torch.equal(*stacks)


# ------------------------------------------------------------------------------ Avalanche's fault


def test_avalanches_own_checkpoint_fails_and_destroys_the_old_file(tmp_path):
    # When this fails, the paragraph on `save_checkpoint` in Resumable.save can go.
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Naive(model=model, optimizer=optimizer, evaluator=None)
    file = tmp_path / "checkpoint"
    file.write_text("the checkpoint of the task before")
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(strategy, file)
    assert "the checkpoint" not in file.read_text(encoding="latin1")
