"""Class statistics, pseudo-features, and the head retrained on them."""

import copy

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import EWC, Naive, Replay
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from treelora_avalanche.adapters import TrainableView, add_lora
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.metrics import AccuracyMatrix, overall_performance
from treelora_avalanche.models.features.extraction import extract_features, features_of
from treelora_avalanche.models.features.gaussians import (
    ClassStatistics,
    PseudoFeatures,
    feature_drift,
    train_head,
)
from treelora_avalanche.models.features.regularised import RegularisedDiscriminant
from treelora_avalanche.models.views.frozen import frozen_features
from treelora_avalanche.plugins import TaskAdaptiveHeadPlugin, TrainedHeadPlugin
from treelora_avalanche.plugins.within_task_loss import WithinTaskLoss
from treelora_avalanche.strategies import L2P, InfLoRA, SeqLoRA, TreeLoRAStrategy

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def gaussian(n, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) @ mix + 5 * torch.randn(
        dim, generator=generator
    )


# -------------------------------------------------------------------------- statistics and draws


@given(n=st.integers(1, 30), dim=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_statistics_are_mean_and_covariance(n, dim, seed):
    features = gaussian(n, dim, seed).double()
    statistics = ClassStatistics.of(3, 0, features)
    torch.testing.assert_close(statistics.mean, features.mean(0))
    covariance = (
        torch.cov(features.T).reshape(dim, dim) if n > 1 else torch.zeros(dim, dim).double()
    )
    torch.testing.assert_close(statistics.factor.T @ statistics.factor, covariance)


def test_many_samples_keep_the_widest_directions():
    features = gaussian(100, 5, 0).double()
    statistics = ClassStatistics.of(0, 0, features, max_rank=2)
    assert statistics.factor.shape == (2, 5)
    values, vectors = torch.linalg.eigh(torch.cov(features.T))
    best = vectors[:, -2:] @ torch.diag(values[-2:]) @ vectors[:, -2:].T
    torch.testing.assert_close(statistics.factor.T @ statistics.factor, best)


def test_pseudo_features_have_the_mean_and_covariance_of_their_class():
    per_class = [gaussian(40, 4, seed) for seed in range(3)]
    statistics = [ClassStatistics.of(c, 0, x) for c, x in enumerate(per_class)]
    covariances = torch.stack([torch.cov(x.T) for x in per_class])
    for shrinkage in (0.0, 0.5, 1.0):
        source = PseudoFeatures(statistics, shrinkage)
        features, labels = source.draw(40_000, torch.Generator().manual_seed(0))
        for c, x in enumerate(per_class):
            drawn = features[labels == c]
            expected = (1 - shrinkage) * covariances[c] + shrinkage * covariances.mean(0)
            scale = expected.diagonal().max().item()
            torch.testing.assert_close(drawn.mean(0), x.mean(0), atol=0.03 * scale**0.5, rtol=0)
            torch.testing.assert_close(torch.cov(drawn.T), expected, atol=0.05 * scale, rtol=0)


def test_singular_covariances_and_single_samples_can_be_drawn_from():
    flat = torch.randn(5, 1).expand(5, 8)  # all samples on a line
    single = torch.ones(1, 8)
    source = PseudoFeatures(
        [ClassStatistics.of(0, 0, flat), ClassStatistics.of(1, 0, single)], shrinkage=0.0
    )
    features, labels = source.draw(100, torch.Generator().manual_seed(0))
    assert torch.isfinite(features).all()
    assert torch.equal(features[labels == 1], single.expand(100, 8))


def test_drift_of_a_linear_map_is_found_and_undone():
    before = gaussian(500, 4, 1).double()
    weight = 0.1 * gaussian(4, 4, 2).double()
    after = before + before @ weight + 3.0
    found = feature_drift(before, after, ridge=0.0)
    old = gaussian(50, 4, 3).double()
    moved = ClassStatistics.of(0, 0, old).moved(*found)
    expected = ClassStatistics.of(0, 0, old + old @ weight + 3.0)
    torch.testing.assert_close(moved.mean, expected.mean)
    torch.testing.assert_close(moved.factor.T @ moved.factor, expected.factor.T @ expected.factor)


def test_head_separates_well_separated_classes_and_leaves_unseen_ones():
    centers = 10 * torch.eye(4)
    statistics = [ClassStatistics.of(c, 0, centers[c] + torch.randn(20, 4)) for c in (0, 1, 3)]
    head = nn.Linear(4, 5)
    before = head.weight.detach().clone()
    train_head(
        head,
        PseudoFeatures(statistics),
        epochs=50,
        n_per_class=16,
        learning_rate=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    logits = head(centers)[:, [0, 1, 3]]
    assert logits[[0, 1, 3]].argmax(1).tolist() == [0, 1, 2]
    assert torch.equal(head.weight[[2, 4]], before[[2, 4]])
    assert not torch.equal(head.weight[0], before[0])


# ------------------------------------------------------------------------------- within-task loss


def test_within_task_loss_by_hand():
    loss = WithinTaskLoss(nn.CrossEntropyLoss(reduction="none"))
    loss.current = torch.tensor([1, 2])
    logits = torch.tensor([[9.0, 1.0, 2.0, 9.0], [3.0, 1.0, 2.0, 9.0]])
    targets = torch.tensor([2, 0])  # the second from a replay memory
    e = torch.exp
    expected = [
        -torch.log(e(torch.tensor(2.0)) / e(torch.tensor([1.0, 2.0])).sum()),
        -torch.log(e(torch.tensor(3.0)) / e(torch.tensor([3.0, 1.0, 2.0])).sum()),
    ]
    torch.testing.assert_close(loss(logits, targets), torch.stack(expected))


# -------------------------------------------------------------------------------------- the plugin


def test_features_are_the_inputs_of_the_classifier(tiny_vit, tiny_benchmark):
    model = tiny_vit().eval()
    dataset = tiny_benchmark.train_stream[0].dataset
    features, targets = extract_features(model, dataset, batch_size=5, device="cpu")
    images = torch.stack([image for image, *_ in dataset])
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, expected)
    assert targets.tolist() == list(dataset.targets)
    torch.testing.assert_close(classifier_of(model)(features), model(images))


def final_accuracy(strategy_class, model, benchmark, plugins, **options):
    from avalanche.training.plugins import EvaluationPlugin

    torch.manual_seed(0)
    matrix = AccuracyMatrix()
    strategy = strategy_class(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.002),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=6,
        eval_mb_size=16,
        plugins=plugins,
        evaluator=EvaluationPlugin(matrix, loggers=[]),
        **options,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    assert isinstance(strategy._criterion, nn.CrossEntropyLoss)
    return overall_performance(matrix.result())


@pytest.mark.parametrize(
    ("strategy_class", "options"),
    [(Naive, {}), (EWC, {"ewc_lambda": 1.0}), (SeqLoRA, {}), (TreeLoRAStrategy, {})],
)
def test_head_lifts_any_strategy_above_its_forgetful_head(
    tiny_vit, tiny_benchmark, strategy_class, options
):
    def run(plugins):
        torch.manual_seed(1)
        model = TrainableView(add_lora(tiny_vit()))
        return final_accuracy(strategy_class, model, tiny_benchmark, plugins, **options)

    plain, with_head = run([]), run([TaskAdaptiveHeadPlugin()])
    assert with_head > plain + 0.1


def test_head_works_with_samples_from_a_replay_memory(tiny_vit, tiny_benchmark):
    accuracy = final_accuracy(
        Replay, tiny_vit(), tiny_benchmark, [TrainedHeadPlugin()], mem_size=20
    )
    assert accuracy > 0.5


def test_no_image_is_stored(tiny_vit, tiny_benchmark):
    plugin = TaskAdaptiveHeadPlugin()
    final_accuracy(Naive, tiny_vit(), tiny_benchmark, [plugin])
    assert [(s.label, s.task) for s in plugin.statistics] == [
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
    ]
    assert all(s.mean.shape == (16,) and s.factor.shape == (16, 16) for s in plugin.statistics)
    tensors = [value for value in vars(plugin).values() if isinstance(value, torch.Tensor)]
    assert tensors == []


def test_a_model_without_classifier_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="should have a linear classifier"):
        classifier_of(tiny_vit(num_classes=0))


