"""InfLoRA: the subspace of past inputs, and adapters orthogonal to it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support import make, plugin_of, same, train, weights
from treelora_avalanche.adapters import (
    LoRAFactors,
    PastAdapters,
    SubspaceMemory,
    add_lora,
    lora_layers,
)
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.models.views.split_vit import trainable_view
from treelora_avalanche.plugins import InfLoRAPlugin
from treelora_avalanche.plugins.baselines.inf_lora import input_covariances
from treelora_avalanche.strategies import InfLoRA, SeqLoRA

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def live_of(strategy):
    return LoRAFactors(strategy.model).parameters


def images_of(experience):
    return torch.stack([image for image, *_ in experience.dataset])


def inputs_of(model, images):
    """Inputs of every adapted layer, ``(n_in, n_tokens)``."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1).T))
        for layer in lora_layers(model).values()
    ]
    model.eval()
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


# ---------------------------------------------------------------------------- the subspace memory


def inputs(n, dim, seed, decay=0.6):
    """Inputs ``(dim, n)`` whose energy falls from direction to direction, in a rotation."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    scales = decay ** torch.arange(dim)
    return rotation @ (scales[:, None] * torch.randn(dim, n, generator=generator))


class Reference:
    """Gradient projection memory in numpy: the basis of the past alone, from SVDs of the inputs."""

    def __init__(self, dim):
        self.basis = np.zeros((dim, 0))

    def outside(self, h):
        return h - self.basis @ (self.basis.T @ h)

    def add(self, h, threshold):
        rest = self.outside(h)
        u, s, _ = np.linalg.svd(rest)
        total, n = (h**2).sum(), 0
        while (h**2).sum() - (rest**2).sum() + (s[:n] ** 2).sum() < threshold * total:
            n += 1
        self.basis = np.concatenate((self.basis, u[:, :n]), 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 12), st.integers(1, 5), st.floats(0.5, 0.97), st.integers(0, 10_000))
def test_memory_equals_the_reference_in_both_forms(dim, n_tasks, threshold, seed):
    memory, reference = SubspaceMemory(dim), Reference(dim)
    for task in range(n_tasks):
        h = inputs(40, dim, seed + task)
        memory.add(h @ h.T, threshold)
        reference.add(h.double().numpy(), threshold)
        assert memory.n_past == reference.basis.shape[1]
        assert memory.is_complement == (2 * memory.n_past > dim)
        assert len(memory.basis) <= dim / 2
        identity = torch.eye(len(memory.basis))
        torch.testing.assert_close(memory.basis @ memory.basis.T, identity, rtol=0, atol=1e-5)
        free = memory.remove_past(torch.eye(dim))  # the projection itself
        expected = np.eye(dim) - reference.basis @ reference.basis.T
        np.testing.assert_allclose(free.numpy(), expected, atol=5e-3)


@pytest.mark.parametrize("n_past", [3, 9], ids=["past kept", "complement kept"])
def test_free_directions_are_those_of_the_projected_inputs(n_past):
    memory = SubspaceMemory(12)
    past = inputs(40, 12, 0)
    past = torch.linalg.svd(past)[0][:, :n_past] @ torch.randn(n_past, 40)
    memory.add(past @ past.T, 0.99999)
    assert memory.n_past == n_past
    assert memory.is_complement == (n_past == 9)
    new = inputs(40, 12, 7)
    rows = memory.free_directions(new @ new.T, 2)
    assert (rows @ past).abs().max() < 1e-4 * past.abs().max()
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), rtol=0, atol=1e-5)
    basis = np.linalg.svd(past.double().numpy())[0][:, :n_past]
    projected = new.double().numpy()
    projected = projected - basis @ (basis.T @ projected)
    u = np.linalg.svd(projected)[0][:, :2]
    np.testing.assert_allclose(rows.T.double() @ rows.double(), u @ u.T, atol=1e-3)


def test_rows_are_zero_where_the_past_leaves_no_direction():
    memory = SubspaceMemory(4)
    memory.add(torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.0])), 0.999)
    assert memory.n_past == 3
    rows = memory.free_directions(torch.ones(4, 4), 3)
    torch.testing.assert_close(rows.abs(), torch.tensor([[0.0, 0, 0, 1], [0] * 4, [0] * 4]))
    memory.add(torch.eye(4), 0.999)
    assert memory.n_past == 4
    assert not memory.free_directions(torch.eye(4), 2).any()
    memory.add(torch.eye(4), 0.999)  # nothing is left to add
    assert memory.n_past == 4


def test_covariance_is_that_of_every_layers_inputs(tiny_vit, tiny_benchmark):
    model = add_lora(tiny_vit(), target_modules=("qkv", "fc2"))
    images = images_of(tiny_benchmark.train_stream[0])
    batches = [(part, None) for part in images.split(10)]
    model.train()
    covariances = input_covariances(model, batches)
    assert model.training
    assert [len(c) for c in covariances] == [16, 64, 16, 64, 16, 64]
    for covariance, x in zip(covariances, inputs_of(model, images), strict=True):
        torch.testing.assert_close(covariance, x @ x.T / len(images), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- in a stream


class Factors(SupervisedPlugin):
    """A and B at every step."""

    def __init__(self):
        super().__init__()
        self.a, self.b = [], []

    def before_training_exp(self, strategy, *args, **kwargs):
        self.a.append([])
        self.b.append([])

    def after_update(self, strategy, *args, **kwargs):
        self.a[-1].append([a.detach().clone() for a, _ in live_of(strategy)])
        self.b[-1].append([b.detach().clone() for _, b in live_of(strategy)])


def test_a_is_fixed_and_b_is_trained(tiny_vit, tiny_benchmark):
    watch = Factors()
    optimizer = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)}
    strategy = make(InfLoRA, tiny_vit(), rank=3, threshold=0.8, plugins=[watch], **optimizer)
    train(strategy, tiny_benchmark, 0, 1)
    for a_steps, b_steps in zip(watch.a, watch.b, strict=True):
        assert len(a_steps) == 8
        for layer in range(3):
            assert all(torch.equal(step[layer], a_steps[0][layer]) for step in a_steps)
            assert not any(
                torch.equal(before[layer], after[layer]) for before, after in pairwise(b_steps)
            )
            lengths = a_steps[0][layer].norm(dim=1)
            torch.testing.assert_close(lengths, torch.full((3,), 3**-0.5))
    assert not any(torch.equal(x, y) for x, y in zip(watch.a[0][0], watch.a[1][0], strict=True))


def test_first_a_are_the_principal_directions_of_the_inputs(tiny_vit, tiny_benchmark):
    x = inputs_of(add_lora(tiny_vit()), images_of(tiny_benchmark.train_stream[0]))
    strategy = make(InfLoRA, tiny_vit(), rank=2)
    train(strategy, tiny_benchmark, 0)
    for (a, _), h in zip(live_of(strategy), x, strict=True):
        u = np.linalg.svd(h.double().numpy())[0][:, :2]
        np.testing.assert_allclose(3 * (a.T @ a).detach(), u @ u.T, atol=1e-3)


def test_new_adapters_have_no_part_in_the_past(tiny_vit, tiny_benchmark):
    strategy = make(InfLoRA, tiny_vit(), rank=2, threshold=0.9)
    plain = make(SeqLoRA, tiny_vit(), rank=2)
    images = images_of(tiny_benchmark.train_stream[0])
    train(strategy, tiny_benchmark, 0)
    old = inputs_of(strategy.model, images)
    memories = [
        memory.state_dict()["basis"].clone()
        for memory in plugin_of(strategy, InfLoRAPlugin).memories
    ]
    assert not any(memory.is_complement for memory in plugin_of(strategy, InfLoRAPlugin).memories)
    train(strategy, tiny_benchmark, 1)
    for layer, (a, b) in enumerate(live_of(strategy)):
        assert a.norm() > 0.5
        assert b.norm() > 1e-3
        basis = memories[layer]
        # On the old inputs that the memory holds, the new product is zero.
        held = basis.T @ (basis @ old[layer])
        assert (b @ (a @ held)).abs().max() < 1e-5 * held.abs().max()
        # Of the inputs as they were, only what the threshold has left out.
        energy = (3 * (a @ old[layer]).square().sum() / old[layer].square().sum()).item()
        assert energy < 1 - 0.9 + 1e-4
    for layer, (a, _) in enumerate(live_of(plain)):
        rows = nn.functional.normalize(a, dim=1)
        assert (rows @ memories[layer].T).abs().max() > 0.1


def test_threshold_rises_over_the_stream(tiny_vit, tiny_benchmark, monkeypatch):
    thresholds = []
    add = SubspaceMemory.add

    def record(self, covariance, threshold):
        thresholds.append(threshold)
        add(self, covariance, threshold)

    monkeypatch.setattr(SubspaceMemory, "add", record)
    train(make(InfLoRA, tiny_vit(), threshold=0.7, layers=[0]), tiny_benchmark, 0, 1, 2)
    assert thresholds == pytest.approx([0.7, 0.8, 0.9])


def test_stores_one_adapter_per_task_and_a_bounded_subspace(tiny_vit, tiny_benchmark):
    strategy = make(InfLoRA, tiny_vit(), rank=3)
    for index in range(3):
        train(strategy, tiny_benchmark, index)
        memories = plugin_of(strategy, InfLoRAPlugin).memories
        of_memories = 4 * sum(len(memory.basis) * 16 for memory in memories)
        assert 0 < of_memories <= 4 * 3 * 16 * 16 / 2
        assert stored_bytes(strategy) == index * 4 * 3 * 3 * (16 + 48) + of_memories


def test_plugin_attached_to_naive_is_the_strategy(tiny_vit, tiny_benchmark):
    torch.manual_seed(1)
    model = trainable_view(add_lora(tiny_vit()))
    attached = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
        train_mb_size=8,
        train_epochs=2,
        eval_mb_size=192,
        evaluator=None,
        plugins=[InfLoRAPlugin(PastAdapters(model))],
    )
    own = make(InfLoRA, tiny_vit())
    for strategy in (attached, own):
        train(strategy, tiny_benchmark, 0, 1)
    assert same(weights(attached), weights(own))


def test_saved_and_loaded_it_goes_on_as_if_uninterrupted(tiny_vit, tiny_benchmark, tmp_path):
    options = {"rank": 4, "threshold": 0.9}
    whole = train(make(InfLoRA, tiny_vit(), **options), tiny_benchmark, 0, 1)
    whole.save(tmp_path / "state")
    model = tiny_vit()
    nn.init.normal_(model.head.weight)
    resumed = make(InfLoRA, model, **options)
    resumed.load(tmp_path / "state")
    images = images_of(tiny_benchmark.test_stream[0])
    for experience in (None, 2):
        for strategy in (whole, resumed):
            if experience is not None:
                train(strategy, tiny_benchmark, experience)
            strategy.model.eval()
        assert same(weights(whole), weights(resumed))
        with torch.no_grad():
            assert torch.equal(whole.model(images), resumed.model(images))
    for first, second in zip(
        plugin_of(whole, InfLoRAPlugin).memories,
        plugin_of(resumed, InfLoRAPlugin).memories,
        strict=True,
    ):
        assert torch.equal(first.basis, second.basis)
        assert first.is_complement == second.is_complement
    with pytest.raises(ValueError, match=r"`threshold` should be 0.9, as in the state, but is 0.5"):
        make(InfLoRA, tiny_vit(), rank=4, threshold=0.5).load(tmp_path / "state")


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_threshold_out_of_range_is_refused(tiny_vit, threshold):
    with pytest.raises(ValueError, match="`threshold` should be above 0 and below 1, but is"):
        make(InfLoRA, tiny_vit(), threshold=threshold)


def test_a_subspace_of_another_layer_is_refused():
    memory = SubspaceMemory(4)
    with pytest.raises(ValueError, match=r"\(n, 4\), as the layer has 4 inputs, but is \(0, 5\)"):
        memory.load_state_dict(SubspaceMemory(5).state_dict())
