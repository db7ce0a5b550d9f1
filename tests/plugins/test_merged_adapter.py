"""Merged adapter: predictions and the next task use the mean of all learned adapters."""

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive

from treelora_avalanche import TreeLoRAStrategy
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
