"""TaSL: importance per matrix, and consolidation with the previous adapter."""

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from support import train
from treelora_avalanche.adapters import LoRAFactors
from treelora_avalanche.plugins.baselines.tasl import SMOOTHING, TaSLPlugin, new_shares, normalized
from treelora_avalanche.strategies import SeqLoRA, TaSL

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.fixture
def make(make_language_model):
    """Makes an untrained strategy."""

    def make(cls=TaSL, seed=1, **options):
        torch.manual_seed(seed)
        settings = {"rank": 4, "train_mb_size": 4, "train_epochs": 2, "evaluator": None}
        optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.02)  # noqa: E731
        return cls(make_language_model(), optimizer=optimizer, **{**settings, **options})

    return make


def tasl_of(strategy):
    return next(p for p in strategy.plugins if isinstance(p, TaSLPlugin))


def units(strategy):
    """Copies of all matrices: A and B of the first layer, of the second, ..."""
    return [p.detach().clone() for pair in LoRAFactors(strategy.model).parameters for p in pair]


class Gradients(SupervisedPlugin):
    """Records values and gradients of all matrices before every step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def before_update(self, strategy, **kwargs):
        pairs = LoRAFactors(strategy.model).parameters
        self.steps.append([(p.detach().clone(), p.grad.clone()) for pair in pairs for p in pair])


class BeforeConsolidation(SupervisedPlugin):
    """Records the plugin's inputs; it runs before the strategy's own."""

    def after_training_exp(self, strategy, **kwargs):
        tasl = tasl_of(strategy)
        self.importance = tasl.unit_importance()
        self.trained = units(strategy)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_importance_is_that_of_a_loop_over_values(make, tiny_texts, accumulation):
    """The running means written out, value by value."""
    record, before = Gradients(), BeforeConsolidation()
    strategy = make(plugins=[record, before], accumulation_steps=accumulation, train_mb_size=2)
    train(strategy, tiny_texts, 0)
    assert len(record.steps) == 2 * 4 // accumulation
    expected = []
    for unit in range(len(record.steps[0])):
        scores = []
        values = [step[unit][0].flatten().double().tolist() for step in record.steps]
        gradients = [step[unit][1].flatten().double().tolist() for step in record.steps]
        for place in range(len(values[0])):
            mean = deviation = 0.0
            for value, gradient in zip(values, gradients, strict=True):
                sensitivity = abs(value[place] * gradient[place])
                mean = SMOOTHING * mean + (1 - SMOOTHING) * sensitivity
                deviation = SMOOTHING * deviation + (1 - SMOOTHING) * abs(sensitivity - mean)
            scores.append(mean * deviation)
        expected.append(sum(scores) / len(scores))
    assert max(expected) > 0
    torch.testing.assert_close(
        before.importance, torch.tensor(expected), rtol=1e-4, atol=1e-6 * max(expected)
    )


def test_four_cases_by_hand():
    """Ten units, of which the two most important ones matter."""
    past = torch.tensor([0.9, 1.0, 0.1, 0.2, 0.3, 0.0, 0.2, 0.1, 0.4, 0.5])
    current = torch.tensor([0.1, 0.8, 1.0, 0.0, 0.2, 0.1, 0.3, 0.2, 0.1, 0.4])
    shares = new_shares(past, current, important=0.2, past_weight=0.7)
    # The first matters to the past, the second to both, the third to the new task.
    assert shares.tolist() == pytest.approx([0.0, 0.3, 1.0, *[0.5] * 7])


def test_normalized_by_hand():
    assert normalized(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert normalized(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]


def test_consolidation_by_hand(make, tiny_texts):
    """Eight matrices; at a half, four of them matter to a task."""
    before = BeforeConsolidation()
    strategy = make(plugins=[before], important=0.5, past_weight=0.6, past_importance=0.8)
    tasl = tasl_of(strategy)
    train(strategy, tiny_texts, 0)
    for trained, kept in zip(before.trained, units(strategy), strict=True):
        assert torch.equal(trained, kept), "the first task has no past"
    low, high = min(before.importance.tolist()), max(before.importance.tolist())
    past = [(x - low) / (high - low) for x in before.importance.tolist()]
    assert tasl.importance.tolist() == pytest.approx(past, rel=1e-4, abs=1e-6)
    start = units(strategy)
    train(strategy, tiny_texts, 1)
    scores = before.importance.tolist()
    current = [(x - min(scores)) / (max(scores) - min(scores)) for x in scores]
    kinds = set()
    for i, (old, new, now) in enumerate(zip(start, before.trained, units(strategy), strict=True)):
        for_past = sorted(past, reverse=True).index(past[i]) < 4
        for_new = sorted(current, reverse=True).index(current[i]) < 4
        kinds.add((for_past, for_new))
        expected = {
            (True, True): 0.6 * old + 0.4 * new,
            (True, False): old,
            (False, True): new,
            (False, False): 0.5 * old + 0.5 * new,
        }[for_past, for_new]
        torch.testing.assert_close(now, expected)
        assert not torch.equal(old, new), "every matrix was trained"
    assert {(True, True), (False, False)} <= kinds
    mixed = [0.8 * p + 0.2 * c for p, c in zip(past, current, strict=True)]
    expected = [(x - min(mixed)) / (max(mixed) - min(mixed)) for x in mixed]
    assert tasl.importance.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_trains_as_plain_lora_within_a_task(make, tiny_texts):
    ours, plain = make(), make(SeqLoRA)
    for strategy in (ours, plain):
        train(strategy, tiny_texts, 0)
    for one, other in zip(units(ours), units(plain), strict=True):
        assert torch.equal(one, other)
    for strategy in (ours, plain):
        train(strategy, tiny_texts, 1)
    assert any(
        not torch.equal(one, other) for one, other in zip(units(ours), units(plain), strict=True)
    )


def test_a_step_reads_nothing_back():
    """On a device without values (meta), every synchronisation fails."""
    plugin = TaSLPlugin()
    plugin._units = [nn.Parameter(torch.empty(4, 3, device="meta")) for _ in range(4)]
    for unit in plugin._units:
        unit.grad = torch.empty_like(unit)
    plugin._sensitivity = [torch.empty_like(unit) for unit in plugin._units]
    plugin._uncertainty = [torch.empty_like(unit) for unit in plugin._units]
    plugin.before_update(None)
    assert all(mean.is_meta for mean in (*plugin._sensitivity, *plugin._uncertainty))
    with pytest.raises((RuntimeError, NotImplementedError)):
        plugin._sensitivity[0].sum().item()


def test_continues_in_a_new_strategy(make, tiny_texts, tmp_path):
    whole, resumed = make(), make(seed=7)
    train(whole, tiny_texts, 0, 1)
    whole.save(tmp_path / "state")
    resumed.load(tmp_path / "state")
    tokens = torch.tensor([tiny_texts.test_stream[0].dataset[0][0].tolist()])
    for task in (None, 2):
        for strategy in (whole, resumed):
            if task is not None:
                train(strategy, tiny_texts, task)
            strategy.model.eval()
        with torch.no_grad():
            assert torch.equal(whole.model(tokens), resumed.model(tokens))
        assert torch.equal(tasl_of(whole).importance, tasl_of(resumed).importance)
    with pytest.raises(ValueError, match=r"important=0\.2 to continue"):
        make(important=0.3).load(tmp_path / "state")


def test_stores_a_number_per_matrix_however_many_tasks(make, tiny_texts):
    strategy = make()
    for task in range(3):
        train(strategy, tiny_texts, task)
        state = tasl_of(strategy).state_dict()
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        assert [tensor.shape for tensor in tensors] == [(8,)]  # A and B of two layers' q and v
        held = [v for v in vars(tasl_of(strategy)).values() if isinstance(v, list)]
        assert not held, "nothing of the size of the adapter outlives a task"


def test_a_bad_argument_is_refused(tiny_vit, make):
    with pytest.raises(
        ValueError, match="should be a language model for TaSL, but is a VisionTransformer"
    ):
        TaSL(tiny_vit())
    for name in ("important", "past_weight", "past_importance"):
        with pytest.raises(ValueError, match=rf"`{name}` should be between 0 and 1, but is 1\.5"):
            make(**{name: 1.5})


def test_other_matrices_are_refused(make, tiny_texts):
    strategy = make()
    tasl_of(strategy).importance = torch.zeros(6)
    with pytest.raises(
        ValueError, match="should have 6 matrices, as the stored importances, but has 8"
    ):
        train(strategy, tiny_texts, 0)
