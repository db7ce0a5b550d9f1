"""K-D tree: cases worked by hand, brute force, and the invariants of Section 3.1."""

import doctest
import json
import math
import sys

import numpy as np
import pytest
import rich.console
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import identical
from treelora_avalanche.state import clone_state
from treelora_avalanche.tree import AdapterTree, FlatTree, Merge, closest_pair, principal_direction

SPLITS = ("principal", "median_l1")
properties = settings(deadline=None, max_examples=30, derandomize=True)
seeds = st.integers(0, 10**6)


def random_signatures(n_tasks, n_layers=4, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signatures = torch.randn(n_tasks, n_layers, dim, generator=generator)
    return signatures / signatures.abs().sum(-1, keepdim=True)


def on_a_line(*positions, n_layers=1):
    """Signatures (1 - x, x) in each layer; the L1 distance of x and y is 2 |x - y|."""
    x = torch.tensor(positions)
    return torch.stack([1 - x, x], dim=-1)[:, None].repeat(1, n_layers, 1)


def inserted(signatures, *args, **options):
    tree = AdapterTree(*args, **options)
    for signature in signatures:
        tree.insert(signature)
    return tree


def structure(node, names=None):
    """Nested tuples of the members of leaves."""
    if node.children is None:
        return tuple(sorted(k if names is None else names[k] for k in node.members))
    return tuple(structure(child, names) for child in node.children)


def without_order(structure):
    """The same with sets in place of tuples."""
    return frozenset(without_order(s) if isinstance(s, tuple) else s for s in structure)


def height(node):
    return 0 if node.children is None else 1 + max(map(height, node.children))


def arms_beneath(flat, node):
    if flat.children[node, 0] == node:
        return [node]
    return [arm for child in flat.children[node].tolist() for arm in arms_beneath(flat, child)]


def delta_by_definition(tree, node):
    layer = min(node.level, tree.signatures.shape[1] - 1)
    group = tree.signatures.numpy().astype(np.float64)[node.members, layer]
    return np.median(np.abs(group - group.mean(0)).sum(1))


def assert_invariants(tree):
    root = tree.root
    assert root.level == 0
    assert root.members == list(range(len(tree)))
    leaves = [node for node in root.walk() if node.children is None]
    assert sorted(k for leaf in leaves for k in leaf.members) == list(range(len(tree)))
    for node in root.walk():
        assert node.delta >= 0
        assert node.delta == pytest.approx(delta_by_definition(tree, node), abs=1e-9)
        assert node.level <= tree.depth
        if node.children is None:
            assert len(node.members) == 1 or node.level == tree.depth
        else:
            left, right = node.children
            assert node.members == sorted(left.members + right.members)
            assert left.level == right.level == node.level + 1
            for child in node.children:
                mean = tree.signatures[child.members, node.level].double().mean(0)
                torch.testing.assert_close(child.mean, mean)
    flat = tree.flatten()
    assert sorted(arms_beneath(flat, flat.root)) == list(range(len(tree)))


# The split


def test_hierarchy_on_separate_axes_is_split_level_by_level():
    # Bit d of a task's number moves it along axis d, less with each d: 1, 0.4, 0.16.
    bits = torch.tensor([[k >> 2 & 1, k >> 1 & 1, k & 1] for k in range(8)])
    signatures = (bits * torch.tensor([1.0, 0.4, 0.16]))[:, None].repeat(1, 3, 1)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    tree = AdapterTree.build(signatures[order])
    assert structure(tree.root, order) == (
        (((0,), (1,)), ((2,), (3,))),
        (((4,), (5,)), ((6,), (7,))),
    )
    # All members are equally far from the mean: half of the edge of their box along each axis.
    deltas = {len(node.members): node.delta for node in tree.root.walk()}
    assert deltas == pytest.approx({8: 0.5 + 0.2 + 0.08, 4: 0.2 + 0.08, 2: 0.08, 1: 0}, abs=1e-7)


def test_each_level_splits_by_its_own_layer():
    layer_0 = torch.tensor([0.1, 0.9, 0.2, 0.8])  # parts {0, 2} from {1, 3}
    layer_1 = torch.tensor([0.5, 0.4, 0.3, 0.6])  # within each, 2 < 0 and 1 < 3
    x = torch.stack([layer_0, layer_1], dim=1)
    tree = AdapterTree.build(torch.stack([x, 1 - x], dim=-1))  # left: the smaller 1 - y = x first
    assert structure(tree.root) == (((2,), (0,)), ((1,), (3,)))


def test_split_of_the_paper_puts_near_and_far_into_two_children():
    # Mean 0.5; distances 2 |x - 0.5| = 0.6, 0.2, 0, 0.2, 0.6: the nearer three go left.
    tree = AdapterTree.build(on_a_line(0.2, 0.4, 0.5, 0.6, 0.8), 1, split="median_l1")
    assert structure(tree.root) == ((1, 2, 3), (0, 4))
    assert tree.root.delta == pytest.approx(0.2)
    tree = AdapterTree.build(on_a_line(0.2, 0.4, 0.5, 0.6, 0.8), 1, split="principal")
    assert structure(tree.root) == ((2, 3, 4), (0, 1))
    assert tree.root.delta == pytest.approx(0.2)


def test_threshold_of_an_even_group_is_between_the_middle_two():
    # Mean 0.35; distances 0.7, 0.5, 0.3, 0.9, in order 0.3 0.5 0.7 0.9.
    tree = AdapterTree.build(on_a_line(0.0, 0.1, 0.5, 0.8))
    assert tree.root.delta == pytest.approx(0.6)


@properties
@given(st.integers(2, 40), seeds)
def test_principal_direction_is_that_of_the_svd(n_members, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([4.0, 1.0, 0.5, 0.3, 0.2])
    axes = torch.linalg.qr(torch.randn(5, 5, generator=generator).double()).Q
    group = (torch.randn(n_members, 5, generator=generator) * spread).double() @ axes
    centred = group - group.mean(0)
    values, directions = np.linalg.svd(centred.numpy())[1:]
    if len(values) > 1 and values[1] > 0.6 * values[0]:
        return  # 16 iterations reduce the second direction by 0.6 ** 32 at least
    direction = principal_direction(centred)
    assert abs(np.dot(direction.numpy(), directions[0])) == pytest.approx(1, abs=1e-6)
    assert direction[direction.abs().argmax()] > 0


@properties
@given(st.integers(1, 60), seeds)
def test_partition_is_that_of_brute_force(n_tasks, seed):
    # One dimension varies, so the principal direction is known.
    values = np.random.default_rng(seed).uniform(size=(n_tasks, 3)).astype(np.float32)
    signatures = torch.tensor(np.stack([values, np.zeros_like(values)], axis=-1))

    def partition(members, level):
        if len(members) == 1 or level == 3:
            return tuple(sorted(members))
        order = sorted(members, key=lambda k: values[k, level])
        middle = math.ceil(len(order) / 2)
        return partition(order[:middle], level + 1), partition(order[middle:], level + 1)

    assert structure(AdapterTree.build(signatures).root) == partition(range(n_tasks), 0)


# Invariants


@properties
@given(st.integers(1, 50), st.integers(1, 6), st.sampled_from(SPLITS), seeds)
def test_invariants_of_a_built_tree(n_tasks, depth, split, seed):
    tree = AdapterTree.build(random_signatures(n_tasks, 6, seed=seed), depth, split=split)
    assert_invariants(tree)
    assert height(tree.root) == min(depth, math.ceil(math.log2(n_tasks)))
    for node in tree.root.walk():
        if node.children is not None:
            left, right = node.children
            assert len(left.members) - len(right.members) in (0, 1)


@properties
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from(SPLITS), seeds)
def test_invariants_after_insertions(n_tasks, depth, split, seed):
    tree = inserted(random_signatures(n_tasks, 6, seed=seed), depth, split=split)
    assert_invariants(tree)
    assert tree.tasks == [[k] for k in range(n_tasks)]
    assert tree.n_tasks == len(tree) == n_tasks


@properties
@given(st.integers(1, 40), st.integers(1, 8), seeds)
def test_invariants_within_a_budget(n_tasks, max_adapters, seed):
    tree = AdapterTree(max_adapters=max_adapters)
    for task, signature in enumerate(random_signatures(n_tasks, seed=seed)):
        merges = tree.insert(signature)
        assert len(merges) == (task >= max_adapters)
    assert_invariants(tree)
    assert len(tree) == min(n_tasks, max_adapters)
    assert sorted(task for tasks in tree.tasks for task in tasks) == list(range(n_tasks))
    torch.testing.assert_close(tree.signatures.abs().sum(-1), torch.ones(len(tree), 4))


@settings(properties, max_examples=15)
@given(st.permutations(range(17)), st.sampled_from(SPLITS), seeds)
def test_order_of_arrival_does_not_matter_after_a_rebuild(order, split, seed):
    signatures = random_signatures(17, 5, seed=seed)
    tree = inserted(signatures[order], split=split)
    tree.rebuild()
    actual = structure(tree.root, order)
    expected = structure(AdapterTree.build(signatures, split=split).root)
    if split == "median_l1":  # two members are equally far from their mean: a tie
        actual, expected = without_order(actual), without_order(expected)
    assert actual == expected


@pytest.mark.parametrize("positions", [[0.9**k for k in range(120)], [k / 120 for k in range(120)]])
@pytest.mark.parametrize("depth", [3, 5, 24])
def test_balance_after_adversarial_insertions(positions, depth):
    # Each task lies beyond its predecessors: without rebuilds the tree is one long branch.
    tree = inserted(on_a_line(*positions, n_layers=24), depth)
    for node in tree.root.walk():
        n = len(node.members)
        assert height(node) <= 2 * math.ceil(math.log2(n))
        for leaf in node.walk():
            if leaf.level == depth:
                assert len(leaf.members) <= 2 * math.ceil(n / 2 ** (depth - node.level))
    assert_invariants(tree)


# Insertion


def test_a_task_goes_to_the_nearest_leaf_which_is_split():
    tree = inserted(on_a_line(0.1, 0.9, 0.2, n_layers=3))
    # On the line large x come first, as the principal direction is (1, -1) / sqrt 2.
    assert structure(tree.root) == ((1,), ((2,), (0,)))
    large, small = tree.root.children
    torch.testing.assert_close(small.mean, torch.tensor([0.85, 0.15], dtype=torch.float64))
    tree.insert(on_a_line(0.5, n_layers=3)[0])  # 0.7 from the mean 0.15, 0.8 from 0.9
    assert structure(tree.root) == ((1,), (((3,), (2,)), (0,)))
    tree.insert(on_a_line(0.6, n_layers=3)[0])  # 0.67 from the mean 0.27, 0.6 from 0.9
    assert structure(tree.root) == (((1,), (4,)), (((3,), (2,)), (0,)))
    assert large.members == [1, 4]


def test_a_last_level_leaf_holds_many():
    tree = inserted(on_a_line(0.1, 0.9, 0.2), depth=1)
    assert sorted(map(len, structure(tree.root))) == [1, 2]
    flat = tree.flatten()
    assert flat.height == 2
    leaf = next(node for node in tree.root.walk() if node.members == [0, 2])
    assert leaf.delta == pytest.approx(0.1)  # each 2 * 0.05 from their mean, 0.15


def test_two_thousand_insertions():
    tree = inserted(random_signatures(2000, 16, 8))
    assert len(tree) == 2000
    assert_invariants(tree)
    assert height(tree.root) <= 22


def test_identical_signatures():
    for make in (inserted, AdapterTree.build):
        for split in SPLITS:
            tree = make(random_signatures(1, 3).repeat(20, 1, 1), split=split)
            assert_invariants(tree)
            assert all(node.delta == pytest.approx(0, abs=1e-9) for node in tree.root.walk())


def test_signatures_of_zeros():
    tree = inserted(torch.zeros(5, 2, 3), max_adapters=3)
    assert_invariants(tree)
    assert torch.equal(tree.signatures, torch.zeros(3, 2, 3))


def test_signatures_are_copied_and_kept_in_float32():
    signature = random_signatures(1)[0].double()
    kept = signature.clone().float()
    tree = AdapterTree()
    tree.insert(signature.requires_grad_())
    with torch.no_grad():
        signature.zero_()
    assert torch.equal(tree.signatures[0], kept)
    tree.insert(torch.zeros(4, 6, dtype=torch.bfloat16))
    assert tree.signatures.dtype == torch.float32


def test_default_depth_is_the_number_of_layers_and_at_most_64():
    assert inserted(random_signatures(1, 5)).depth == 5
    assert inserted(random_signatures(1, 70)).depth == 64


# Merging


def test_merge_by_hand():
    tree = AdapterTree(max_adapters=2)
    a, b, c, d = on_a_line(0.0, 0.2, 1.0, 0.3, n_layers=2)
    assert tree.insert(a) == tree.insert(b) == []
    # Distances summed over two layers: a-b 0.8, a-c 4, b-c 3.2. One task each: weight 1/2.
    assert tree.insert(c) == [Merge(kept=0, absorbed=1, kept_weight=0.5)]
    assert tree.tasks == [[0, 1], [2]]
    torch.testing.assert_close(tree.signatures, on_a_line(0.1, 1.0, n_layers=2))
    # ab-d 0.8, c-d 2.8. Two tasks of three: (2 * 0.1 + 0.3) / 3 = 1/6.
    assert tree.insert(d) == [Merge(kept=0, absorbed=2, kept_weight=2 / 3)]
    assert tree.tasks == [[0, 1, 3], [2]]
    torch.testing.assert_close(tree.signatures, on_a_line(1 / 6, 1.0, n_layers=2))
    assert tree.n_tasks == 4
    assert_invariants(tree)


def test_merged_signature_has_norm_one():
    # The mean of (1/2, 1/2) and (1/2, -1/2) is (1/2, 0).
    halves = torch.tensor([[[0.5, 0.5]], [[0.5, -0.5]]])
    tree = inserted(halves, max_adapters=1)
    assert torch.equal(tree.signatures, torch.tensor([[[1.0, 0.0]]]))


def test_build_merges_down_to_the_budget():
    tree = AdapterTree.build(on_a_line(0.0, 0.5, 0.01, 0.9, 0.53), max_adapters=3)
    assert tree.tasks == [[0, 2], [1, 4], [3]]
    torch.testing.assert_close(tree.signatures, on_a_line(0.005, 0.515, 0.9))
    assert_invariants(tree)


@properties
@given(st.integers(2, 12), seeds)
def test_closest_pair_is_that_of_brute_force(n_adapters, seed):
    signatures = random_signatures(n_adapters, seed=seed)
    x = signatures.numpy().astype(np.float64)
    pairs = [(i, j) for j in range(n_adapters) for i in range(j)]
    assert closest_pair(signatures) == min(pairs, key=lambda p: np.abs(x[p[0]] - x[p[1]]).sum())


# Other forms


def test_flat_tree_by_hand():
    flat = AdapterTree.build(on_a_line(0.1, 0.9, 0.3, 0.5, 0.8), depth=1).flatten()
    # Projections are on (1, -1) / sqrt 2, so large x come first: {1, 4, 3}, then {0, 2}.
    assert flat.children.tolist() == [
        [0, 0],
        [1, 1],
        [2, 2],
        [3, 3],
        [4, 4],
        [6, 7],
        [8, 4],  # three in a leaf: two of them first
        [0, 2],
        [1, 3],
    ]
    assert (flat.root, flat.height) == (5, 3)
    # Mean 0.52, distances 0.84 0.76 0.44 0.04 0.56; mean 2.2 / 3, distances 1/3, 7/15, 2/15.
    expected = torch.tensor([0, 0, 0, 0, 0, 0.56, 1 / 3, 0.2, math.inf])
    torch.testing.assert_close(flat.delta, expected)


def test_flat_tree_of_one_task():
    flat = inserted(random_signatures(1)).flatten()
    assert flat.children.tolist() == [[0, 0]]
    assert flat.delta.tolist() == [0]
    assert (flat.root, flat.height) == (0, 0)


@properties
@given(st.integers(0, 30), st.integers(1, 5), st.sampled_from([None, 6]), seeds)
def test_a_restored_tree_grows_like_the_original(n_tasks, depth, max_adapters, seed):
    signatures = random_signatures(n_tasks + 10, 5, seed=seed)
    tree = inserted(signatures[:n_tasks], depth, max_adapters=max_adapters)
    state = tree.to_dict()
    tensors = {name: state.pop(name).clone() for name in ("signatures", "totals")}
    restored = AdapterTree.from_dict({**json.loads(json.dumps(state)), **tensors})
    assert_same(restored, tree)
    for signature in signatures[n_tasks:]:
        assert restored.insert(signature) == tree.insert(signature)
    assert_same(restored, tree)


def assert_same(first, second):
    one, other = first.to_dict(), second.to_dict()
    for name in ("signatures", "totals"):
        assert torch.equal(one.pop(name), other.pop(name))
    assert one == other
    assert first.n_tasks == second.n_tasks
    if len(first):
        for x, y in zip(first.flatten(), second.flatten(), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_drawing():
    tree = AdapterTree.build(on_a_line(0.0, 0.01, 0.6, 1.0), max_adapters=3)
    console = rich.console.Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(tree.draw())
    text = capture.get()
    assert "level 0  δ 0.93" in text  # of x = 0.005, 0.6, 1: mean 0.535, 2 * (1 - 0.535) = 0.93
    assert "level 1  adapter 0: tasks 0, 1" in text
    assert "level 1  δ 0.4  (2 tasks)  adapter 1: task 2; adapter 2: task 3" in text


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "`depth` should be at least 1, but is 0"),
        ({"max_adapters": 0}, "`max_adapters` should be at least 1, but is 0"),
        (
            {"split": "principle"},
            "median_l1, but is 'principle'. Did you mean 'principal'",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterTree(**options)


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (torch.zeros(6), r"shape \(n_layers, dim\), but has the shape \(6,\)"),
        (torch.zeros(4, 0), r"shape \(n_layers, dim\), but has the shape \(4, 0\)"),
        (torch.zeros(4, 7), r"shape \(4, 6\) of the past tasks, but has the shape \(4, 7\)"),
        (torch.zeros(5, 6), r"shape \(4, 6\) of the past tasks, but has the shape \(5, 6\)"),
        (torch.full((4, 6), math.nan), "finite, but 24 of its 24 values"),
        (torch.full((4, 6), math.inf), "finite, but 24 of its 24 values"),
    ],
)
def test_a_refused_signature_leaves_the_tree_as_it_was(signature, message):
    tree = inserted(random_signatures(5), max_adapters=5)
    before = inserted(random_signatures(5), max_adapters=5)
    with pytest.raises(ValueError, match=message):
        tree.insert(signature)
    assert_same(tree, before)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"floating point, but has the dtype torch.int64"):
        AdapterTree().insert(torch.zeros(2, 2, dtype=torch.long))


