"""Regularised discriminant analysis, against scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import (
    LinearDiscriminantAnalysis,
    QuadraticDiscriminantAnalysis,
)
from torch import nn

from treelora_avalanche.models.features.gaussians import ClassStatistics, Gaussians
from treelora_avalanche.models.features.regularised import RegularisedDiscriminant, set_linear


def drawn(n_per_class, n_classes, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n_classes, n_per_class, dim, generator=generator).double()
    spread = 0.5 + torch.rand(n_classes, 1, dim, generator=generator)
    features = features * spread + torch.randn(n_classes, 1, dim, generator=generator)
    return features.flatten(0, 1), torch.arange(n_classes).repeat_interleave(n_per_class)


def whitened(features, targets):
    """Moves and scales features so that the mean covariance of the classes is the identity."""
    covariance = sum(torch.cov(features[targets == c].T) for c in targets.unique())
    root = torch.linalg.cholesky(covariance / len(targets.unique()))
    return torch.linalg.solve_triangular(root, features.T, upper=False).T


def test_probabilities_are_those_of_quadratic_discriminant_analysis():
    """With the identity as the shared covariance, scikit-learn's regularisation is ours."""
    features, targets = drawn(30, 3, 5)
    features = whitened(features, targets)
    own, diagonal = 0.4, 0.1
    # scikit-learn divides covariances by n or n - 1, according to its version.
    plain = QuadraticDiscriminantAnalysis(store_covariance=True).fit(features, targets)
    ratio = np.trace(torch.cov(features[:30].T).numpy()) / np.trace(plain.covariance_[0])
    means = torch.stack([features[targets == c].mean(0) for c in range(3)])[targets]
    reference = QuadraticDiscriminantAnalysis(
        priors=[1 / 3] * 3, reg_param=1 - own * (1 - diagonal)
    ).fit(means + ratio**0.5 * (features - means), targets)
    fitted = RegularisedDiscriminant.fit(Gaussians().of(features, targets, 0), own, diagonal)
    test = 2 * torch.randn(40, 5, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.tensor(reference.predict_log_proba(test))
    torch.testing.assert_close(fitted.log_probabilities(test), expected)
    assert len(expected.argmax(1).unique()) == 3


def test_linear_case_is_linear_discriminant_analysis_and_that_of_the_classifier():
    """scikit-learn divides covariances by n, not by n - 1."""
    features, targets = drawn(20, 4, 5)
    statistics = Gaussians().of(features, targets, 0)
    test = torch.randn(50, 5, generator=torch.Generator().manual_seed(1)).double()
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(
        features.numpy(), targets.numpy()
    )
    scores = torch.tensor(reference.decision_function(test.numpy())) * (19 / 20)
    priors = -np.log(4) * (19 / 20)
    head = nn.Linear(5, 6).double()
    before = head.weight.detach().clone()
    set_linear(head, statistics, diagonal=0.0)
    logits = head(test)[:, :4]
    torch.testing.assert_close(logits.log_softmax(1), (scores - priors).log_softmax(1))
    assert torch.equal(head.weight[4:], before[4:])

    set_linear(head, statistics, diagonal=0.3)
    fitted = RegularisedDiscriminant.fit(statistics, own=0.0, diagonal=0.3)
    torch.testing.assert_close(fitted.log_probabilities(test), head(test)[:, :4].log_softmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_class_of_several_tasks_is_a_mixture_of_their_gaussians(dtype):
    dim, own, diagonal = 6, 0.2, 0.1
    parts = [drawn(n, 3, dim, seed) for seed, n in enumerate((12, 4))]
    # Class 2 has one task, and one of class 1's has a single sample.
    cells = [
        (c, t, x[y == c][: 1 if (c, t) == (1, 1) else None])
        for t, (x, y) in enumerate(parts)
        for c in range(3)
        if (c, t) != (2, 1)
    ]
    statistics = [ClassStatistics.of(c, t, x.to(dtype)) for c, t, x in cells]
    fitted = RegularisedDiscriminant.fit(statistics, own, diagonal)

    covariances = [np.cov(x.numpy().T) if len(x) > 1 else np.zeros((dim, dim)) for *_, x in cells]
    shared = np.mean([c for c, (*_, x) in zip(covariances, cells, strict=True) if len(x) > 1], 0)
    test = 2 * torch.randn(20, dim, generator=torch.Generator().manual_seed(1)).double()
    densities = {c: [] for c in range(3)}
    for (c, _, x), covariance in zip(cells, covariances, strict=True):
        regularised = (1 - diagonal) * ((1 - own) * shared + own * covariance)
        regularised += diagonal * np.diag(np.diag(shared))
        normal = multivariate_normal(x.mean(0).numpy(), regularised)
        densities[c].append(normal.logpdf(test.numpy()))
    scores = np.stack([logsumexp(d, axis=0) - np.log(len(d)) for d in densities.values()], 1)
    found = fitted.log_probabilities(test.to(dtype))
    expected = torch.tensor(log_softmax(scores, axis=1)).to(dtype)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.dtype == dtype


def test_constant_coordinates_and_single_samples_have_a_discriminant_too():
    features = torch.zeros(3, 2)
    features[:, 0] = torch.arange(3.0)
    statistics = Gaussians().of(features, torch.arange(3), 0)
    fitted = RegularisedDiscriminant.fit(statistics)
    assert fitted.log_probabilities(features).argmax(1).tolist() == [0, 1, 2]


def test_far_from_the_origin_rounding_does_not_matter():
    features, targets = drawn(20, 3, 5)
    near = RegularisedDiscriminant.fit(Gaussians().of(features, targets, 0))
    shifted = (features + 1000).float()
    far = RegularisedDiscriminant.fit(Gaussians().of(shifted, targets, 0))
    torch.testing.assert_close(
        far.log_probabilities(shifted).double(),
        near.log_probabilities(features),
        rtol=1e-2,
        atol=1e-2,
    )
