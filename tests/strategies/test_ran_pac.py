"""RanPAC's classifier is scikit-learn's ridge regression; the order of tasks does not matter."""

import copy

import pytest
import torch
from sklearn.linear_model import Ridge

from support import images_of, plugin_of
from treelora_avalanche.models.features.extraction import extract_features
from treelora_avalanche.models.features.random_projection import (
    STRENGTHS,
    choose_strength,
    least_strength,
    ridge_weight,
)
from treelora_avalanche.plugins import FirstSessionPlugin, RidgeHeadPlugin
from treelora_avalanche.strategies import FrozenRanPAC, RanPAC

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def ridge_of_sklearn(samples, targets, n_classes, strength):
    """Weights (n_classes, n_projections) of scikit-learn, for one-hot targets."""
    one_hot = torch.nn.functional.one_hot(targets, n_classes)
    fitted = Ridge(alpha=strength, fit_intercept=False, solver="svd")
    return torch.tensor(fitted.fit(samples.double(), one_hot.double()).coef_)


@pytest.fixture(scope="module")
def all_data(tiny_benchmark):
    return torch.utils.data.ConcatDataset([e.dataset for e in tiny_benchmark.train_stream])


@pytest.mark.parametrize("first_session", [False, True])
def test_classifier_is_that_of_scikit_learn(tiny_vit, tiny_benchmark, all_data, first_session):
    options = {"train_mb_size": 8, "train_epochs": 2} if first_session else {}
    make = RanPAC if first_session else FrozenRanPAC
    strategy = make(tiny_vit(), n_projections=60, evaluator=None, **options)
    strategy.train(tiny_benchmark.train_stream)
    features, targets = extract_features(strategy.model, all_data, batch_size=96, device="cpu")
    head = strategy.model.get_submodule(
        "module.base_model.model.head.modules_to_save.default" if first_session else "head"
    )
    samples = (features @ head.projection).relu()
    expected = ridge_of_sklearn(samples, targets, 6, plugin_of(strategy, RidgeHeadPlugin).strength)
    logits, own = samples.double() @ expected.T, strategy.model.eval()
    with torch.no_grad():
        assert torch.allclose(
            own(images_of(tiny_benchmark.train_stream)).double(), logits, atol=1e-3
        )
    assert (logits.argmax(1) == targets).float().mean() > 0.9


def test_frozen_classifier_does_not_depend_on_the_order_of_tasks(tiny_vit, tiny_benchmark):
    def statistics(order):
        strategy = FrozenRanPAC(tiny_vit(), n_projections=60, evaluator=None)
        for number in order:
            strategy.train(tiny_benchmark.train_stream[number])
        return plugin_of(strategy, RidgeHeadPlugin)

    first, second = statistics([0, 1, 2]), statistics([2, 0, 1])
    assert torch.allclose(first.gram, second.gram, rtol=1e-5)
    assert torch.allclose(first.sums, second.sums, rtol=1e-5)


@pytest.mark.parametrize("n_projections", [20, 100])  # fewer than samples, and more
def test_strength_has_the_least_error_of_all_on_held_out_samples(n_projections):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (50,), generator=generator)
    samples = torch.randn(50, n_projections, generator=generator) + targets[:, None]
    found = choose_strength(samples, targets, torch.Generator().manual_seed(7))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(7))
    train, held = order[:40], order[40:]
    one_hot = torch.nn.functional.one_hot(targets, 3)[held]
    errors = []
    for strength in STRENGTHS.tolist():
        weight = ridge_of_sklearn(samples[train], targets[train], 3, strength)
        errors.append(((samples[held].double() @ weight.T - one_hot) ** 2).mean())
    assert found == STRENGTHS[int(torch.stack(errors).argmin())]


def test_backbone_is_frozen_after_the_first_experience(tiny_vit, tiny_benchmark):
    strategy = RanPAC(tiny_vit(), n_projections=20, train_mb_size=8, train_epochs=1, evaluator=None)

    def adapter():
        named = strategy.model.named_parameters()
        return {n: copy.deepcopy(p.detach()) for n, p in named if "lora" in n}

    start = adapter()
    strategy.train(tiny_benchmark.train_stream[0])
    first = adapter()
    assert any(not torch.equal(start[name], value) for name, value in first.items())
    steps = strategy.clock.train_iterations
    strategy.train(tiny_benchmark.train_stream[1:])
    assert all(torch.equal(first[name], value) for name, value in adapter().items())
    assert strategy.clock.train_iterations == steps
    assert strategy.model.n_frozen == len(strategy.model.blocks)


def test_bad_arguments_leave_the_model_unchanged(tiny_vit, tiny_benchmark):
    model = tiny_vit()
    with pytest.raises(ValueError, match="`n_projections` should be at least 1, but is 0"):
        RanPAC(model, n_projections=0)
    with pytest.raises(ValueError, match="`rank` should be at least 1, but is 0"):
        RanPAC(model, rank=0)
    assert type(model.head) is torch.nn.Linear
    strategy = RanPAC(model, plugins=[FirstSessionPlugin(1)], evaluator=None)
    with pytest.raises(ValueError, match="FirstExperienceOnlyPlugin freezes the whole adapter"):
        strategy.train(tiny_benchmark.train_stream[0])


def test_least_strength_exceeds_the_rounding_errors_of_a_singular_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(40, 300, generator=generator).relu()
    gram, one_hot = samples.T @ samples, torch.eye(4).repeat(10, 1)
    strength = least_strength(gram)
    found = ridge_weight(gram, samples.T @ one_hot, strength)
    exact = ridge_of_sklearn(samples, torch.arange(4).repeat(10), 4, strength)
    assert torch.allclose(samples @ found.T, (samples.double() @ exact.T).float(), atol=1e-2)
