"""Streams with known relations: contents of the tasks, and their groups."""

import pytest
import torch
from avalanche.training import Naive
from PIL import Image
from torch import nn

from treelora_avalanche.models import ImagePreprocessing
from treelora_avalanche.models.digits import load_digits
from treelora_avalanche.scenarios import SplitDigits, SplitImageFolder
from treelora_avalanche.scenarios.related_tasks import (
    CALTECH101_GROUPS,
    TEXT_GROUPS,
    DomainDigits,
    GroupedImageFolder,
    GroupedTexts,
    ReturningTasks,
)

TINY = ImagePreprocessing(input_size=(3, 8, 8))


def images_and_targets(experience):
    images, targets = zip(*((x, int(y)) for x, y, *_ in experience.dataset), strict=True)
    return torch.stack(images), torch.tensor(targets)


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


# --------------------------------------------------------------------------------- returning tasks


@pytest.mark.parametrize("order", ["shuffled", "rounds"])
def test_parts_of_a_task_are_disjoint_balanced_and_of_its_own_images(order):
    once = SplitDigits(5, seed=1)
    stream = ReturningTasks(once, 2, order=order, seed=0)
    assert len(stream.train_stream) == len(stream.test_stream) == len(stream.groups) == 10
    for experience in once.train_stream:
        images, _ = images_and_targets(experience)
        classes = experience.classes_in_this_experience
        parts = [
            images_and_targets(e)
            for e in stream.train_stream
            if e.classes_in_this_experience == classes
        ]
        assert len(parts) == 2
        (first, targets), (second, other_targets) = parts
        assert rows(first) | rows(second) <= rows(images)
        assert not rows(first) & rows(second)
        assert targets.bincount().tolist() == other_targets.bincount().tolist()
        assert len(images) - len(first) - len(second) <= len(classes)  # an odd image of each class


def test_groups_name_the_task_that_returns():
    once = SplitDigits(5, seed=1)
    stream = ReturningTasks(once, 3, seed=4)
    for group, train, test in zip(
        stream.groups, stream.train_stream, stream.test_stream, strict=True
    ):
        assert group == ", ".join(str(c) for c in sorted(train.classes_in_this_experience))
        assert test.classes_in_this_experience == train.classes_in_this_experience


def test_rounds_repeat_the_order_of_the_benchmark():
    once = DomainDigits(seed=3)
    stream = ReturningTasks(once, 2, order="rounds", seed=0)
    assert stream.groups == once.domain_names * 2
    assert stream.class_names == [str(d) for d in range(10)]


def test_the_seed_draws_the_order_and_the_parts():
    once = SplitDigits(5, seed=1)

    def drawn(seed):
        stream = ReturningTasks(once, 2, seed=seed)
        return stream.groups, images_and_targets(stream.train_stream[0])[0]

    groups, images = drawn(0)
    assert drawn(0)[0] == groups
    assert torch.equal(drawn(0)[1], images)
    assert any(drawn(seed)[0] != groups for seed in (1, 2))


def test_wrong_arguments_are_explained():
    once = SplitDigits(5, seed=1)
    with pytest.raises(ValueError, match="`times` should be at least 1, but is 0"):
        ReturningTasks(once, 0)
    with pytest.raises(ValueError, match="rounds"):
        ReturningTasks(once, order="round")
    with pytest.raises(ValueError, match=r"`times` .* but is 90, and class \d has only"):
        ReturningTasks(once, 90)


def test_avalanche_trains_on_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = model[1].weight.clone()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        train_mb_size=64,
        evaluator=None,
    )
    strategy.train(ReturningTasks(SplitDigits(5, seed=0), 2, seed=0).train_stream[:2])
    assert not torch.equal(model[1].weight, before)


# --------------------------------------------------------------------------------------- renditions


