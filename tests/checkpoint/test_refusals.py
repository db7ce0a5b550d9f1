"""States that are refused: when saving is impossible, and when loading would not fit."""

import json
from pathlib import Path

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import LwFPlugin
from avalanche.training.supervised import Naive
from saved_streams import fresh, make, outcome, train

import support
from support import identical
from treelora_avalanche.checkpoint import save_strategy
from treelora_avalanche.state import (
    TENSOR_FILE,
    VALUE_FILE,
    clone_state,
    load_state,
    save_state,
)
from treelora_avalanche.strategies import SeqLoRA

pytestmark = [
    pytest.mark.filterwarnings("ignore:No loggers specified"),
    pytest.mark.filterwarnings("ignore:Avalanche is transitioning"),
]


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
    with pytest.raises(RuntimeError, match=r"was interrupted.*Save when"):
        strategy.save("state")
    strategy.load("state")  # back to before the interrupted experience
    assert identical(outcome(strategy), before)


def test_a_plugin_that_cannot_be_saved_is_named(tiny_vit, tmp_path):
    strategy = make("SeqLoRA", tiny_vit(), plugins=[LwFPlugin(), SupervisedPlugin()])
    with pytest.raises(
        TypeError, match="should have `state_dict` and `load_state_dict`, but LwFPlugin do not"
    ):
        strategy.save(tmp_path / "state")
    assert not list(tmp_path.iterdir())


def rewrite(folder, change):
    state = load_state(folder)
    change(state)
    save_state(folder, state)


def refuse(strategy, folder, message, error=ValueError):
    before = outcome(strategy)
    optimized, groups = strategy.optimized_param_id, strategy.optimizer.param_groups
    with pytest.raises(error, match=message):
        strategy.load(folder)
    assert identical(outcome(strategy), before)
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
        "strategy should be OGD, as in the state, but is TreeLoRAStrategy": lambda s: s.update(
            strategy="OGD"
        ),
        "backbone should be that of the state, but has other weights": lambda s: s[
            "backbone"
        ].update(values="0" * 64),
        "backbone should be that of the state, but has other layers": lambda s: s[
            "backbone"
        ].update(structure="0" * 64),
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
        "bank should have 2 adapters, as the tree of the state, but has 1": (
            lambda s: s["plugins"]["TreeBuilderPlugin.0"]["bank"].update(
                factors=s["plugins"]["TreeBuilderPlugin.0"]["bank"]["factors"][:1]
            )
        ),
        "is not a tree": (
            lambda s: s["plugins"]["TreeBuilderPlugin.0"]["tree"].update(root={"left": [0]})
        ),
        "`tree_lambda` should be 0.7, as in the state, but is 0.5": (
            lambda s: s["plugins"]["SparseUpdatePlugin.0"].update(tree_lambda=0.7)
        ),
        "`seed` of LCBSelectorPlugin should be 5, as in the state, but is 0": (
            lambda s: s["plugins"]["LCBSelectorPlugin.0"].update(seed=5)
        ),
        "AccuracyMatrix.0.*lacks the key 'trained'": (
            lambda s: s["metrics"]["AccuracyMatrix.0"].pop("trained")
        ),
        "optimizer should be SGD, as in the state, but is Adam": (
            lambda s: s["optimizer"]["state"].update({"class": "SGD"})
        ),
        "should have 2 parameter groups, as in the state, but has 1": (
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
    assert identical(clone_state(strategy.state_dict()), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, r"lora_A.default.weight is \(10, 16\).*in the state and \(4, 16\)"),
        ({"layers": "last:1"}, "blocks.0.attn.qkv.lora_A.*missing here.*same rank, layers"),
        ({"target_modules": ["attn.proj"]}, "do not fit.*and 9 more.*target_modules"),
        (
            {"max_adapters": 3},
            "`max_adapters` of the tree should be None, as .*, but is 3",
        ),
        ({"depth": 2}, "`depth` of the tree should be None, as in the state, but is 2"),
        ({"selection": "nearest"}, "'NearestSelectorPlugin.0'.*unknown key 'LCBSelectorPlugin.0'"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, "the optimizer should be Adam"),
        ({"evaluator": None}, "list of metrics has the unknown keys"),
    ],
)
def test_a_strategy_built_otherwise_is_refused_by_the_first_difference(
    tiny_vit, saved, options, message
):
    _, folder = saved
    strategy = fresh("lcb", tiny_vit, **{"train_epochs": 1, **options})
    before = clone_state(strategy.state_dict())
    with pytest.raises(ValueError, match=f"(?s)state in .* cannot be loaded: .*{message}"):
        strategy.load(folder)
    assert identical(clone_state(strategy.state_dict()), before)