def test_depth_beyond_the_layers_is_refused():
    message = "`depth` should be at most 4, the number of layers of `signature`, but is 5"
    with pytest.raises(ValueError, match=message):
        AdapterTree(5).insert(random_signatures(1)[0])


def test_a_batch_of_another_shape_is_refused():
    for shape in ((3, 4), (0, 3, 4)):
        with pytest.raises(ValueError, match=r"\(n_tasks, n_layers, dim\)"):
            AdapterTree.build(torch.zeros(shape))


def test_an_empty_tree_has_no_root():
    for use in (AdapterTree().flatten, AdapterTree().draw):
        with pytest.raises(ValueError, match="Call `insert`"):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 2, but has the version 99"),
        ({"signatures": torch.zeros(2, 4, 6)}, r"\(3, n_layers, dim\).* \(2, 4, 6\)"),
        ({"root": {"left": [0], "right": [1]}}, "each of the 3 adapters once"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    state = inserted(random_signatures(3)).to_dict()
    with pytest.raises(ValueError, match=message):
        AdapterTree.from_dict(state | change)


@pytest.mark.parametrize("module", [AdapterTree, Merge, FlatTree])
def test_examples_in_the_documentation(module):
    result = doctest.testmod(sys.modules[module.__module__])
    assert result.attempted
    assert not result.failed


@given(n=st.integers(0, 12), max_adapters=st.sampled_from([None, 3]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_loaded_tree_grows_like_the_saved_one(n, max_adapters, seed):
    generator = torch.Generator().manual_seed(seed)
    # Of such different sizes that the order of summation shows in the last bit.
    scales = 10.0 ** -torch.randint(0, 13, (n + 6, 3, 5), generator=generator)
    signatures = torch.randn(n + 6, 3, 5, generator=generator) * scales
    tree, other = (AdapterTree(max_adapters=max_adapters) for _ in range(2))
    for signature in signatures[:n]:
        tree.insert(signature)
    other.insert(torch.ones(2, 2))  # it is replaced
    other.load_state_dict(clone_state(tree.state_dict()))
    for signature in signatures[n:]:
        assert other.insert(signature) == tree.insert(signature)
        assert identical(other.state_dict(), tree.state_dict())
    assert all(map(torch.equal, tree.flatten()[:2], other.flatten()[:2]))