# -------------------------------------------------------------------------------- the closed form


def trained(tiny_vit, benchmark, head, **options):
    torch.manual_seed(0)
    options = {"lr": 0.002, "train_mb_size": 8, "train_epochs": 2, "evaluator": None} | options
    strategy = SeqLoRA(tiny_vit(), head=head, **options)
    strategy.train(benchmark.train_stream[:2])
    return strategy


def images_of(experience, n=5):
    return torch.stack([experience.dataset[i][0] for i in range(n)])


def head_of(strategy):
    return next(p for p in strategy.plugins if isinstance(p, TaskAdaptiveHeadPlugin))


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_predictions_are_those_of_the_discriminants(tiny_vit, tiny_benchmark, layers):
    """By hand: features under the adapter, and of the model before LoRA was attached."""
    strategy = trained(tiny_vit, tiny_benchmark, "task_adaptive_ensemble", layers=layers)
    plugin, images = head_of(strategy), images_of(tiny_benchmark.train_stream[1])
    vit = tiny_vit().eval()
    dataset = tiny_benchmark.train_stream[0].dataset
    frozen, targets = extract_features(vit, dataset, batch_size=64, device="cpu")
    of_first = plugin.kind.of(frozen, targets, 0)
    for s, expected in zip(plugin.frozen_statistics[:2], of_first, strict=True):
        torch.testing.assert_close(s.mean, expected.mean)
    with torch.no_grad():
        found = strategy.model.eval()(images)
        logs = [
            RegularisedDiscriminant.fit(statistics).log_probabilities(features)
            for statistics, features in (
                (plugin.statistics, features_of(strategy.model, images)),
                (plugin.frozen_statistics, features_of(vit, images)),
            )
        ]
        expected = (0.8 * logs[0] + 0.2 * logs[1]).log_softmax(1)
        torch.testing.assert_close(found[:, :4], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[:, 4:], torch.full((5, 2), -torch.inf))
        torch.testing.assert_close(copy.deepcopy(strategy.model)(images), found)


