"""Merged adapter: predictions and the next task use the mean of all learned adapters."""

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive

from treelora_avalanche import SeqLoRA, TreeLoRAStrategy
from treelora_avalanche.adapters import LoRAFactors, TrainableView, add_lora
from treelora_avalanche.models.features.extraction import extract_features
from treelora_avalanche.plugins import MergedAdapterPlugin, TaskAdaptiveHeadPlugin

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


class Ends(SupervisedPlugin):
    """Records the adapter before the first and after the last step of every experience."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def before_training_epoch(self, strategy, *args, **kwargs):
        if strategy.clock.train_exp_epochs == 0:
            self.begun.append(LoRAFactors(strategy.model).stack.clone())

    def after_training_epoch(self, strategy, *args, **kwargs):
        if strategy.clock.train_exp_epochs == strategy.train_epochs - 1:
            self.ended.append(LoRAFactors(strategy.model).stack.clone())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def trained(tiny_vit, tiny_benchmark, **options):
    torch.manual_seed(0)
    ends = Ends()
    strategy = TreeLoRAStrategy(
        tiny_vit(),
        rank=2,
        layers="all",
        plugins=[*options.pop("plugins", ()), ends],
        train_mb_size=8,
        train_epochs=2,
        evaluator=None,
        **options,
    )
    for experience in tiny_benchmark.train_stream:
        strategy.train(experience)
    return strategy, ends


def check_means(ends, live):
    for n in range(1, len(ends.ended)):
        mean = torch.stack(ends.ended[:n]).mean(0)
        assert not torch.equal(mean, ends.ended[n])
        torch.testing.assert_close(ends.begun[n], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(live, torch.stack(ends.ended).mean(0), rtol=0, atol=1e-6)


def test_the_mean_of_all_adapters_predicts_and_is_where_the_next_task_starts(
    tiny_vit, tiny_benchmark
):
    strategy, ends = trained(tiny_vit, tiny_benchmark, head="task_adaptive")
    assert len(ends.ended) > 2
    check_means(ends, LoRAFactors(strategy.model).stack)
    assert torch.equal(ends.begun[1], ends.ended[0]), "of one adapter the mean is that adapter"
    # The bank stores the adapter of each task, not the means.
    assert torch.equal(strategy.bank.factors, torch.stack(ends.ended))


def ties_by_hand(vectors):
    """Yadav et al., Section 3: trim, elect the sign, and average the values that have it."""
    trimmed = []
    for vector in vectors.tolist():
        n_kept = int(0.2 * len(vector))
        limit = sorted(map(abs, vector))[-n_kept]
        trimmed.append([x if abs(x) >= limit else 0.0 for x in vector])
    merged = []
    for values in zip(*trimmed, strict=True):
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [x for x in values if x * sign > 0]
        merged.append(sum(agreeing) / max(1, len(agreeing)))
    return torch.tensor(merged)


def magmax_by_hand(vectors):
    return torch.tensor([max(values, key=abs) for values in vectors.T.tolist()])


BY_HAND = {"ties": ties_by_hand, "magmax": magmax_by_hand}


@pytest.mark.parametrize("merge", BY_HAND)
def test_task_vectors_are_merged_as_by_hand(tiny_vit, tiny_benchmark, tmp_path, merge):
    """Also when saved after the first task and continued by another strategy."""

    def strategy(plugins):
        torch.manual_seed(0)
        options = {"train_mb_size": 8, "train_epochs": 2, "evaluator": None}
        # Layers of two shapes: the smaller one is padded.
        targets = ("qkv", "fc2")
        return SeqLoRA(
            tiny_vit(), rank=2, target_modules=targets, merge=merge, plugins=plugins, **options
        )

    ends = Ends()
    whole = strategy([ends])
    resumed = strategy([Ends()])
    active = []
    for number, experience in enumerate(tiny_benchmark.train_stream):
        torch.manual_seed(number)
        whole.train(experience)
        active.append(LoRAFactors(whole.model).stack.clone())
        if number == 0:
            whole.save(tmp_path / "state")
            resumed.load(tmp_path / "state")
        else:
            torch.manual_seed(number)
            resumed.train(experience)
    start, used = ends.begun[0], ends.ended[0] != 0
    assert not used.all()
    for n, merged in enumerate(active, 1):
        vectors = torch.stack([(ended - start)[used] for ended in ends.ended[:n]])
        expected = start.clone()
        expected[used] += BY_HAND[merge](vectors)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(merged, torch.stack(ends.ended[:n]).mean(0)) or n == 1
    begins = ends.ended if merge == "magmax" else active
    assert all(torch.equal(a, b) for a, b in zip(ends.begun[1:], begins, strict=False))
    assert torch.equal(LoRAFactors(resumed.model).stack, active[-1])


def test_another_merge_is_refused():
    state = MergedAdapterPlugin("ties").state_dict()
    with pytest.raises(ValueError, match="`merge` should be ties, as in the state, but is magmax"):
        MergedAdapterPlugin("magmax").load_state_dict(state)
    with pytest.raises(ValueError, match="Did you mean 'mean'"):
        MergedAdapterPlugin("meen")


def test_it_works_in_a_built_in_strategy(tiny_vit, tiny_benchmark):
    torch.manual_seed(0)
    model = TrainableView(add_lora(tiny_vit(), rank=2, alpha=2))
    ends = Ends()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=8,
        plugins=[ends, MergedAdapterPlugin()],
        evaluator=None,
    )
    for experience in tiny_benchmark.train_stream:
        strategy.train(experience)
    check_means(ends, LoRAFactors(model).stack)


@pytest.mark.parametrize("given", ["by name", "as a plugin"])
def test_the_head_is_fitted_to_the_mean(tiny_vit, tiny_benchmark, given):
    head = TaskAdaptiveHeadPlugin()
    options = {"head": "task_adaptive"} if given == "by name" else {"plugins": [head]}
    strategy, _ = trained(tiny_vit, tiny_benchmark, **options)
    head = next(p for p in strategy.plugins if isinstance(p, TaskAdaptiveHeadPlugin))
    assert any(isinstance(plugin, MergedAdapterPlugin) for plugin in strategy.plugins)
    features, targets = extract_features(
        strategy.model, list(tiny_benchmark.train_stream)[-1].dataset, batch_size=8, device="cpu"
    )
    for statistics in head.statistics:
        if statistics.label in targets:
            mean = features[targets == statistics.label].mean(0)
            torch.testing.assert_close(statistics.mean, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "inference"),
    [({}, "last"), ({"head": "task_adaptive"}, "merged"), ({"inference": "merged"}, "merged")],
)
def test_the_default_inference(tiny_vit, options, inference):
    assert TreeLoRAStrategy(tiny_vit(), **options).inference == inference


def test_continued_from_a_state(tiny_vit, tiny_benchmark):
    plugin = MergedAdapterPlugin()
    plugin.n_experiences = 3
    other = MergedAdapterPlugin()
    other.load_state_dict(plugin.state_dict())
    assert other.n_experiences == 3
    with pytest.raises(ValueError, match="n_experiences"):
        other.load_state_dict({})
