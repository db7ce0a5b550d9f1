"""DualPrompt: prefix tuning with general prompts, and an expert prompt of each task."""

import math
from functools import partial

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from torch import nn

import support
from support import images_of
from treelora_avalanche.metrics.footprint import stored_bytes
from treelora_avalanche.models.prompts.pools import TaskPrompts
from treelora_avalanche.models.prompts.vit import attend_with_prefix, block_with_prefix
from treelora_avalanche.strategies import DualPrompt

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")

LAYERS = {"general_layers": (0,), "expert_layers": (1, 2)}
make = partial(support.make, DualPrompt, **LAYERS)


# --------------------------------------------------------------------------------------- attention


@given(
    batch=st.integers(1, 3),
    n_tokens=st.integers(1, 4),
    length=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 4]),
    shared=st.booleans(),
    qk_norm=st.booleans(),
)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_prefix_attention_equals_attention_by_hand(batch, n_tokens, length, heads, shared, qk_norm):
    torch.manual_seed(0)
    dim = 8
    attention = Attention(
        dim, num_heads=heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm
    ).eval()
    hidden = torch.randn(batch, n_tokens, dim)
    prefix = torch.randn(1 if shared else batch, 2, length, heads, dim // heads)
    output = attend_with_prefix(attention, hidden, prefix)
    for row in range(batch):
        q, k, v = attention.qkv(hidden[row]).chunk(3, dim=1)
        keys, values = prefix[0 if shared else row]
        outputs = []
        for head in range(heads):
            of_head = slice(head * dim // heads, (head + 1) * dim // heads)
            query, key = attention.q_norm(q[:, of_head]), attention.k_norm(k[:, of_head])
            key = torch.cat((keys[:, head], key))
            value = torch.cat((values[:, head], v[:, of_head]))
            weights = (query @ key.T / math.sqrt(dim // heads)).softmax(1)
            outputs.append(weights @ value)
        expected = attention.proj(torch.cat(outputs, 1))
        torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_prefix_changes_nothing(tiny_vit):
    block = tiny_vit().eval().blocks[1]
    hidden = torch.randn(2, 5, 16)
    torch.testing.assert_close(
        block_with_prefix(block, hidden, torch.empty(1, 2, 0, 2, 8)), block(hidden)
    )


# ------------------------------------------------------------------------------- prompts of a task


def test_a_new_task_starts_from_the_last_prompt_and_leaves_it_alone():
    torch.manual_seed(0)
    prompts = TaskPrompts((2, 3), key_dim=4)
    for task in range(3):
        assert len(prompts) == task + 1
        with torch.no_grad():
            prompts.active.copy_(torch.full((2, 3), float(task)))
            prompts.key.copy_(nn.functional.one_hot(torch.tensor(task), 4).float())
        live, key = prompts.active.clone(), prompts.key.clone()
        prompts.fold()
        assert torch.equal(prompts.active, live)
        assert not torch.equal(prompts.key, key)
    assert [float(p.mean()) for p in prompts.stacked()] == [0, 1, 2, 2]
    assert prompts.past_state()["keys"].tolist() == torch.eye(4)[:3].tolist()
    with torch.no_grad():
        prompts.key.copy_(torch.tensor([0.0, 0, 0, 1]))
    queries = torch.tensor([[0.1, 3, 0, 0], [0, 0, 0, 2], [5, 0, 1, 0], [0, 0, 1, 0.5]])
    assert prompts.match(queries).tolist() == [1, 3, 0, 2]


def test_ensemble_is_the_weighted_mean_with_the_past():
    torch.manual_seed(0)
    prompts = TaskPrompts((2,), momentum=0.25)
    used = []
    for values in ([4.0, 0.0], [8.0, 4.0], [0.0, 8.0]):
        if used:
            prompts.fold()
        with torch.no_grad():
            prompts.active.copy_(torch.tensor(values))
        used.append(prompts.current().tolist())
    # By hand: 3/4 of the active one and 1/4 of the mean of those used before.
    assert used == [[4.0, 0.0], [7.0, 3.0], [0.25 * 5.5, 6 + 0.25 * 1.5]]
    prompts.current().sum().backward()
    assert prompts.active.grad.tolist() == [0.75, 0.75]


def test_prompts_without_keys_match_nothing():
    with pytest.raises(ValueError, match="`key_dim` should be given"):
        TaskPrompts((2,)).match(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"`momentum` should be .* 0 and below 1, but is 1\.0"):
        TaskPrompts((2,), momentum=1.0)


# ------------------------------------------------------------------------------------ the strategy


@torch.no_grad()
def test_each_sample_gets_the_expert_of_its_nearest_key(tiny_vit, tiny_benchmark):
    strategy = make(tiny_vit())
    with torch.enable_grad():
        strategy.train(tiny_benchmark.train_stream)
    model, images = strategy.model.module.eval(), images_of(tiny_benchmark.test_stream)
    bare = tiny_vit().eval()
    queries = bare.forward_features(images)[:, 0]
    assert torch.equal(model.query(images), queries)
    # Keys among the images of the three tasks: the features of random weights are all alike.
    model.experts.past_keys = queries[[0, 16]]
    model.experts.key.copy_(queries[32])
    keys = queries[[0, 16, 32]]
    nearest = nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2).argmax(1)
    assert len(nearest.unique()) == 3
    experts = torch.cat((model.experts.past, model.experts.active[None]))
    hidden = bare._pos_embed(bare.patch_embed(images))
    for number, block in enumerate(bare.blocks):
        prefix = model.general[[0]] if number == 0 else experts[nearest, number - 1]
        hidden = hidden + attend_with_prefix(block.attn, block.norm1(hidden), prefix)
        hidden = hidden + block.mlp(block.norm2(hidden))
    expected = model.vit.head(bare.norm(hidden)[:, 0])
    torch.testing.assert_close(strategy.model(images), expected, rtol=1e-4, atol=1e-5)
    alone = torch.cat([strategy.model(image[None]) for image in images])
    torch.testing.assert_close(strategy.model(images), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "task_adaptive"])
def test_past_prompts_and_backbone_stay_bit_for_bit(tiny_vit, tiny_benchmark, head):
    strategy = make(tiny_vit(), head=head)
    model = strategy.model.module
    parameters = dict(model.named_parameters())
    trained = {n for n, p in parameters.items() if p.requires_grad}
    assert trained == {
        "vit.head.weight",
        "vit.head.bias",
        "general",
        "experts.active",
        "experts.key",
    }
    finished = []
    for experience in tiny_benchmark.train_stream:
        before = {name: p.detach().clone() for name, p in parameters.items()}
        strategy.train(experience)
        same = {name for name, p in parameters.items() if torch.equal(before[name], p)}
        assert same == set(parameters) - trained
        assert all(torch.equal(a, b) for a, b in zip(finished, model.experts.past, strict=True))
        finished.append(model.experts.active.detach().clone())
        assert len(model.experts) == len(finished)


def test_the_key_comes_nearer_to_the_queries_of_its_task(tiny_vit, tiny_benchmark):
    strategy = make(tiny_vit(), train_epochs=5)
    images = images_of(tiny_benchmark.train_stream[:1])
    model = strategy.model.module

    def cosine():
        with torch.no_grad():
            return float(1 - model.experts.distance(model.query(images)))

    start = cosine()
    strategy.train(tiny_benchmark.train_stream[0])
    assert cosine() > start + 0.05


def test_a_task_that_was_interrupted_gets_one_prompt(tiny_vit, tiny_benchmark):
    class Interrupts(torch.nn.Module):
        def forward(self, logits, targets):
            raise KeyboardInterrupt

    strategy = make(tiny_vit())
    strategy.train(tiny_benchmark.train_stream[0])
    criterion, strategy._criterion = strategy._criterion, Interrupts()
    with pytest.raises(KeyboardInterrupt):
        strategy.train(tiny_benchmark.train_stream[1])
    assert len(strategy.model.module.experts) == 2
    strategy._criterion = criterion
    strategy.train(tiny_benchmark.train_stream[1])
    assert len(strategy.model.module.experts) == 2


def test_memory_per_task_is_one_prompt_and_one_key(tiny_vit, tiny_benchmark):
    strategy = make(tiny_vit(), expert_length=4)
    stored = []
    for experience in tiny_benchmark.train_stream:
        strategy.train(experience)
        stored.append(stored_bytes(strategy))
    per_task = (2 * 2 * 4 + 1) * 16 * 4  # layers, keys and values, length; width; bytes
    assert stored == [0, per_task, 2 * per_task]


def test_paper_defaults(tiny_vit):
    model = DualPrompt(tiny_vit(depth=6), evaluator=None).model.module
    assert (model.general_layers, model.expert_layers) == ((0, 1), (2, 3, 4))
    assert model.general.shape == (2, 2, 5, 2, 8)
    assert model.experts.active.shape == (3, 2, 20, 2, 8)


def test_past_of_another_shape_is_refused(tiny_vit, tiny_benchmark):
    prompts = TaskPrompts((2, 3), key_dim=4)
    prompts.fold()
    other = TaskPrompts((2, 3))
    with pytest.raises(
        ValueError, match=r"with keys \(0, 0\), but are \(1, 2, 3\) with keys \(1, 4\)"
    ):
        other.load_past_state(prompts.past_state())
    assert len(other) == 1


# --------------------------------------------------------------------------- refused arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_layers": (1, 3)}, r"`expert_layers` .* 0 to 2, but is \[1, 3\]"),
        ({"general_layers": ()}, r"`general_layers` .*, but is \[\]"),
        ({"general_layers": (0, 0)}, "different blocks"),
        ({"general_layers": (0, 1)}, "should have no block in common"),
        ({"general_length": 0}, "`general_length` should be at least 1, but is 0"),
        ({"expert_length": 0}, "`expert_length` should be at least 1"),
        ({"sim_coefficient": -1.0}, "`sim_coefficient`"),
        ({"head": "other"}, "`head`"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(tiny_vit, options, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        make(model, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_other_models_are_refused():
    resnet = timm.create_model("resnet10t", num_classes=4)
    with pytest.raises(ValueError, match="should be a VisionTransformer of timm for DualPrompt"):
        make(resnet)
    parallel = timm.models.VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=3,
        num_heads=2,
        block_fn=timm.models.vision_transformer.ParallelScalingBlock,
    )
    with pytest.raises(ValueError, match=r"blocks .* but has ParallelScalingBlock"):
        make(parallel)