def test_another_method_backbone_or_head_is_refused(tiny_vit, saved):
    _, folder = saved
    refuse(
        fresh("SeqLoRA", tiny_vit),
        folder,
        "should be TreeLoRAStrategy, as in the state, but is SeqLoRA",
    )
    model = tiny_vit()
    model.reset_classifier(4)
    refuse(make("lcb", model), folder, r"\(6, 16\).*\(4, 16\).*number of classes")
    refuse(
        make("lcb", tiny_vit(depth=4)),
        folder,
        "backbone should be that of the state, but has other layers",
    )
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] += 1e-3
    refuse(
        make("lcb", model), folder, "backbone should be that of the state, but has other weights"
    )


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
        refuse(strategy, folder, f"should have format version 1, but has {version!r}")
    (folder / VALUE_FILE).write_text("[]")
    refuse(strategy, folder, "should have format version 1, but has None")


def test_another_strength_of_a_built_in_plugin_is_refused(tiny_vit, tmp_path):
    make("EWC online", tiny_vit()).save(tmp_path / "state")
    strategy = fresh("EWC online", tiny_vit, ewc_lambda=7.0)
    refuse(
        strategy,
        tmp_path / "state",
        "`ewc_lambda` of SampleFisherEWCPlugin should be 5.0, as in the state, but is 7.0",
    )


def test_other_library_versions_are_logged(tiny_vit, saved, caplog):
    _, folder = saved
    strategy = fresh("lcb", tiny_vit, train_epochs=1)
    caplog.set_level("WARNING")
    strategy.load(folder)
    assert not caplog.records
    rewrite(folder, lambda s: s["versions"].update(torch="1.0"))
    strategy.load(folder)
    assert "saved with torch 1.0" in caplog.text


def test_a_learning_rate_that_the_state_overrules_is_logged(
    tiny_vit, tiny_benchmark, tmp_path, caplog
):
    caplog.set_level("WARNING")
    for schedule in ("constant", "cosine"):
        saved = support.make(SeqLoRA, tiny_vit(), lr=0.01, schedule=schedule, train_epochs=1)
        train(saved, tiny_benchmark, 0)
        saved.save(tmp_path / schedule)
        caplog.clear()
        support.make(SeqLoRA, tiny_vit(), lr=0.01, schedule=schedule).load(tmp_path / schedule)
        assert not caplog.records
        loaded = support.make(SeqLoRA, tiny_vit(), lr=0.5, schedule=schedule)
        loaded.load(tmp_path / schedule)
        assert "lr=0.01 and not 0.5" in caplog.text
        assert [group["lr"] for group in loaded.optimizer.param_groups] == [0.01]


@pytest.mark.parametrize("kind", ["ours", "avalanche's"])
def test_weights_that_are_no_numbers_are_not_saved(kind, tiny_vit, tiny_benchmark, tmp_path):
    if kind == "ours":
        strategy = support.make(SeqLoRA, tiny_vit(), train_epochs=1)
        support.train(strategy, tiny_benchmark, 0)
    else:
        model = tiny_vit()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        strategy = Naive(model=model, optimizer=optimizer, train_mb_size=8, evaluator=None)
        strategy.train(tiny_benchmark.train_stream[0])
    save_strategy(strategy, tmp_path / "state")
    before = load_state(tmp_path / "state")
    name, parameter = next((n, p) for n, p in strategy.model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    with pytest.raises(
        ValueError, match=r"should be numbers to be saved, but .* hold NaN"
    ) as error:
        save_strategy(strategy, tmp_path / "state")
    assert name.removeprefix("module.") in str(error.value)
    assert identical(load_state(tmp_path / "state"), before), "the last state is kept"
