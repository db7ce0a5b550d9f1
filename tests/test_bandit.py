"""LCB search: bounds worked by hand, a slow reference, and invariants."""

import doctest
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import identical
from treelora_avalanche import bandit
from treelora_avalanche.bandit import LCBSearch, lower_confidence_bound, pooled_sigma
from treelora_avalanche.state import clone_state
from treelora_avalanche.tree import AdapterTree, FlatTree

# Nodes 4 (root), 5 (arms 0 and 1), 6 (arms 2 and 3).
FOUR_LEAVES = FlatTree(
    children=torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [5, 6], [0, 1], [2, 3]]),
    delta=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.2, 0.1]),
    root=4,
    height=2,
)
ONE_LEVEL = FlatTree(torch.tensor([[0, 0], [1, 1], [0, 1]]), torch.zeros(3), root=2, height=1)
ONE_ARM = FlatTree(torch.tensor([[0, 0]]), torch.zeros(1), root=0, height=0)


def random_tree(n_tasks, seed, depth=None):
    generator = torch.Generator().manual_seed(seed)
    signatures = torch.randn(n_tasks, 6, 8, generator=generator)
    return AdapterTree.build(signatures / signatures.abs().sum(-1, keepdim=True), depth).flatten()


def search_that_begins_with(nodes, tree, **options):
    """A search of one layer that prefers these nodes, never visited, in this order."""
    for seed in range(1000):
        search = LCBSearch(tree, 1, seed=seed, **options)
        if search.bounds[0, nodes].argsort().tolist() == list(range(len(nodes))):
            return search
    raise AssertionError("no seed gives this order")


class Reference:
    """One layer of the search in plain Python, from the whole history at every step."""

    def __init__(self, tree, horizon, c, unvisited_bounds):
        self.children = [sorted(set(row)) for row in tree.children.tolist()]
        self.delta = tree.delta.tolist()
        self.root = tree.root
        self.width = c * math.sqrt(math.log(horizon))
        self.bounds = list(unvisited_bounds)
        self.seen = defaultdict(list)  # node -> the distances observed through it

    def is_arm(self, node):
        return self.children[node] == [node]

    def select(self):
        self.path = [self.root]
        while not self.is_arm(self.path[-1]):
            self.path.append(min(self.children[self.path[-1]], key=self.bounds.__getitem__))
        return self.path[-1]

    def sigma(self):
        arms = [xs for node, xs in self.seen.items() if self.is_arm(node)]
        freedom = sum(len(xs) - 1 for xs in arms)
        if freedom < bandit.SIGMA_FREEDOM:
            return 1e9
        return max(math.sqrt(sum(len(xs) * np.var(xs) for xs in arms) / freedom), 1e-6)

    def bound(self, node):
        if node not in self.path:
            return self.bounds[node]
        seen = self.seen[node]
        own = sum(seen) / len(seen) - self.bonus_of_one / math.sqrt(len(seen))
        if self.is_arm(node):
            return own
        return max(min(self.bound(child) for child in self.children[node]), own - self.delta[node])

    def update(self, distance):
        for node in self.path:
            self.seen[node].append(distance)
        self.bonus_of_one = self.width * self.sigma()
        self.bounds = [self.bound(node) for node in range(len(self.bounds))]


def test_lower_confidence_bound_by_hand():
    # log T = 4, so the bonus of 16 observations with sigma 0.2 is 2 * 0.2 * sqrt(4 / 16) = 0.2.
    bound = lower_confidence_bound(
        torch.tensor([0.5, 0.5]), torch.tensor([16.0, 4.0]), torch.tensor(0.2), math.e**4
    )
    torch.testing.assert_close(bound, torch.tensor([0.3, 0.1]))


def test_a_single_step_of_horizon_has_no_bonus():
    bound = lower_confidence_bound(torch.tensor(0.5), torch.tensor(1.0), torch.tensor(0.2), 1)
    assert bound.item() == 0.5


