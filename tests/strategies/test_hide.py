"""HiDe with prompts and with LoRA: centroids, the contrastive term, task inference."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from support import plugin_of
from treelora_avalanche.adapters import LoRAFactors, TrainableView, add_lora, lora_layers
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.models.features.centroids import CentroidFeatures, Centroids, ClassCentroids
from treelora_avalanche.models.features.extraction import extract_features
from treelora_avalanche.models.features.gaussians import train_head
from treelora_avalanche.plugins import ContrastivePlugin, RouterPlugin, TrainedHeadPlugin
from treelora_avalanche.plugins.baselines.hide import contrastive_regularisation
from treelora_avalanche.strategies import HiDeLoRA, HiDePrompt

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

STRATEGIES = {"HiDePrompt": (HiDePrompt, {"prompt_layers": (0, 1)}), "HiDeLoRA": (HiDeLoRA, {})}


def make(name, model, **options):
    torch.manual_seed(1)
    strategy_class, own = STRATEGIES[name]
    options = {"train_mb_size": 8, "train_epochs": 3, "evaluator": None, **own, **options}
    return strategy_class(model, **options)


@pytest.fixture(params=STRATEGIES)
def trained(request, tiny_vit, tiny_benchmark):
    strategy = make(request.param, tiny_vit())
    strategy.train(tiny_benchmark.train_stream)
    strategy.model.eval()
    return strategy


@pytest.fixture
def images(tiny_benchmark):
    return torch.stack([x for e in tiny_benchmark.test_stream for x, *_ in e.dataset])


def heaps(seed=0, n=60, dim=4):
    """Features in three clusters of different size and width."""
    generator = torch.Generator().manual_seed(seed)
    centers = 10 * torch.randn(3, dim, generator=generator)
    heap = torch.arange(n) % 7 % 3
    noise = torch.randn(n, dim, generator=generator) * (1 + heap[:, None])
    return (centers[heap] + noise).double(), heap


# --------------------------------------------------------------------------------------- centroids


@given(n=st.integers(1, 30), n_centroids=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_mixture_has_the_mean_and_variances_of_the_class(n, n_centroids, seed):
    features = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).double()
    found = ClassCentroids.of(5, 2, features, n_centroids)
    assert (found.label, found.task) == (5, 2)
    assert len(found.means) == min(n, n_centroids)
    assert float(found.shares.sum()) == pytest.approx(1)
    mean = found.shares @ found.means
    torch.testing.assert_close(mean, features.mean(0))
    variance = found.shares @ (found.variances + (found.means - mean).square())
    torch.testing.assert_close(variance, features.var(0, correction=0))


def test_centroids_are_those_of_the_heaps():
    features, heap = heaps()
    found = ClassCentroids.of(0, 0, features, 3)
    for number in range(3):
        own = features[heap == number]
        nearest = torch.cdist(own.mean(0)[None], found.means).argmin()
        torch.testing.assert_close(found.means[nearest], own.mean(0))
        torch.testing.assert_close(found.variances[nearest], own.var(0, correction=0))
        assert float(found.shares[nearest]) == pytest.approx(len(own) / len(features))


def test_equal_features_are_one_centroid():
    found = ClassCentroids.of(0, 0, torch.ones(5, 3), 10)
    assert found.means.tolist() == [[1.0] * 3]
    assert found.variances.tolist() == [[0.0] * 3]


def test_finding_centroids_leaves_the_global_generators_alone():
    features, _ = heaps()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = ClassCentroids.of(0, 0, features, 5)
    torch.randn(3)
    second = ClassCentroids.of(0, 0, features, 5)
    torch.set_rng_state(state)
    assert torch.equal(first.means, second.means)
    assert torch.equal(torch.get_rng_state(), state)


def test_pseudo_features_have_the_mean_and_covariance_of_their_class():
    per_class = [heaps(seed)[0] for seed in range(2)]
    statistics = [ClassCentroids.of(7 + c, 0, x, 10 - 4 * c) for c, x in enumerate(per_class)]
    source = CentroidFeatures(statistics)
    assert source.dim == 4
    features, labels = source.draw(40_000, torch.Generator().manual_seed(0))
    assert features.shape == (80_000, 4)
    for c, own in enumerate(per_class):
        drawn = features[labels == 7 + c]
        scale = float(own.std())
        torch.testing.assert_close(drawn.mean(0), own.mean(0), rtol=0, atol=0.03 * scale)
        torch.testing.assert_close(
            drawn.var(0), own.var(0, correction=0), rtol=0.05, atol=0.03 * scale
        )
        # Between the clusters it is exact, and within them coordinates count as uncorrelated.
        mixture = statistics[c]
        centered = mixture.means - own.mean(0)
        expected = centered.T @ (mixture.shares[:, None] * centered)
        expected += torch.diag(mixture.shares @ mixture.variances)
        torch.testing.assert_close(torch.cov(drawn.T), expected, rtol=0.05, atol=0.03 * scale**2)


def test_moved_centroids_are_those_of_moved_features():
    features, _ = heaps()
    found = ClassCentroids.of(0, 0, features, 3)
    weight = torch.diag(torch.tensor([0.5, -0.25, 0.0, 1.0])).double()
    bias = torch.arange(4.0).double()
    moved, expected = found.moved(weight, bias), features + features @ weight + bias
    torch.testing.assert_close(moved.shares @ moved.means, expected.mean(0))
    mean = moved.shares @ moved.means
    variance = moved.shares @ (moved.variances + (moved.means - mean).square())
    torch.testing.assert_close(variance, expected.var(0, correction=0))


def test_a_head_learns_classes_that_no_line_separates_by_their_means():
    # Class 0 in two clusters, class 1 between them and aside: one Gaussian each would overlap.
    generator = torch.Generator().manual_seed(0)
    spots = {0: [(-4.0, 0.0), (4.0, 0.0)], 1: [(0.0, 3.0)]}
    points = {
        c: torch.cat([torch.tensor(s) + 0.3 * torch.randn(40, 2, generator=generator) for s in ss])
        for c, ss in spots.items()
    }
    statistics = [ClassCentroids.of(c, 0, x, 4) for c, x in points.items()]
    head = nn.Linear(2, 2)
    train_head(
        head,
        CentroidFeatures(statistics),
        epochs=200,
        n_per_class=32,
        learning_rate=0.1,
        generator=generator,
    )
    for label, x in points.items():
        assert (head(x).argmax(1) == label).float().mean() > 0.99


# ----------------------------------------------------------------------------- the contrastive term


def test_regularisation_equals_the_sum_by_hand():
    torch.manual_seed(0)
    features, past = (F.normalize(torch.randn(n, 3), dim=1) for n in (4, 2))
    total = 0.0
    for h in features:
        below = sum(math.exp(float(h @ other) / 0.8) for other in (*features, *past))
        for mu in past:
            total += math.log(math.exp(float(h @ mu) / 0.8) / below) / 2 / 4
    assert float(contrastive_regularisation(features, past, 0.8)) == pytest.approx(total, rel=1e-5)


def test_it_pushes_features_off_the_past():
    torch.manual_seed(0)
    past = F.normalize(torch.randn(3, 8), dim=1)
    x = (past.mean(0) + 0.3 * torch.randn(6, 8)).requires_grad_()
    before = (F.normalize(x, dim=1) @ past.T).mean()
    for _ in range(20):
        loss = contrastive_regularisation(F.normalize(x, dim=1), past, 0.8)
        (gradient,) = torch.autograd.grad(loss, x)
        x = (x - gradient).detach().requires_grad_()
    assert (F.normalize(x, dim=1) @ past.T).mean() < before - 0.1


@pytest.mark.parametrize("name", STRATEGIES)
def test_penalty_is_non_zero_from_the_second_task_on_and_reaches_what_is_trained(
    tiny_vit, tiny_benchmark, name
):
    class Watched(ContrastivePlugin):
        def __init__(self, head):
            super().__init__(head, 0.1)
            self.penalties = []

        def before_backward(self, strategy, **kwargs):
            if self._centroids is not None:
                penalty = self.penalty()
                names = [
                    name for name, _ in strategy.model.named_parameters() if "head" not in name
                ]
                trained = [dict(strategy.model.named_parameters())[name] for name in names]
                gradients = torch.autograd.grad(penalty, trained, retain_graph=True)
                reached = all(gradient.abs().sum() > 0 for gradient in gradients)
                self.penalties.append((strategy.clock.train_exp_counter, penalty.item(), reached))
            super().before_backward(strategy, **kwargs)

    strategy = make(name, tiny_vit())
    index = next(i for i, p in enumerate(strategy.plugins) if type(p) is ContrastivePlugin)
    strategy.plugins[index] = watched = Watched(plugin_of(strategy, TrainedHeadPlugin))
    strategy.train(tiny_benchmark.train_stream[:2])
    assert {task for task, _, _ in watched.penalties} == {1}
    assert all(penalty < -0.01 for _, penalty, _ in watched.penalties)
    assert all(reached for _, _, reached in watched.penalties)
    with pytest.raises(RuntimeError, match="needs past classes"):
        watched.penalty()


# -------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_with_the_true_task_the_output_is_that_tasks_own(tiny_vit, tiny_benchmark, name):
    strategy = make(name, tiny_vit())
    dataset = tiny_benchmark.test_stream[0].dataset
    own = []  # features under the active adapter or prompt at the end of the task
    for experience in tiny_benchmark.train_stream:
        with torch.enable_grad():
            strategy.train(experience)
        own.append(extract_features(strategy.model, dataset, batch_size=16, device="cpu")[0])
    assert not torch.allclose(own[0], own[2], atol=1e-3)
    view = strategy.model.eval()
    router, classifier = view.router, classifier_of(view)
    for task in range(3):
        view.router = router._replace(adapter=torch.full_like(router.adapter, task))
        logits = view(torch.stack([image for image, *_ in dataset]))
        torch.testing.assert_close(logits, classifier(own[task]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_sample_gets_the_output_of_its_own_task(trained, images):
    view = trained.model
    router = view.router
    chosen = router(view.frozen_features(images))
    assert len(chosen.unique()) > 1
    routed = view(images)
    for task in range(3):
        view.router = router._replace(adapter=torch.full_like(router.adapter, task))
        rows = chosen == task
        torch.testing.assert_close(routed[rows], view(images)[rows], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prediction_does_not_depend_on_the_batch(trained, images):
    together = trained.model(images)
    alone = torch.cat([trained.model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert trained.model(images[:0]).shape == (0, 6)


@torch.no_grad()
def test_the_task_is_told_by_the_untouched_backbone(trained, tiny_vit, tiny_benchmark, images):
    bare = tiny_vit().eval()
    features = bare.forward_features(images)[:, 0]
    torch.testing.assert_close(trained.model.frozen_features(images), features)
    statistics = plugin_of(trained, RouterPlugin).statistics
    assert [(s.label, s.task) for s in statistics] == [(c, c // 2) for c in range(6)]
    for experience in tiny_benchmark.train_stream:
        frozen = bare.forward_features(torch.stack([x for x, *_ in experience.dataset]))[:, 0]
        targets = torch.tensor(list(experience.dataset.targets))
        for label in experience.classes_in_this_experience:
            own = frozen[targets == label].mean(0)
            torch.testing.assert_close(
                statistics[label].shares @ statistics[label].means, own, rtol=1e-4, atol=1e-5
            )


# ----------------------------------------------------------------------------------- the strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_frozen_weights_stay_and_each_task_moves_its_own(tiny_vit, tiny_benchmark, name):
    strategy = make(name, tiny_vit())
    module = strategy.model.module
    parameters = dict(module.named_parameters())
    trained = {n for n, p in parameters.items() if p.requires_grad}
    for experience in tiny_benchmark.train_stream:
        before = {n: p.detach().clone() for n, p in parameters.items()}
        strategy.train(experience)
        same = {n for n, p in parameters.items() if torch.equal(before[n], p)}
        assert same == set(parameters) - trained


@torch.no_grad()
def test_lora_leaves_the_queries_alone_and_moves_keys_and_values(tiny_vit, tiny_benchmark):
    strategy = make("HiDeLoRA", tiny_vit())
    with torch.enable_grad():
        strategy.train(tiny_benchmark.train_stream[:2])
    for layer in lora_layers(strategy.model).values():
        q, k, v = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).chunk(3)
        assert not q.any()
        assert k.any()
        assert v.any()
        hidden = torch.randn(2, 5, 16)
        assert torch.equal(layer(hidden)[..., :16], layer.base_layer(hidden)[..., :16])
    for factors in strategy.bank.factors:
        for row, shape in zip(factors, LoRAFactors(strategy.model).shapes, strict=True):
            assert not shape.split(row)[1][:16].any()


def test_a_task_starts_from_the_adapter_of_the_one_before(tiny_vit, tiny_benchmark):
    strategy = make("HiDeLoRA", tiny_vit())
    live = []

    class Start(TrainedHeadPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_exp_iterations == 0:
                live.append(LoRAFactors(strategy.model).stack.clone())

    strategy.plugins.insert(0, Start())
    strategy.train(tiny_benchmark.train_stream)
    assert torch.equal(live[1], strategy.bank[0])
    assert torch.equal(live[2], strategy.bank[1])
    assert not torch.equal(strategy.bank[0], strategy.bank[1])


def test_memory_per_task(tiny_vit, tiny_benchmark):
    # Frozen and adapted; two classes; means, variances and a share of ten centroids; bytes.
    statistics = 2 * 2 * 10 * (2 * 16 + 1) * 4
    expected = {
        # The active prompt is a parameter; those of past tasks are stored.
        "HiDePrompt": lambda task: task * 2 * 2 * 20 * 16 * 4 + (task + 1) * statistics,
        "HiDeLoRA": lambda task: (task + 1) * (3 * 10 * (16 + 48) * 4 + statistics),
    }
    for name, bytes_after in expected.items():
        strategy = make(name, tiny_vit(), train_epochs=1)
        for task, experience in enumerate(tiny_benchmark.train_stream):
            strategy.train(experience)
            assert stored_bytes(strategy) == bytes_after(task), name


def test_paper_defaults(tiny_vit):
    strategy = HiDePrompt(tiny_vit(depth=6), evaluator=None)
    module = strategy.model.module
    assert module.layers == (0, 1, 2, 3, 4)
    assert module.prompts.active.shape == (5, 2, 20, 2, 8)
    assert module.prompts.momentum == 0.1
    assert plugin_of(strategy, TrainedHeadPlugin).kind == Centroids(10)
    lora = HiDeLoRA(tiny_vit(depth=6), evaluator=None)
    assert list(lora_layers(lora.model)) == [
        f"module.base_model.model.blocks.{i}.attn.qkv" for i in range(5)
    ]


def test_a_peft_model_or_its_view_is_taken_and_routed(tiny_vit, tiny_benchmark):
    for wrap in (lambda m: m, TrainableView):
        peft = add_lora(tiny_vit(), rank=2, layers=[1])
        strategy = make("HiDeLoRA", wrap(peft), train_epochs=1)
        assert strategy.model.module is peft
        strategy.train(tiny_benchmark.train_stream[:2])
        assert strategy.model.router is not None
        assert len(strategy.bank) == 2


# ------------------------------------------------------------------------------ refused arguments


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("HiDePrompt", {"momentum": 1.0}, "`momentum` should be at least 0 and below 1"),
        ("HiDePrompt", {"contrast": -0.1}, "`contrast` should be at least 0, but is"),
        ("HiDePrompt", {"prompt_layers": (0, 5)}, r"`prompt_layers` .*, but is \[0, 5\]"),
        ("HiDePrompt", {"prompt_length": 0}, "`prompt_length` should be at least 1"),
        ("HiDePrompt", {"n_centroids": 0}, "`n_centroids` should be at least 1, but is 0"),
        ("HiDeLoRA", {"contrast": -0.1}, "`contrast` should be at least 0, but is"),
        ("HiDeLoRA", {"rank": 0}, "`rank` should be at least 1"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(tiny_vit, name, options, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        make(name, model, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert not lora_layers(model)


@pytest.mark.parametrize("name", STRATEGIES)
def test_other_models_are_refused(name, tiny_vit):
    resnet = timm.create_model("resnet10t", num_classes=4)
    with pytest.raises(ValueError, match=f"VisionTransformer of timm for {name}, but is a ResNet"):
        make(name, resnet)
    with pytest.raises(ValueError, match="should have a linear classifier"):
        make(name, tiny_vit(num_classes=0))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_language_model_is_refused(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
    )
    with pytest.raises(
        ValueError, match=f"VisionTransformer .* for {name}, but is a LlamaForCausalLM"
    ):
        make(name, LlamaForCausalLM(config))


@pytest.mark.parametrize(("option", "value"), [("contrast", 0.5), ("momentum", 0.5)])
def test_another_strength_is_refused(tiny_vit, option, value):
    state = make("HiDePrompt", tiny_vit()).state_dict()
    with pytest.raises(
        ValueError, match=rf"`{option}` should be 0\.1, as in the state, but is 0\.5"
    ):
        make("HiDePrompt", tiny_vit(), **{option: value}).load_state_dict(state)
