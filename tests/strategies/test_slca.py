"""SLCA: two learning rates, and a classifier aligned on class Gaussians by normalised logits."""

from functools import partial

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from support import images_of, plugin_of
from treelora_avalanche.models.features.gaussians import train_head
from treelora_avalanche.plugins import ClassifierAlignmentPlugin
from treelora_avalanche.strategies import SLCA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


class FixedFeatures:
    """A source that always returns the same features."""

    def __init__(self, features, labels):
        self.features, self.labels = features, labels
        self.dim = features.shape[1]

    def draw(self, n_per_class, generator):
        return self.features, self.labels


def test_backbone_moves_by_its_share_of_the_learning_rate(tiny_vit, tiny_benchmark):
    strategy = SLCA(
        tiny_vit(),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        backbone_rate=0.02,
        train_mb_size=32,
        train_epochs=1,
        evaluator=None,
    )
    before = {name: p.detach().clone() for name, p in strategy.model.named_parameters()}
    moved = {}

    class Watch(SupervisedPlugin):
        def after_update(self, strategy, **kwargs):
            for name, p in strategy.model.named_parameters():
                moved[name] = (p.detach() - before[name], p.grad.clone())

    strategy.plugins.insert(0, Watch())
    strategy.train(tiny_benchmark.train_stream[0])
    assert set(moved) == set(before)
    for name, (step, gradient) in moved.items():
        rate = 0.5 if ".head." in name else 0.5 * 0.02
        assert torch.allclose(step, -rate * gradient, atol=1e-7), name


def test_alignment_minimises_the_cross_entropy_of_normalised_logits():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2])
    features = torch.randn(3, 8, generator=generator)
    head, start = nn.Linear(8, 4), nn.Linear(8, 4)
    start.load_state_dict(head.state_dict())
    train_head(
        head,
        FixedFeatures(features, labels),
        epochs=1,
        n_per_class=1,
        learning_rate=1e-3,
        generator=generator,
        temperature=0.1,
    )
    logits = start(features)[:, :3]  # class 3 is unseen
    loss = nn.functional.cross_entropy(10 * logits / logits.norm(dim=1, keepdim=True), labels)
    loss.backward()
    # The first step of Adam is the learning rate times the sign of the gradient.
    step = (head.weight - start.weight).detach() / 1e-3
    assert torch.allclose(step[:3], -start.weight.grad[:3].sign(), atol=1e-2)
    assert torch.equal(step[3], torch.zeros(8))


def test_statistics_stay_as_they_were_and_the_classifier_separates_the_tasks(
    tiny_vit, tiny_benchmark
):
    strategy = SLCA(tiny_vit(), lr=1e-3, train_mb_size=8, train_epochs=2, evaluator=None)
    alignment = plugin_of(strategy, ClassifierAlignmentPlugin)
    strategy.train(tiny_benchmark.train_stream[0])
    first = [s.mean.clone() for s in alignment.statistics]
    strategy.train(tiny_benchmark.train_stream[1:])
    for before, after in zip(first, alignment.statistics, strict=False):
        assert torch.equal(before, after.mean)
    targets = torch.tensor([t for e in tiny_benchmark.test_stream for t in e.dataset.targets])
    with torch.no_grad():
        predicted = strategy.model.eval()(images_of(tiny_benchmark.test_stream)).argmax(1)
    assert (predicted == targets).float().mean() > 0.8


def test_bad_arguments_leave_the_model_unchanged(tiny_vit):
    model = tiny_vit()
    model.requires_grad_(False)
    for match, options in [
        ("`backbone_rate` should be above 0 and at most 1, but is 2", {"backbone_rate": 2}),
        ("`temperature` should be above 0, but is 0", {"temperature": 0}),
        ("`optimizer` should be a callable", {"optimizer": torch.optim.SGD(model.parameters())}),
    ]:
        with pytest.raises(ValueError, match=match):
            SLCA(model, **options)
    assert not any(p.requires_grad for p in model.parameters())
