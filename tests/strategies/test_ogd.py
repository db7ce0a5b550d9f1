"""OGD: steps projected off the gradients of past samples."""

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support import make, plugin_of, same, train, weights
from treelora_avalanche.adapters import new_directions, project_off
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.plugins import OGDPlugin
from treelora_avalanche.plugins.baselines.ogd import ground_truth_outputs
from treelora_avalanche.strategies import OGD, SeqLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


# ---------------------------------------------------------------------------------- the mathematics


def gram_schmidt(vectors):
    """Farajtabar et al., Algorithm 1, in numpy: one vector after the other."""
    basis = []
    for vector in vectors.double().numpy():
        rest = vector - sum((b @ vector) * b for b in basis)
        rest = rest - sum((b @ rest) * b for b in basis)
        if np.linalg.norm(rest) > 1e-3:
            basis.append(rest / np.linalg.norm(rest))
    return torch.tensor(np.array(basis)).reshape(-1, vectors.shape[1])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 3), st.integers(0, 10_000))
def test_basis_spans_what_gram_schmidt_spans(n_first, n_second, n_repeated, seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n_first, 14, generator=generator)
    # Some of the second are combinations of the first, and add nothing.
    mixed = torch.randn(n_repeated, n_first, generator=generator) @ first
    second = torch.cat((torch.randn(n_second, 14, generator=generator), mixed, first[:1]))
    basis = new_directions(first, torch.empty(0, 14))
    basis = torch.cat((basis, new_directions(second, basis)))
    expected = gram_schmidt(torch.cat((first, second)))
    assert len(basis) == len(expected) == n_first + n_second
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=0, atol=1e-5)
    gradient = torch.randn(14, generator=generator)
    by_hand = gradient.double()
    for row in expected:
        by_hand = by_hand - (row @ by_hand) * row
    torch.testing.assert_close(project_off(gradient, basis).double(), by_hand, rtol=0, atol=1e-4)


def test_strongest_direction_comes_first():
    vectors = torch.tensor([[0.1, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 1.0]])
    directions = new_directions(vectors, torch.empty(0, 3))
    assert directions.abs().argmax(1).tolist() == [1, 2, 0]


def test_truth_of_an_image_is_its_logit():
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert ground_truth_outputs(logits, torch.tensor([2, 0])).tolist() == [3.0, 4.0]


def test_truth_of_a_text_is_the_log_likelihood_of_its_answer():
    probabilities = torch.tensor([[[0.1, 0.2, 0.5], [0.9, 0.8, 0.5]]])  # (1, 2 tokens, length 3)
    answer = torch.tensor([[-100, 1, 0]])
    expected = (np.log(0.8) + np.log(0.5)) / 2
    assert ground_truth_outputs(probabilities.log(), answer).item() == pytest.approx(expected)


# -------------------------------------------------------------------------------------- in a stream