def test_bounds_of_four_leaves_by_hand():
    # With this c, c sqrt(log T) = 1 and the bonus is sigma / sqrt(n).
    search = search_that_begins_with(
        [5, 6, 0, 1], FOUR_LEAVES, horizon=100, c=1 / math.sqrt(math.log(100))
    )
    # The first arm is pulled until sigma has five degrees of freedom: six times.
    for distance in (1.0, 1.2, 1.0, 1.2, 1.0, 1.2):
        assert search.select().item() == 0
        search.update(torch.tensor([distance]))
    # Mean 1.1, squared deviations 6 * 0.01, sigma = sqrt(0.06 / 5) = 0.10954.
    torch.testing.assert_close(search.sigma, torch.tensor([0.10954]), atol=1e-5, rtol=0)
    expected = {
        0: 1.05528,  # 1.1 - 0.10954 / sqrt(6)
        5: 0.85528,  # max(unvisited, 1.05528 - 0.2)
        4: 0.55528,  # max(unvisited, 1.05528 - 0.5)
    }
    assert_bounds(search, expected)
    assert (search.bounds[0, [1, 2, 3, 6]] < -1e6 + 1).all()

    arm = search.select().item()  # the other half has never been visited
    assert arm in (2, 3)
    search.update(torch.tensor([0.4]))
    other = 5 - arm
    expected |= {
        arm: 0.29046,  # 0.4 - 0.10954
        6: 0.19046,  # max(unvisited, 0.29046 - 0.1)
        4: 0.45860,  # mean (6 * 1.1 + 0.4) / 7 = 1; max(0.19046, 1 - 0.10954 / sqrt(7) - 0.5)
    }
    assert_bounds(search, expected)

    assert search.select().item() == other  # 0.19046 < 0.85528, then the unvisited arm
    search.update(torch.tensor([0.5]))
    expected |= {
        other: 0.39046,  # 0.5 - 0.10954
        6: 0.29046,  # max(min(0.29046, 0.39046), 0.45 - 0.10954 / sqrt(2) - 0.1 = 0.27254)
        4: 0.39877,  # max(min(0.85528, 0.29046), 7.5 / 8 - 0.10954 / sqrt(8) - 0.5)
    }
    assert_bounds(search, expected)
    assert search.counts[0].tolist() == [6, 0, 1, 1, 8, 6, 2]
    assert search.select().item() == arm


def assert_bounds(search, expected):
    for node, bound in expected.items():
        assert search.bounds[0, node].item() == pytest.approx(bound, abs=2e-5), f"node {node}"


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("depth", [None, 2])
def test_picks_are_those_of_the_reference(n_tasks, depth):
    tree = random_tree(n_tasks, seed=n_tasks, depth=depth)
    search = LCBSearch(tree, 2, horizon=200, seed=n_tasks)
    references = [Reference(tree, 200, 2.0, bounds.tolist()) for bounds in search.bounds]
    generator = torch.Generator().manual_seed(n_tasks)
    true = torch.rand(2, n_tasks, generator=generator)
    for step in range(200):
        arms = search.select()
        assert arms.tolist() == [reference.select() for reference in references], f"step {step}"
        distances = true.gather(1, arms[:, None]).squeeze(1)
        distances = distances + 0.1 * torch.randn(2, generator=generator)
        search.update(distances)
        for reference, distance in zip(references, distances.tolist(), strict=True):
            reference.update(distance)
    expected = torch.tensor([list(map(float, reference.bounds)) for reference in references])
    torch.testing.assert_close(search.bounds, expected, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(2, 40), st.integers(0, 10**6))
def test_sigma_is_the_pooled_standard_deviation_within_arms(n_tasks, seed):
    search = LCBSearch(random_tree(n_tasks, seed), 1, horizon=60, seed=seed)
    rng = np.random.default_rng(seed)
    seen = defaultdict(list)
    for _ in range(60):
        arm = search.select().item()
        seen[arm].append(rng.normal(1 + arm / n_tasks, 0.2))
        search.update(torch.tensor([seen[arm][-1]]))
    squares = sum(np.sum((np.array(xs) - np.mean(xs)) ** 2) for xs in seen.values())
    freedom = sum(len(xs) - 1 for xs in seen.values())
    assert search.sigma.item() == pytest.approx(math.sqrt(squares / freedom), rel=1e-3)
    for arm, xs in seen.items():
        assert search.means[0, arm].item() == pytest.approx(np.mean(xs), rel=1e-4)
        assert search.counts[0, arm].item() == len(xs)