def test_digits_in_four_renditions_are_other_digits_each():
    digits = load_digits()
    stream = DomainDigits(seed=0)
    found = {
        name: images_and_targets(e)
        for name, e in zip(stream.domain_names, stream.train_stream, strict=True)
    }
    assert set(found) == {"plain", "negative", "turned", "shuffled"}
    counts = {tuple(targets.bincount().tolist()) for _, targets in found.values()}
    assert counts == {tuple(n // 4 for n in digits.train_labels.bincount().tolist())}
    original = {tuple(x.flatten().tolist()): i for i, x in enumerate(digits.train_images)}

    def rows_of(images):
        return [original[tuple(image.flatten().tolist())] for image in images]

    plain = rows_of(found["plain"][0])
    negative = rows_of(-found["negative"][0])
    turned = rows_of(found["turned"][0].transpose(2, 3).flip(3))  # a quarter turn to the right
    assert len({*plain, *negative, *turned}) == len(plain) + len(negative) + len(turned)
    assert digits.train_labels[turned].tolist() == found["turned"][1].tolist()
    # The pixels of the rest are in another order, which is the same in all images.
    pixels = {tuple(x.flatten().sort()[0].tolist()): i for i, x in enumerate(digits.train_images)}
    shuffled = found["shuffled"][0].flatten(1)
    others = [pixels[tuple(x.sort()[0].tolist())] for x in shuffled]
    assert not {*others} & {*plain, *negative, *turned}
    columns = digits.train_images[others].flatten(1).T
    assert not torch.equal(shuffled.T, columns)
    assert {tuple(c.tolist()) for c in shuffled.T} == {tuple(c.tolist()) for c in columns}


# ------------------------------------------------------------------------------------------- groups


@pytest.fixture
def folder(tmp_path):
    groups = {"pets": ("cat", "dog", "hen", "pig"), "tools": ("axe", "saw")}
    for blue, (part, n) in enumerate((("train", 3), ("test", 2))):
        for names in groups.values():
            for i, name in enumerate(names):
                (tmp_path / part / name).mkdir(parents=True)
                for k in range(n):
                    Image.new("RGB", (9, 9), (20 * i, 40 * k, blue)).save(
                        tmp_path / part / name / f"{k}.png"
                    )
    return tmp_path, groups


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_task_holds_classes_of_its_group_alone(folder, seed):
    root, groups = folder
    stream = GroupedImageFolder(root, groups, 2, preprocessing=TINY, seed=seed)
    assert sorted(stream.groups) == ["pets", "pets", "tools"]
    seen = []
    for group, experience in zip(stream.groups, stream.train_stream, strict=True):
        names = [stream.class_names[c] for c in experience.classes_in_this_experience]
        assert len(names) == 2
        assert set(names) <= set(groups[group])
        seen += names
    assert sorted(seen) == sorted(sum(groups.values(), ()))


def test_groups_that_do_not_divide_are_refused(folder):
    root, groups = folder
    with pytest.raises(
        ValueError, match=r"`classes_per_task` .* the 2 classes of 'tools' evenly, but is 4\."
    ):
        GroupedImageFolder(root, groups, 4, preprocessing=TINY)


def test_the_groups_of_caltech101_are_classes_of_it(data_root):
    root = data_root / "caltech101"
    if not root.is_dir():
        pytest.skip(f"no data: {root} is missing")
    names = sum(CALTECH101_GROUPS.values(), ())
    benchmark = SplitImageFolder(root, 1, classes=names, preprocessing=TINY, cache_bytes=0)
    assert benchmark.class_names == list(names)
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------- texts


def test_texts_of_a_group_share_their_instruction(o_lora, make_tokenizer):
    stream = GroupedTexts(o_lora, make_tokenizer(), limit=2, seed=3)
    names = stream.task_names
    assert sorted(names) == sorted(name for of_group in TEXT_GROUPS.values() for name in of_group)
    assert all(name in TEXT_GROUPS[group] for name, group in zip(names, stream.groups, strict=True))
    asked = {}
    for group, experience in zip(stream.groups, stream.train_stream, strict=True):
        instructions = {prompt.split("\n")[0] for prompt in experience.prompts}
        assert asked.setdefault(group, instructions) == instructions
    assert len(set(map(frozenset, asked.values()))) == len(TEXT_GROUPS)


def test_order_of_the_texts_is_drawn_by_the_seed(o_lora, make_tokenizer):
    groups = {"one": ("CB", "RTE"), "other": ("SST-2",)}
    orders = {
        tuple(GroupedTexts(o_lora, make_tokenizer(), groups, limit=1, seed=seed).task_names)
        for seed in [*range(12), *range(12)]
    }
    assert 1 < len(orders) <= 6
    with pytest.raises(ValueError, match="Yelp"):
        GroupedTexts(o_lora, make_tokenizer(), {"one": ("Yelp",)})