class Steps(SupervisedPlugin):
    """Keeps what every iteration added to the parameters."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flat(self, strategy):
        return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])

    def before_training_iteration(self, strategy, *args, **kwargs):
        self.start = self.flat(strategy)

    def after_training_iteration(self, strategy, *args, **kwargs):
        self.seen.append(self.flat(strategy) - self.start)


class ProjectsGradients(SupervisedPlugin):
    """Algorithm 2 of the paper: the gradient, not the step, is projected."""

    def __init__(self, basis):
        super().__init__()
        self.basis = basis

    def after_backward(self, strategy, *args, **kwargs):
        parameters = list(strategy.model.parameters())
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        gradient = gradient - self.basis.T @ (self.basis @ gradient)
        for p, part in zip(
            parameters, gradient.split([p.numel() for p in parameters]), strict=True
        ):
            p.grad = part.view_as(p)


def gradients_of_true_logits(strategy, experience):
    """Of every sample, on its own."""
    strategy.model.eval()
    rows = []
    for image, label, *_ in experience.dataset:
        strategy.model.zero_grad()
        strategy.model(image[None])[0, label].backward()
        rows.append(torch.cat([p.grad.flatten() for p in strategy.model.parameters()]))
    strategy.model.zero_grad()
    return torch.stack(rows)


def test_every_step_is_orthogonal_to_the_gradients_of_all_stored_samples(tiny_vit, tiny_benchmark):
    watch = Steps()
    n = len(tiny_benchmark.train_stream[0].dataset)
    strategy = make(OGD, tiny_vit(), samples_per_task=n, memory_size=3 * n, plugins=[watch])
    past = []
    for index in range(3):
        watch.seen.clear()
        train(strategy, tiny_benchmark, index)
        assert len(watch.seen) == 8
        for step in watch.seen:
            assert step.norm() > 1e-3
            for rows in past:
                cosines = (rows @ step) / rows.norm(dim=1) / step.norm()
                assert cosines.abs().max() < 1e-3
        past.append(gradients_of_true_logits(strategy, tiny_benchmark.train_stream[index]))
    # Without the projection they are not.
    watch.seen.clear()
    plain = make(SeqLoRA, tiny_vit(), plugins=[watch])
    train(plain, tiny_benchmark, 0)
    rows = gradients_of_true_logits(plain, tiny_benchmark.train_stream[0])
    watch.seen.clear()
    train(plain, tiny_benchmark, 1)
    cosines = rows @ watch.seen[0] / rows.norm(dim=1) / watch.seen[0].norm()
    assert cosines.abs().max() > 0.05


def test_gradients_reach_the_optimizer_as_they_are(tiny_vit, tiny_benchmark):
    """So that Adam scales a step by the gradients of the loss, not by their projection."""
    own = train(make(OGD, tiny_vit(), samples_per_task=8), tiny_benchmark, 0)
    plain = make(SeqLoRA, tiny_vit())
    for strategy in (own, plain):
        strategy.train_epochs, strategy.train_mb_size = 1, 32  # a single step
    before = weights(own)
    for name, parameter in plain.model.named_parameters():
        parameter.data.copy_(before[name])
    for strategy in (own, plain):
        strategy.optimizer.state.clear()
        train(strategy, tiny_benchmark, 1)
    for p, q in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        moments = own.optimizer.state[p]["exp_avg"], plain.optimizer.state[q]["exp_avg"]
        torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-7)
    assert not same(weights(own), weights(plain))


def test_a_step_leaves_the_true_logits_of_the_past(tiny_vit, tiny_benchmark):
    def moved(strategy_class, **options):
        def sgd(parameters):
            return torch.optim.SGD(parameters, lr=0.02)

        strategy = make(
            strategy_class, tiny_vit(), optimizer=sgd, train_mb_size=32, train_epochs=1, **options
        )
        train(strategy, tiny_benchmark, 0)
        images = torch.stack([x for x, *_ in tiny_benchmark.train_stream[0].dataset])
        labels = torch.tensor(tiny_benchmark.train_stream[0].dataset.targets)
        logits = []
        for index in (None, 1):  # before and after one step
            if index is not None:
                train(strategy, tiny_benchmark, index)
            strategy.model.eval()
            with torch.no_grad():
                logits.append(strategy.model(images)[torch.arange(len(labels)), labels])
        return (logits[1] - logits[0]).abs().mean()

    plain = moved(SeqLoRA)
    assert moved(OGD, samples_per_task=32, memory_size=32) < 0.1 * plain


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_steps_are_orthogonal_whatever_the_optimizer_does(tiny_vit, tiny_benchmark, optimizer):
    def factory(parameters):
        return optimizer(parameters, lr=0.01, weight_decay=0.01)

    def flat(strategy):
        return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])

    strategy = make(OGD, tiny_vit(), optimizer=factory, samples_per_task=16, memory_size=48)
    train(strategy, tiny_benchmark, 0)
    start, basis = flat(strategy), plugin_of(strategy, OGDPlugin).basis.clone()
    train(strategy, tiny_benchmark, 1)
    moved = flat(strategy) - start
    assert moved.norm() > 0.05
    assert (basis @ moved).abs().max() < 1e-4 * moved.norm()


def test_with_sgd_the_steps_are_those_of_projected_gradients(tiny_vit, tiny_benchmark):
    """As in the paper: SGD is linear in its gradients, also with momentum."""

    def factory(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    options = {"train_epochs": 2, "optimizer": factory}
    own = train(make(OGD, tiny_vit(), samples_per_task=8, **options), tiny_benchmark, 0)
    before, basis = weights(own), plugin_of(own, OGDPlugin).basis.clone()
    by_gradient = make(SeqLoRA, tiny_vit(), plugins=[ProjectsGradients(basis)], **options)
    plain = make(SeqLoRA, tiny_vit(), **options)
    moved = {}
    for strategy in (own, by_gradient, plain):
        strategy.optimizer.state.clear()
        for name, parameter in strategy.model.named_parameters():
            parameter.data.copy_(before[name])
        train(strategy, tiny_benchmark, 1)
        steps = [(p - before[n]).flatten() for n, p in weights(strategy).items()]
        moved[strategy] = torch.cat(steps)
    torch.testing.assert_close(moved[own], moved[by_gradient], rtol=1e-3, atol=1e-6)
    assert (moved[own] - moved[plain]).norm() > 0.01 * moved[plain].norm()


def test_first_experience_is_that_of_plain_lora(tiny_vit, tiny_benchmark):
    plain = weights(train(make(SeqLoRA, tiny_vit()), tiny_benchmark, 0))
    assert same(plain, weights(train(make(OGD, tiny_vit()), tiny_benchmark, 0)))


def test_tasks_share_the_budget_once_it_is_full(tiny_vit, tiny_benchmark):
    strategy = make(OGD, tiny_vit(), samples_per_task=8, memory_size=18)
    n_values = sum(p.numel() for p in strategy.model.parameters())
    ogd = plugin_of(strategy, OGDPlugin)
    counts = []
    for index in range(3):
        train(strategy, tiny_benchmark, index)
        counts.append(list(ogd.counts))
        assert stored_bytes(strategy) == 4 * sum(ogd.counts) * n_values
        torch.testing.assert_close(
            ogd.basis @ ogd.basis.T, torch.eye(sum(ogd.counts)), rtol=0, atol=1e-4
        )
    assert counts == [[8], [8, 8], [6, 6, 6]]


def test_works_on_any_strategy_and_on_unused_parameters(tiny_benchmark):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    model.unused = nn.Parameter(torch.ones(3))
    model.forward = lambda x: model[1](model[0](x))
    ogd = OGDPlugin(samples_per_task=4, memory_size=8)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=8,
        evaluator=None,
        plugins=[ogd],
    )
    train(strategy, tiny_benchmark, 0, 1)
    # The gradient of a true logit of a linear model is its input, in the row of the class.
    assert ogd.basis.shape == (8, 64 * 6 + 6 + 3)
    assert torch.equal(model.unused, torch.ones(3))


def test_saved_and_loaded_it_goes_on_as_if_uninterrupted(tiny_vit, tiny_benchmark, tmp_path):
    options = {"samples_per_task": 8, "memory_size": 18}
    whole = train(make(OGD, tiny_vit(), **options), tiny_benchmark, 0, 1)
    whole.save(tmp_path / "state")
    model = tiny_vit()
    nn.init.normal_(model.head.weight)
    resumed = make(OGD, model, **options)
    resumed.load(tmp_path / "state")
    assert same(weights(whole), weights(resumed))
    for strategy in (whole, resumed):
        train(strategy, tiny_benchmark, 2)
    assert same(weights(whole), weights(resumed))
    assert torch.equal(plugin_of(whole, OGDPlugin).basis, plugin_of(resumed, OGDPlugin).basis)
    with pytest.raises(ValueError, match="`memory_size` should be 18, as in the state, but is 40"):
        make(OGD, tiny_vit(), samples_per_task=8, memory_size=40).load(tmp_path / "state")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_task": 0}, "`samples_per_task` should be at least 1, but is 0"),
        (
            {"memory_size": 150},
            r"`memory_size` should be at least .* \(200\), but is 150. Raise it",
        ),
    ],
)
def test_bad_arguments_are_named_and_the_model_stays(tiny_vit, options, message):
    model = tiny_vit()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        make(OGD, model, **options)
    assert [name for name, _ in model.named_modules()] == names


def test_other_parameters_than_before_are_refused(tiny_vit, tiny_benchmark):
    strategy = make(OGD, tiny_vit(), samples_per_task=4)
    train(strategy, tiny_benchmark, 0)
    next(iter(strategy.model.parameters())).requires_grad_(False)
    with pytest.raises(ValueError, match="Train the same parameters in every experience"):
        train(strategy, tiny_benchmark, 1)
