"""peft's OSF as a continual method: subspaces by hand, weights that go on from task to task."""

from functools import partial

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

from support import make, plugin_of, same, train, weights
from treelora_avalanche.adapters import add_lora
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.models import LanguageModel
from treelora_avalanche.runs.monitors import training_in_words
from treelora_avalanche.strategies import OSF, SDLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

LAYERS = [f"blocks.{i}.attn.qkv" for i in (0, 1)]


def values(model, names):
    return [model.get_submodule(name).weight.detach().clone() for name in names]


def test_the_largest_directions_of_every_task_stay_as_they_are(tiny_vit, tiny_benchmark):
    model = tiny_vit()
    # Plain SGD: Adam rescales each coordinate of a projected gradient.
    sgd = partial(torch.optim.SGD, lr=0.1)
    strategy = make(OSF, model, layers=[0, 1], optimizer=sgd)
    assert {n for n, _ in strategy.model.named_parameters()} == {
        *(f"module.{name}.weight" for name in LAYERS),
        "module.head.weight",
        "module.head.bias",
    }
    before = values(model, LAYERS)
    for task, preserved in enumerate((1, 5, 10)):  # of 16, at least 1: 0, 1/3, 2/3
        train(strategy, tiny_benchmark, task)
        after = values(model, LAYERS)
        for old, new in zip(before, after, strict=True):
            u, _, v = torch.linalg.svd(old, full_matrices=False)
            change = u.T @ (new - old) @ v.T  # in the basis of the old weight
            assert change[preserved:, preserved:].abs().max() > 1e-3
            assert change[:preserved].abs().max() < 1e-5
            assert change[:, :preserved].abs().max() < 1e-5
        before = after
    assert stored_bytes(strategy) == 0


def test_saved_and_loaded_it_goes_on_as_if_uninterrupted(tiny_vit, tiny_benchmark, tmp_path):
    whole = train(make(OSF, tiny_vit(), lr=0.01), tiny_benchmark, 0, 1)
    whole.save(tmp_path / "state")
    resumed = make(OSF, tiny_vit(), lr=0.01)
    resumed.load(tmp_path / "state")
    assert same(weights(whole), weights(resumed))
    for strategy in (whole, resumed):
        train(strategy, tiny_benchmark, 2)
    assert same(weights(whole), weights(resumed))


class Breaks(SupervisedPlugin):
    """Interrupts the second experience once, at its third step."""

    done = False

    def before_backward(self, strategy, *args, **kwargs):
        clock = strategy.clock
        if clock.train_exp_counter == 1 and clock.train_exp_iterations == 2 and not self.done:
            self.done = True
            raise KeyboardInterrupt

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("strategy_class", [OSF, SDLoRA])
def test_an_interrupted_experience_is_trained_again_or_abandoned(
    tiny_vit, tiny_benchmark, tmp_path, strategy_class
):
    strategy = train(make(strategy_class, tiny_vit(), plugins=[Breaks()]), tiny_benchmark, 0)
    names = weights(strategy).keys()
    strategy.save(tmp_path / "state")
    whole = weights(train(make(strategy_class, tiny_vit()), tiny_benchmark, 0, 1))
    with pytest.raises(KeyboardInterrupt):
        train(strategy, tiny_benchmark, 1)
    assert weights(strategy).keys() != names
    strategy.load(tmp_path / "state")
    assert same(weights(train(strategy, tiny_benchmark, 1)), whole)
    plugin_of(strategy, Breaks).done = False
    strategy.clock.train_exp_counter = 1
    with pytest.raises(KeyboardInterrupt):
        train(strategy, tiny_benchmark, 2)
    assert weights(train(strategy, tiny_benchmark, 2)).keys() == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_model_trains_the_named_layers_in_float32(make_language_model, tiny_texts, dtype):
    model = make_language_model()
    model.network.to(dtype)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    targets = ["q_proj", "mlp"]
    strategy = make(OSF, model, lr=0.01, target_modules=targets, layers="last:1", precision="bf16")
    words = training_in_words(strategy, {"lr": 0.01, "batch_size": 8, "layers": "last:1"}, [2])
    n_weights = 16 * 16 + 3 * 16 * 24
    assert words == f"trains {n_weights:,} weights; learning rate 0.01; batches of 8; epochs 2"
    train(strategy, tiny_texts, 0, 1)
    trained = {n.removeprefix("module."): p for n, p in strategy.model.named_parameters()}
    parts = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert set(trained) == {f"network.model.layers.1.{part}.weight" for part in parts}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, frozen[name].to(parameter.dtype)) == (name not in trained)
        assert parameter.dtype == (torch.float32 if name in trained else dtype)
    assert isinstance(model, LanguageModel)
    assert len(model.generate(["zoo 1 animal:"], max_new_tokens=2)) == 1


def test_models_that_it_cannot_train_are_refused(tiny_vit):
    with pytest.raises(ValueError, match="should carry no LoRA for OSF"):
        OSF(add_lora(tiny_vit()))