def test_sigma_has_a_floor():
    assert pooled_sigma(torch.zeros(1), torch.tensor([4.0])).item() == pytest.approx(1e-6)
    assert pooled_sigma(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(1e-6)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 10**6))
def test_only_the_path_changes(n_tasks, depth, seed):
    tree = random_tree(n_tasks, seed, depth)
    parents = {c: n for n, row in enumerate(tree.children.tolist()) for c in row if c != n}
    search = LCBSearch(tree, 3, horizon=50, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        before = [t.clone() for t in (search.bounds, search.means, search.counts)]
        arms = search.select()
        search.update(torch.rand(3, generator=generator))
        for layer, arm in enumerate(arms.tolist()):
            path = [arm]
            while path[-1] != tree.root:
                path.append(parents[path[-1]])
            beside = [node for node in range(len(tree.children)) if node not in path]
            for old, new in zip(before, (search.bounds, search.means, search.counts), strict=True):
                assert torch.equal(old[layer, beside], new[layer, beside])
            assert torch.equal(before[2][layer, path] + 1, search.counts[layer, path])


def test_unvisited_nodes_come_first():
    # In a leaf that holds ten tasks nothing but the order of first visits matters: six pulls of the
    # first arm to learn sigma, then each other arm once.
    n = 10
    leaf = AdapterTree.build(torch.zeros(n, 1, 2), depth=1).flatten()
    delta = torch.cat([torch.zeros(n), torch.full((len(leaf.delta) - n,), math.inf)])
    search = LCBSearch(leaf._replace(delta=delta), 1, horizon=50)
    picks = []
    for _ in range(n + 5):
        picks.append(search.select().item())
        search.update(torch.tensor([0.5]))
    assert picks[:6] == picks[:1] * 6
    assert sorted(picks[5:]) == list(range(n))


class WideReference(Reference):
    """The search in which all members of a last leaf are children of one node."""

    def __init__(self, tree, *args):
        super().__init__(tree, *args)
        for node, delta in enumerate(self.delta):
            if delta < math.inf:
                self.children[node] = self.members_or_children(node)

    def members_or_children(self, node):
        below = [child for child in self.children[node] if self.delta[child] == math.inf]
        rest = [child for child in self.children[node] if self.delta[child] < math.inf]
        return rest + [m for child in below for m in self.members_or_children(child)]


@pytest.mark.parametrize("n_tasks", [9, 20, 33])
def test_halving_a_leaf_changes_no_bound(n_tasks):
    # The order of unvisited arms differs, so the reference takes the picks as given.
    tree = random_tree(n_tasks, seed=n_tasks, depth=1)
    assert tree.delta.isinf().any()
    search = LCBSearch(tree, 1, horizon=300, seed=n_tasks)
    reference = WideReference(tree, 300, 2.0, search.bounds[0].tolist())
    finite = tree.delta.isfinite().nonzero().squeeze(1)
    parents = {c: n for n in finite.tolist() for c in reference.children[n] if c != n}
    generator = torch.Generator().manual_seed(n_tasks)
    true = torch.rand(n_tasks, generator=generator)
    for _ in range(300):
        arm = search.select().item()
        leaf = parents[arm]
        reference.path = [tree.root, leaf, arm]
        tried = [bound > -1e6 for bound in map(reference.bounds.__getitem__, range(n_tasks))]
        if all(tried):
            assert reference.bounds[arm] == pytest.approx(
                min(reference.bounds[other] for other in reference.children[leaf]), abs=1e-4
            )
        distance = (true[arm] + 0.1 * torch.randn((), generator=generator)).item()
        search.update(torch.tensor([distance]))
        reference.update(distance)
    expected = torch.tensor(reference.bounds)[finite]
    torch.testing.assert_close(search.bounds[0, finite], expected, atol=1e-4, rtol=1e-4)


def picks(search, seed, steps=60):
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(search.means.shape[0], search.n_arms, generator=generator)
    arms = []
    for _ in range(steps):
        arms.append(search.select())
        distance = true.gather(1, arms[-1][:, None]).squeeze(1)
        search.update(distance + 0.1 * torch.randn(distance.shape, generator=generator))
    return torch.stack(arms)


def test_the_seed_decides():
    tree = random_tree(20, seed=0)
    first, again, other = (picks(LCBSearch(tree, 4, 60, seed=s), seed=1) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first[0].tolist())) > 1  # layers begin at different arms


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    LCBSearch(FOUR_LEAVES, 2, horizon=10).select()
    assert torch.equal(state, torch.get_rng_state())


