"""The closed-form discriminant, against scikit-learn and against fits without a sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import shrunk_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from treelora_avalanche.models.features.discriminant import Discriminant, leave_one_out_distances


def drawn(sizes, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator) + k for k, n in enumerate(sizes)]


def test_decisions_are_those_of_scikit_learn():
    """With equally many samples per class, scikit-learn's covariance is ours up to a factor."""
    classes = drawn([9, 9, 9], dim=6)
    x, y = torch.cat(classes), torch.arange(3).repeat_interleave(9)
    reference = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=0.2, priors=[1 / 3, 1 / 3, 1 / 3]
    ).fit(x.numpy(), y.numpy())
    test = torch.cat(drawn([50, 50, 50], dim=6, seed=1))
    nearest = Discriminant.fit(classes, shrinkage=0.2).distances(test).argmin(1)
    assert nearest.tolist() == reference.predict(test.numpy()).tolist()
    assert len(set(nearest.tolist())) == 3


def test_distances_are_mahalanobis_distances():
    classes = drawn([5, 7], dim=4)
    residuals = torch.cat([c - c.mean(0) for c in classes]).double().numpy()
    pooled = residuals.T @ residuals / (12 - 2)
    inverse = np.linalg.inv(shrunk_covariance(pooled, shrinkage=0.05))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    found = Discriminant.fit(classes, shrinkage=0.05).distances(x)
    for i in range(3):
        for k, c in enumerate(classes):
            apart = (x[i] - c.mean(0)).double().numpy()
            assert found[i, k].item() == pytest.approx(np.sqrt(apart @ inverse @ apart), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=3),
    dim=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_leave_one_out_distances_are_those_of_fits_without_the_sample(sizes, dim, seed):
    if sum(sizes) - len(sizes) < 2:
        sizes = [*sizes, 3]
    classes, shrinkage = drawn(sizes, dim, seed), 0.1
    found = leave_one_out_distances(classes, shrinkage)
    residuals = torch.cat([c - c.mean(0) for c in classes]).double()
    target = residuals.square().sum() / (len(residuals) - len(sizes)) / dim  # kept
    row = 0
    for own in classes:
        for i in range(len(own)):
            rest = [torch.cat([c[:i], c[i + 1 :]]) if c is own else c for c in classes]
            r = torch.cat([c - c.mean(0) for c in rest]).double()
            pooled = r.T @ r / (len(r) - len(sizes))
            inverse = torch.linalg.inv(
                (1 - shrinkage) * pooled + shrinkage * target * torch.eye(dim).double()
            )
            for j, c in enumerate(rest):
                apart = (own[i] - c.mean(0)).double()
                expected = (apart @ inverse @ apart).sqrt()
                assert found[row, j].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)
            row += 1
    assert row == len(found)


def test_class_of_one_sample_has_no_distance_without_it():
    classes = drawn([1, 4], dim=3)
    distances = leave_one_out_distances(classes)
    assert distances[0, 0].isinf()
    assert distances[1:].isfinite().all()


def test_equal_samples_have_a_discriminant_too():
    classes = [torch.zeros(3, 2), torch.ones(3, 2)]
    fitted = Discriminant.fit(classes)
    assert fitted.distances(torch.tensor([[0.0, 0.0], [1.0, 1.0]])).argmin(1).tolist() == [0, 1]