def test_the_classifier_is_trained_and_the_head_predicts(tiny_vit, tiny_benchmark):
    """In training, and in evaluations of an unfinished experience, the classifier predicts."""
    strategy = trained(tiny_vit, tiny_benchmark, "task_adaptive")
    images = images_of(tiny_benchmark.train_stream[0])
    of_head = strategy.model.eval()(images)
    assert of_head[:, 4:].isneginf().all()
    seen = []

    class Watch(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            seen.append(strategy.model.eval()(images).isfinite().all())  # the classifier, LDA

        def after_eval(self, strategy, **kwargs):
            seen.append(strategy.model.eval()(images).isfinite().all())

    strategy.plugins.append(Watch())
    strategy.train(tiny_benchmark.train_stream[2])
    assert seen == [True]
    strategy.eval(tiny_benchmark.train_stream[0])
    assert seen == [True, True]  # all classes are known
    assert not torch.equal(strategy.model.eval()(images), of_head)


@pytest.mark.parametrize("head", ["task_adaptive", "task_adaptive_ensemble"])
def test_a_loaded_strategy_predicts_the_same_bit_for_bit(tiny_vit, tiny_benchmark, head, tmp_path):
    strategy = trained(tiny_vit, tiny_benchmark, head)
    strategy.save(tmp_path / "state")
    other = SeqLoRA(tiny_vit(), head=head, evaluator=None)
    other.load(tmp_path / "state")
    images = images_of(tiny_benchmark.train_stream[0])
    assert torch.equal(other.model.eval()(images), strategy.model.eval()(images))
    another = "task_adaptive" if head != "task_adaptive" else "task_adaptive_ensemble"
    with pytest.raises(ValueError, match="`frozen_share` should be"):
        SeqLoRA(tiny_vit(), head=another, evaluator=None).load(tmp_path / "state")


def test_frozen_features_are_those_before_training(tiny_vit, tiny_benchmark):
    images = images_of(tiny_benchmark.train_stream[0])
    before = features_of(tiny_vit().eval(), images)
    for strategy_class, head in (
        (InfLoRA, "linear"),
        (TreeLoRAStrategy, "linear"),
        (L2P, "linear"),
    ):
        strategy = strategy_class(
            tiny_vit(), head=head, lr=0.01, train_mb_size=8, train_epochs=1, evaluator=None
        )
        strategy.train(tiny_benchmark.train_stream[:2])
        trains = [p.requires_grad for p in torch.nn.Module.parameters(strategy.model)]
        found = frozen_features(strategy.model.eval(), images)
        torch.testing.assert_close(found, before)
        assert not torch.allclose(features_of(strategy.model, images), before)
        assert trains == [p.requires_grad for p in torch.nn.Module.parameters(strategy.model)]


def test_ensemble_is_refused_without_a_frozen_backbone(tiny_vit, tiny_benchmark):
    plugin = TaskAdaptiveHeadPlugin(frozen_share=0.1)
    with pytest.raises(ValueError, match="keeps no frozen backbone"):
        final_accuracy(Naive, tiny_vit(), tiny_benchmark, [plugin])
    with pytest.raises(ValueError, match="`own_share` should be at least 0 and below 1, but is 1"):
        TaskAdaptiveHeadPlugin(own_share=1)