def test_layers_are_independent():
    # Observations of other layers change nothing in layer 1.
    tree = random_tree(20, seed=0)
    searches = [LCBSearch(tree, 3, horizon=100, seed=4) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(20, generator=generator)
    for _ in range(100):
        arms = [search.select() for search in searches]
        assert arms[0][1] == arms[1][1]
        observed = true[arms[0][1]] + 0.1 * torch.randn((), generator=generator)
        for search in searches:
            distances = torch.rand(3, generator=generator)
            distances[1] = observed
            search.update(distances)
    assert torch.equal(searches[0].bounds[1], searches[1].bounds[1])
    assert not torch.equal(searches[0].bounds[0], searches[1].bounds[0])


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_finds_the_nearest_arm(depth):
    # A hierarchy of 32 tasks, each level at half the scale of the one above; each layer of the
    # current task is that of a task of the past.
    generator = torch.Generator().manual_seed(0)
    tasks = torch.zeros(1, 1, 16)
    for level in range(5):
        tasks = tasks.repeat_interleave(2, dim=0)
        tasks += 0.5**level * torch.randn(tasks.shape, generator=generator)
    tasks = (tasks / tasks.abs().sum(-1, keepdim=True)).repeat(1, 6, 1)  # (32, 6, 16)
    current = torch.randint(32, (6,), generator=generator)
    distances = (tasks[current, torch.arange(6)] - tasks).abs().sum(-1).T  # (n_layers, n_tasks)
    search = LCBSearch(AdapterTree.build(tasks, depth).flatten(), 6, horizon=1000)
    last = []
    for _ in range(1000):
        arms = search.select()
        true = distances.gather(1, arms[:, None]).squeeze(1)
        search.update(true + 0.05 * torch.randn(6, generator=generator))
        last.append(arms)
    assert torch.equal(search.best(), current)
    assert (torch.stack(last[-200:]) == current).float().mean() > 0.95


def test_best_does_not_trust_a_single_pull():
    search = search_that_begins_with([0, 1], ONE_LEVEL, horizon=100)
    for distance in (0.5, 0.7) * 3:
        assert search.select().item() == 0
        search.update(torch.tensor([distance]))
    assert search.select().item() == 1
    search.update(torch.tensor([0.55]))
    # sigma = 0.1095, bonus of one pull 2 * 0.1095 * sqrt(log 100) = 0.470, of six pulls 0.192:
    # upper bounds 0.6 + 0.192 and 0.55 + 0.470.
    assert search.best().item() == 0


def test_best_before_the_first_update():
    assert LCBSearch(FOUR_LEAVES, 2, horizon=10).best().tolist() == [0, 0]


def test_one_arm():
    search = LCBSearch(ONE_ARM, 3, horizon=10)
    for _ in range(10):
        assert search.select().tolist() == [0, 0, 0]
        search.update(torch.tensor([0.1, 0.2, 0.3]))
    assert search.best().tolist() == [0, 0, 0]
    torch.testing.assert_close(search.means, torch.tensor([[0.1], [0.2], [0.3]]))


def test_a_horizon_of_one_step():
    search = LCBSearch(FOUR_LEAVES, 2, horizon=1)
    arms = search.select()
    search.update(torch.tensor([0.1, 0.2]))
    assert torch.isfinite(search.bounds).all()
    assert torch.equal(search.best(), arms)


def test_selecting_again_changes_nothing():
    search = LCBSearch(FOUR_LEAVES, 2, horizon=10)
    assert torch.equal(search.select(), search.select())


def test_returned_arms_are_not_written_to():
    search = LCBSearch(FOUR_LEAVES, 2, horizon=10)
    first = search.select()
    kept = first.clone()
    for _ in range(8):
        arms = search.select()
        search.update(torch.rand(2))
    assert not torch.equal(arms, kept)
    assert torch.equal(first, kept)


def test_a_step_does_not_synchronise():
    # A tensor on the meta device has no values: a step that read one would raise.
    search = LCBSearch(random_tree(20, seed=0), 4, horizon=10, device="meta")
    for _ in range(3):
        arms = search.select()
        search.update(torch.empty(4, device="meta"))
    assert arms.shape == search.best().shape == (4,)


def test_statistics_stay_where_they_are():
    # Required by a captured CUDA graph.
    search = LCBSearch(random_tree(20, seed=0), 4, horizon=10)
    tensors = {k: v.data_ptr() for k, v in vars(search).items() if isinstance(v, torch.Tensor)}
    for _ in range(3):
        search.select()
        search.update(torch.rand(4))
    assert tensors == {
        k: v.data_ptr() for k, v in vars(search).items() if isinstance(v, torch.Tensor)
    }


def test_no_gradient_is_recorded():
    search = LCBSearch(FOUR_LEAVES, 2, horizon=10)
    search.select()
    search.update(torch.rand(2, requires_grad=True))
    assert not search.means.requires_grad
    assert not search.bounds.requires_grad


@pytest.mark.parametrize(("name", "options"), [("n_layers", (0, 10)), ("horizon", (5, 0))])
def test_numbers_below_one_are_refused(name, options):
    with pytest.raises(ValueError, match=f"`{name}` should be at least 1, but is 0"):
        LCBSearch(FOUR_LEAVES, *options)


def test_update_needs_a_selection_each_time():
    search = LCBSearch(FOUR_LEAVES, 2, horizon=10)
    with pytest.raises(RuntimeError, match="Call `select` first"):
        search.update(torch.rand(2))
    search.select()
    search.update(torch.rand(2))
    with pytest.raises(RuntimeError, match="Call `select` first"):
        search.update(torch.rand(2))


def test_update_needs_one_distance_per_layer():
    search = LCBSearch(FOUR_LEAVES, 2, horizon=10)
    search.select()
    with pytest.raises(ValueError, match=r"shape \(2,\).*\(3,\)"):
        search.update(torch.rand(3))
    search.update(torch.rand(2))  # the selection is still there


def test_examples_in_the_documentation():
    assert doctest.testmod(bandit).failed == 0


def test_a_loaded_search_continues_like_the_saved_one():
    tree = AdapterTree.build(torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)))
    noise = torch.rand(60, 2, generator=torch.Generator().manual_seed(1))
    search = LCBSearch(tree.flatten(), 2, horizon=60)
    for xi in noise[:30]:
        search.select()
        search.update(xi)
    search.select()  # in the middle of a step
    other = LCBSearch(tree.flatten(), 2, horizon=9, seed=7)
    means = other.means
    other.load_state_dict(clone_state(search.state_dict()))
    assert other.means is means
    for xi in noise[30:]:
        for each in (search, other):
            each.update(xi)
        assert torch.equal(search.select(), other.select())
    assert identical(search.state_dict(), other.state_dict())

    before = clone_state(other.state_dict())
    with pytest.raises(ValueError, match="keys"):
        other.load_state_dict({})
    larger = LCBSearch(tree.flatten(), 3, horizon=9)
    with pytest.raises(ValueError, match=r"should have the shape \(2, .*Use the tree"):
        other.load_state_dict(larger.state_dict())
    state = {**search.state_dict(), "children": search.state_dict()["children"].flip(0)}
    with pytest.raises(ValueError, match="another tree"):
        other.load_state_dict(state)
    assert identical(other.state_dict(), before)
