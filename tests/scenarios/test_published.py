"""Benchmarks of published data sets, on small folders in the published layouts."""

import hashlib
import pickle
import re
import shutil
import tarfile
from itertools import chain
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from avalanche.training import EWC, LwF, Naive, Replay
from PIL import Image
from torch.utils.data import DataLoader

from treelora_avalanche.models import ImagePreprocessing
from treelora_avalanche.scenarios import (
    DomainImageFolder,
    SplitCIFAR100,
    SplitCUB200,
    SplitImageFolder,
    SplitImageNetR,
    cifar100,
    imagenet_r,
)
from treelora_avalanche.scenarios.data import archives
from treelora_avalanche.scenarios.data import images as image_data

TINY = ImagePreprocessing(input_size=(3, 8, 8))


@pytest.fixture(autouse=True)
def _clear_image_caches():
    yield
    image_data._decoded.cache_clear()
    cifar100._resized.cache_clear()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", refuse)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **_: url)


def write_images(folder, n, seed=0, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image_{i:03d}{suffix}")


def batches(stream):
    """All samples of a stream, in order."""
    loaders = [DataLoader(experience.dataset, batch_size=256) for experience in stream]
    x, y, task = zip(*[batch for loader in loaders for batch in loader], strict=True)
    return torch.cat(x), torch.cat(y), torch.cat(task)


def order_of(benchmark):
    return [sorted(e.classes_in_this_experience) for e in benchmark.train_stream]


def same_streams(a, b):
    return all(
        torch.equal(p, q)
        for stream in ("train_stream", "test_stream")
        for p, q in zip(batches(getattr(a, stream)), batches(getattr(b, stream)), strict=True)
    )


def check_is_class_incremental(benchmark, n_experiences):
    """Classes disjoint and complete, the same in both streams, labels never remapped."""
    assert len(benchmark.train_stream) == len(benchmark.test_stream) == n_experiences
    assert benchmark.n_classes == len(benchmark.class_names)
    assert sorted(chain(*order_of(benchmark))) == list(range(benchmark.n_classes))
    for train, test in zip(benchmark.train_stream, benchmark.test_stream, strict=True):
        labels = set(train.classes_in_this_experience)
        assert set(test.classes_in_this_experience) == labels
        assert set(train.dataset.targets) == set(test.dataset.targets) == labels
        assert train.task_label == 0


# ---------------------------------------------------------------------------------------- CIFAR-100


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """Pickles of random images in the published format, and their checksums in torchvision."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"class_{i:02d}" for i in range(100)]
    contents = {"meta": {"fine_label_names": names, "coarse_label_names": ["all"]}}
    for part, n_per_class in (("train", 2), ("test", 1)):
        labels = rng.permutation(np.arange(100).repeat(n_per_class)).tolist()
        contents[part] = {
            "data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8),
            "fine_labels": labels,
            "coarse_labels": [0] * len(labels),
            "filenames": [f"{i}.png" for i in range(len(labels))],
        }
    md5 = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    reader = torchvision.datasets.CIFAR100
    monkeypatch.setattr(reader, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(reader, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5["meta"]})
    archive = tmp_path / reader.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    archive.unlink()
    return tmp_path


def cifar_truth(root, part):
    """The images that torchvision reads, resized, and their labels."""
    reader = torchvision.datasets.CIFAR100(root, train=part == "train")
    return torch.stack([TINY(image) for image, _ in reader]), torch.tensor(reader.targets)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_cifar_holds_torchvisions_images_resized(cifar_root, cache_bytes):
    benchmark = SplitCIFAR100(
        10, dataset_root=cifar_root, preprocessing=TINY, seed=0, cache_bytes=cache_bytes
    )
    check_is_class_incremental(benchmark, 10)
    assert benchmark.class_names[7] == "class_07"
    for stream in (benchmark.train_stream, benchmark.test_stream):
        x, y, task = batches(stream)
        truth, labels = cifar_truth(cifar_root, stream.name)
        assert (task == 0).all()
        assert len(y) == len(labels)
        for label in range(100):
            assert torch.equal(x[y == label], truth[labels == label])


def test_cifar_chosen_classes_get_labels_in_the_order_given(cifar_root):
    names = ["class_42", "class_03", "class_99", "class_00"]
    benchmark = SplitCIFAR100(
        2, dataset_root=cifar_root, preprocessing=TINY, classes=names, shuffle=False
    )
    check_is_class_incremental(benchmark, 2)
    truth, labels = cifar_truth(cifar_root, "test")
    x, y, _ = batches(benchmark.test_stream)
    for label, original in enumerate([42, 3, 99, 0]):
        assert torch.equal(x[y == label], truth[labels == original])
    with pytest.raises(
        ValueError, match=r"`classes` .* contains 'clas_03'\. Did you mean 'class_03'\?"
    ):
        SplitCIFAR100(1, dataset_root=cifar_root, preprocessing=TINY, classes=["clas_03"])


def test_cifar_of_listed_tasks_with_a_limit(cifar_root):
    """The kept images are images of their class; each seed has its own, also in the cache."""
    listed = [["class_42", "class_03", "class_99"], ["class_00"]]
    seen = set()
    for seed in range(4):
        benchmark = SplitCIFAR100(
            dataset_root=cifar_root,
            preprocessing=TINY,
            classes=["class_42", "class_03", "class_99", "class_00"],
            task_classes=listed,
            limit=4,
            seed=seed,
        )
        assert order_of(benchmark) == [[0, 1, 2], [3]]
        truth, labels = cifar_truth(cifar_root, "train")
        x, y, _ = batches(benchmark.train_stream)
        assert [y.tolist().count(label) for label in range(4)] == [1, 1, 2, 2]
        for image, label in zip(x, y.tolist(), strict=True):
            of_class = truth[labels == [42, 3, 99, 0][label]]
            assert any(torch.equal(image, other) for other in of_class)
        seen.add(x.numpy().tobytes())
    assert len(seen) > 1


def test_cifar_is_resized_once_per_process_whatever_the_seed(cifar_root, monkeypatch):
    resized = []
    real = cifar100._resize
    monkeypatch.setattr(
        cifar100, "_resize", lambda s, row, p: resized.append(row) or real(s, row, p)
    )
    orders = [
        SplitCIFAR100(10, dataset_root=cifar_root, preprocessing=TINY, seed=seed).classes_order
        for seed in (0, 1, 0)
    ]
    assert len(resized) == 300
    assert orders[0] == orders[2] != orders[1]


def test_cifar_default_size_and_folder(cifar_root, monkeypatch):
    monkeypatch.setattr(cifar100, "default_dataset_location", lambda name: cifar_root)
    benchmark = SplitCIFAR100(cache_bytes=0, shuffle=False, return_task_id=True)
    assert benchmark.train_stream[0].dataset[0][0].shape == (3, 224, 224)
    assert [e.task_label for e in benchmark.train_stream] == list(range(10))


def test_cifar_transforms_and_number_of_experiences(cifar_root):
    def negative(image):
        return TINY.normalize(255 - image)

    plain = SplitCIFAR100(10, dataset_root=cifar_root, preprocessing=TINY, seed=0)
    ours = SplitCIFAR100(
        10, dataset_root=cifar_root, preprocessing=TINY, seed=0, train_transform=negative
    )
    assert not torch.equal(batches(ours.train_stream)[0], batches(plain.train_stream)[0])
    assert torch.equal(batches(ours.test_stream)[0], batches(plain.test_stream)[0])
    with pytest.raises(ValueError, match=r"`n_experiences` .* 100 classes evenly, but is 30\."):
        SplitCIFAR100(30, dataset_root=cifar_root, preprocessing=TINY)


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("damage", ["missing", "half", "altered"])
def test_incomplete_cifar_names_the_archive_and_its_folder(cifar_root, download, name, damage):
    file = cifar_root / "cifar-100-python" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        half = content[: len(content) // 2]
        file.write_bytes(half if damage == "half" else half + b"?" + content[len(half) + 1 :])
    state = "missing" if damage == "missing" else r"damaged \(wrong MD5\)"
    archive = re.escape(str(cifar_root / "cifar-100-python.tar.gz"))
    with pytest.raises(OSError, match=rf"{name} is {state}.*Fetch https://.*{archive}") as error:
        SplitCIFAR100(10, dataset_root=cifar_root, download=download, preprocessing=TINY)
    assert ("could not be downloaded" in str(error.value)) == download
    assert "\n" not in str(error.value)


def test_cifar_archive_put_in_place_is_unpacked_and_a_half_one_refused(cifar_root):
    folder = cifar_root / "cifar-100-python"
    whole = SplitCIFAR100(10, dataset_root=cifar_root, preprocessing=TINY, seed=0)
    archive = cifar_root / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    reader = torchvision.datasets.CIFAR100
    reader.tgz_md5 = hashlib.md5(archive.read_bytes()).hexdigest()  # gzip holds the time
    content = archive.read_bytes()

    shutil.rmtree(folder)
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=r"could not be downloaded .*train is missing"):
        SplitCIFAR100(10, dataset_root=cifar_root, preprocessing=TINY)
    assert not folder.exists()
    archive.write_bytes(content)
    again = SplitCIFAR100(10, dataset_root=cifar_root, preprocessing=TINY, seed=0)
    assert same_streams(whole, again)


# --------------------------------------------------------------------------------------- ImageNet-R


def test_names_of_imagenet_r_are_timms():
    folder = pytest.importorskip("timm").data.__path__[0]
    listed = np.loadtxt(f"{folder}/_info/imagenet_r_synsets.txt", dtype=str).tolist()
    assert list(imagenet_r.WNIDS) == listed == sorted(set(listed))
    assert len(listed) == 200


@pytest.fixture
def imagenet_r_root(tmp_path, monkeypatch):
    """200 classes of three images."""
    monkeypatch.setattr(imagenet_r, "N_IMAGES", 600)
    write_images(tmp_path / "images", 3, suffix=".jpg")
    root = tmp_path / "imagenet-r"
    for wnid in imagenet_r.WNIDS:
        shutil.copytree(tmp_path / "images", root / wnid)
    (root / "README.txt").write_text("about")
    shutil.rmtree(tmp_path / "images")
    return root


def test_imagenet_r_in_the_published_layout_is_split_within_each_class(imagenet_r_root):
    options = {"preprocessing": TINY, "seed": 3}
    benchmark = SplitImageNetR(20, dataset_root=imagenet_r_root.parent, **options)
    check_is_class_incremental(benchmark, 20)
    assert benchmark.class_names == list(imagenet_r.WNIDS)
    assert batches(benchmark.train_stream)[1].bincount().tolist() == [2] * 200
    assert batches(benchmark.test_stream)[1].bincount().tolist() == [1] * 200
    itself = SplitImageNetR(20, dataset_root=imagenet_r_root, **options)
    assert same_streams(benchmark, itself)
    as_folder = SplitImageFolder(imagenet_r_root, 20, allow_overlap=True, **options)
    assert same_streams(benchmark, as_folder)


def test_imagenet_r_with_a_given_split(imagenet_r_root):
    for part, n in (("train", (0, 2)), ("test", (1,))):
        for wnid in imagenet_r.WNIDS:
            (imagenet_r_root / part / wnid).mkdir(parents=True)
            for i in n:
                file = imagenet_r_root / wnid / f"image_{i:03d}.jpg"
                file.rename(imagenet_r_root / part / wnid / file.name)
    benchmark = SplitImageNetR(10, dataset_root=imagenet_r_root, preprocessing=TINY)
    assert len(batches(benchmark.train_stream)[0]) == 400
    x, y, _ = batches(benchmark.test_stream)
    file = imagenet_r_root / "test" / "n01443537" / "image_001.jpg"
    assert torch.equal(x[y == 0][0], TINY(Image.open(file)))
    shutil.rmtree(imagenet_r_root / "test" / "n02007558")
    with pytest.raises(
        ValueError, match=r"test' should .*200 class .*holds 199 \(1 missing: n02007558\)"
    ):
        SplitImageNetR(10, dataset_root=imagenet_r_root, preprocessing=TINY)


def test_imagenet_r_half_unpacked_names_what_is_missing(imagenet_r_root):
    for wnid in imagenet_r.WNIDS[3:]:
        shutil.rmtree(imagenet_r_root / wnid)
    with pytest.raises(
        ValueError, match=r"the 200 class folders .*holds 3 \(197 missing: n01498041, "
    ):
        SplitImageNetR(1, dataset_root=imagenet_r_root, preprocessing=TINY)
    write_images(imagenet_r_root / "n00000000", 2)
    with pytest.raises(ValueError, match=r"1 unknown: n00000000\)"):
        SplitImageNetR(1, dataset_root=imagenet_r_root, preprocessing=TINY)
    names = [*imagenet_r.WNIDS[:2], "n00000000"]
    part = SplitImageNetR(3, dataset_root=imagenet_r_root, preprocessing=TINY, classes=names)
    assert part.class_names == names


def test_imagenet_r_with_a_half_unpacked_class(imagenet_r_root):
    (imagenet_r_root / "n12267677" / "image_002.jpg").unlink()
    with pytest.raises(ValueError, match=r"the 600 images .*holds 599\..*imagenet-r\.tar"):
        SplitImageNetR(10, dataset_root=imagenet_r_root, preprocessing=TINY)
    SplitImageNetR(10, dataset_root=imagenet_r_root, preprocessing=TINY, classes=imagenet_r.WNIDS)


def test_missing_imagenet_r(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"`download=True`.*imagenet-r\.tar.*n01443537"):
            SplitImageNetR(dataset_root=root)
        where = re.escape(repr(str(root / "imagenet-r.tar")))
        with pytest.raises(OSError, match=f"could not be downloaded.*MD5 a613.*{where}"):
            SplitImageNetR(dataset_root=root, download=True)


def test_an_archive_put_in_place_is_checked_and_unpacked(imagenet_r_root, tmp_path, monkeypatch):
    options = {"dataset_root": tmp_path, "preprocessing": TINY, "seed": 0}
    whole = SplitImageNetR(10, **options)
    archive = tmp_path / "imagenet-r.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(imagenet_r_root, "imagenet-r")
    shutil.rmtree(imagenet_r_root)
    with pytest.raises(OSError, match="could not be downloaded"):  # another checksum
        SplitImageNetR(10, download=True, **options)
    assert not imagenet_r_root.exists()
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    ours = archives.IMAGENET_R._replace(md5=md5)
    monkeypatch.setattr(imagenet_r, "IMAGENET_R", ours)
    with pytest.raises(FileNotFoundError, match="`download=True`"):
        SplitImageNetR(10, **options)
    assert same_streams(whole, SplitImageNetR(10, download=True, **options))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["imagenet-r", "imagenet-r.tar"]


# ------------------------------------------------------------------------------------- CUB-200-2011


@pytest.fixture
def cub_root(data_root):
    root = data_root / "cub200"
    if not root.is_dir():
        pytest.skip(f"no CUB-200-2011: {root} is not a folder")
    return root


def test_the_real_birds_have_their_official_split(cub_root):
    options = {"preprocessing": TINY, "seed": 0}
    benchmark = SplitCUB200(5, dataset_root=cub_root, **options)
    check_is_class_incremental(benchmark, 5)
    assert benchmark.class_names[0] == "001.Black_footed_Albatross"
    assert len(benchmark.class_names) == 10
    counts = [
        sum(len(e.dataset) for e in stream)
        for stream in (benchmark.train_stream, benchmark.test_stream)
    ]
    assert counts == [300, 243]
    assert same_streams(
        benchmark, SplitCUB200(5, dataset_root=cub_root / "CUB_200_2011", **options)
    )

    # Image by image, from the text files read in another way.
    folder = cub_root / "CUB_200_2011"
    table = {
        name: dict(np.loadtxt(folder / f"{name}.txt", dtype=str))
        for name in ("images", "image_class_labels", "train_test_split")
    }
    for flag, stream in (("1", benchmark.train_stream), ("0", benchmark.test_stream)):
        x, y, _ = batches(stream)
        for label in (0, 9):
            files = [
                path
                for key, path in table["images"].items()
                if table["train_test_split"][key] == flag
                and table["image_class_labels"][key] == str(label + 1)
            ]
            truth = [TINY(Image.open(folder / "images" / path)) for path in files]
            assert torch.equal(x[y == label], torch.stack(truth))


def test_number_of_experiences_divides_the_classes_of_a_part(cub_root):
    with pytest.raises(ValueError, match=r"`n_experiences` .* 10 classes evenly, but is 4\."):
        SplitCUB200(4, dataset_root=cub_root, preprocessing=TINY)
    names = ["005.Crested_Auklet", "002.Laysan_Albatross"]
    part = SplitCUB200(2, dataset_root=cub_root, preprocessing=TINY, classes=names)
    assert part.class_names == names
    check_is_class_incremental(part, 2)


@pytest.fixture
def small_cub(tmp_path):
    """Three classes of four images each, half of them for training."""
    root = tmp_path / "CUB_200_2011"
    names = ["001.Auk", "002.Bunting", "003.Crow"]
    rows = []
    for c, name in enumerate(names, start=1):
        write_images(root / "images" / name, 4, seed=c, suffix=".jpg")
        rows += [(f"{name}/image_{i:03d}.jpg", c, i % 2) for i in range(4)]
    columns = zip(*rows, strict=True)
    for file, column in zip(
        ("images", "image_class_labels", "train_test_split"), columns, strict=True
    ):
        lines = [f"{i} {value}\n" for i, value in enumerate(column, start=1)]
        (root / f"{file}.txt").write_text("".join(lines))
    lines = [f"{i} {name}\n" for i, name in enumerate(names, start=1)]
    (root / "classes.txt").write_text("".join(lines))
    return root


def cub_refused(root, match, error=ValueError, **options):
    with pytest.raises(error, match=match) as raised:
        SplitCUB200(3, dataset_root=root, preprocessing=TINY, **options)
    assert "\n" not in str(raised.value)


def test_half_downloaded_birds_are_named(small_cub):
    check_is_class_incremental(SplitCUB200(3, dataset_root=small_cub, preprocessing=TINY), 3)
    (small_cub / "images" / "002.Bunting" / "image_003.jpg").unlink()
    cub_refused(small_cub, r"1 of the 12 .*002\.Bunting/image_003\.jpg'\. ", FileNotFoundError)
    SplitCUB200(1, dataset_root=small_cub, preprocessing=TINY, classes=["001.Auk", "003.Crow"])
    shutil.rmtree(small_cub / "images")
    cub_refused(small_cub, r"not a complete .*: images/ missing", FileNotFoundError)
    for name in ("images.txt", "train_test_split.txt"):
        (small_cub / name).unlink()
    cub_refused(
        small_cub.parent, r"images\.txt, train_test_split\.txt, images/ missing", FileNotFoundError
    )


def test_missing_birds(tmp_path):
    cub_refused(tmp_path, r"`download=True` .*CUB_200_2011\.tgz.*images\.txt", FileNotFoundError)
    cub_refused(tmp_path, r"could not be downloaded.*MD5 97ece", OSError, download=True)


@pytest.mark.parametrize(
    ("file", "old", "new", "match"),
    [
        (
            "images.txt",
            "\n5 002.",
            "\nfive 002.",
            r"line 5 of .*images\.txt' .* but is 'five 002\.",
        ),
        (
            "images.txt",
            "\n5 002.",
            "\n4 002.",
            r"line 5 of .*images\.txt' .* new number .* but is '4 002\.",
        ),
        (
            "train_test_split.txt",
            "\n7 0",
            "\n7",
            r"line 7 of .*train_test_split\.txt' .* but is '7'",
        ),
        (
            "train_test_split.txt",
            "\n7 0",
            "\n7 2",
            r"train_test_split\.txt should hold 0 or 1, but holds 2",
        ),
        (
            "train_test_split.txt",
            "\n12 1",
            "",
            r"split\.txt lacks 1 images of images\.txt, as 003\.C",
        ),
        (
            "image_class_labels.txt",
            "\n12 3",
            "",
            r"labels\.txt lacks 1 .* 003\.Crow/image_003\.jpg",
        ),
        ("image_class_labels.txt", "\n12 3", "\n12 3\n13 3", r"images\.txt lacks 1 .* as 13"),
        ("classes.txt", "\n3 003.Crow", "", r"classes\.txt lacks the classes 3"),
        (
            "classes.txt",
            "\n3 003.Crow",
            "\n3 003.Crow\n4 004.Dove",
            r"no training images of 004\.D",
        ),
    ],
)
def test_text_files_that_contradict_each_other(small_cub, file, old, new, match):
    content = (small_cub / file).read_text()
    assert old in content
    (small_cub / file).write_text(content.replace(old, new))
    cub_refused(small_cub, match)


# ------------------------------------------------------------------------------------------ domains


DOMAINS = ("clay", "art", "foto")


@pytest.fixture(params=["given", "drawn"])
def domain_root(request, tmp_path):
    """Three domains of the same two classes, 8 images for training and 2 for testing in each."""
    for d, domain in enumerate(DOMAINS):
        for c, name in enumerate(("bee", "cat")):
            seed = 10 * d + c
            if request.param == "given":
                write_images(tmp_path / "train" / domain / name, 8, seed=seed)
                write_images(tmp_path / "test" / domain / name, 2, seed=100 + seed)
            else:
                write_images(tmp_path / domain / name, 10, seed=seed)
    (tmp_path / "README.md").write_text("about")
    return tmp_path


def domain_folder(root, *domain):
    return (root / "train" if (root / "train").is_dir() else root).joinpath(*domain)


def test_every_experience_is_one_domain_with_all_classes(domain_root):
    benchmark = DomainImageFolder(domain_root, domains=DOMAINS, preprocessing=TINY, seed=0)
    assert benchmark.domain_names == list(DOMAINS)
    assert benchmark.class_names == ["bee", "cat"]
    assert benchmark.n_classes == 2
    for stream, n in ((benchmark.train_stream, 16), (benchmark.test_stream, 4)):
        assert [e.current_experience for e in stream] == [0, 1, 2]
        for experience, domain in zip(stream, DOMAINS, strict=True):
            assert set(experience.classes_in_this_experience) == {0, 1}
            assert experience.task_label == 0
            x, y, task = batches([experience])
            assert y.tolist() == list(experience.dataset.targets) == sorted(y.tolist())
            assert y.bincount().tolist() == [n // 2, n // 2]
            assert (task == 0).all()
            part = "train" if stream is benchmark.train_stream else "test"
            if (domain_root / "train").is_dir():
                files = sorted((domain_root / part / domain).glob("*/*.png"))
                assert torch.equal(x, torch.stack([TINY(Image.open(f)) for f in files]))
            else:
                known = [TINY(Image.open(f)) for f in (domain_root / domain).glob("*/*.png")]
                assert all(any(torch.equal(image, k) for k in known) for image in x)


def test_split_and_order_of_domains_follow_the_seed(domain_root):
    def make(**options):
        return DomainImageFolder(domain_root, preprocessing=TINY, **options)

    random_state = torch.get_rng_state()
    kept, read = make(seed=1), make(seed=1, cache_bytes=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same_streams(kept, read)
    orders = {tuple(make(seed=seed).domain_names) for seed in range(8)}
    assert len(orders) > 1
    assert all(sorted(order) == sorted(DOMAINS) for order in orders)
    assert make(shuffle=False, seed=5).domain_names == ["art", "clay", "foto"]
    assert make(domains=["foto", "art"], seed=5).domain_names == ["foto", "art"]
    torch.manual_seed(3)
    first = make()
    torch.manual_seed(3)
    assert same_streams(first, make())


def test_drawn_split_of_a_domain_does_not_depend_on_the_others(tmp_path):
    for domain in DOMAINS:
        write_images(tmp_path / domain / "bee", 10)
        write_images(tmp_path / domain / "cat", 5, seed=1)
    options = {"preprocessing": TINY, "seed": 4, "allow_overlap": True}
    everything = DomainImageFolder(tmp_path, domains=DOMAINS, **options)
    alone = DomainImageFolder(tmp_path, domains=["foto"], **options)
    ours, theirs = batches([everything.test_stream[2]]), batches(alone.test_stream)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    draws = [batches([experience])[0] for experience in everything.test_stream]  # same images
    assert not all(torch.equal(draws[0], draw) for draw in draws)


def test_domains_share_one_copy_of_their_images(domain_root, monkeypatch):
    read = []
    real = image_data.read_image
    monkeypatch.setattr(image_data, "read_image", lambda p, pre: read.append(p) or real(p, pre))
    for seed in (0, 1, 2):
        DomainImageFolder(domain_root, preprocessing=TINY, seed=seed)
    assert len(read) == 60


def test_domains_with_different_classes_are_named(domain_root):
    shutil.rmtree(domain_folder(domain_root, "art", "cat"))
    write_images(domain_folder(domain_root, "clay", "dog"), 4)
    domains_refused(domain_root, r"art lacks cat, dog; .*foto lacks dog.*`classes=`: bee\.")
    with pytest.raises(ValueError, match=r"`classes` .* contains 'cat'"):
        DomainImageFolder(domain_root, preprocessing=TINY, classes=["bee", "cat"])
    common = DomainImageFolder(domain_root, preprocessing=TINY, classes=["bee"], seed=0)
    assert common.class_names == ["bee"]
    two = DomainImageFolder(
        domain_root, preprocessing=TINY, domains=["foto", "clay"], classes=["cat", "bee"], seed=0
    )
    assert two.class_names == ["cat", "bee"]


def domains_refused(root, match, **options):
    with pytest.raises(ValueError, match=match):
        DomainImageFolder(root, preprocessing=TINY, **options)


def test_wrong_domains_and_layouts(domain_root, tmp_path_factory):
    hint = (
        r"`domains` .* 3 domain .*\(art, clay, foto\), but contains 'fotos'\. Did you mean 'foto'\?"
    )
    domains_refused(domain_root, hint, domains=["fotos"])
    for wrong in ("foto", [], ["foto", "foto"]):
        domains_refused(domain_root, "`domains` .* list of different", domains=wrong)
    accepted = r"<root>/train/<domain>/<class>/<image>.*<root>/<domain>/<class>/<image>"
    domains_refused(domain_root / "none", rf"should be a folder, but is .*none'.*{accepted}")
    domains_refused(tmp_path_factory.mktemp("empty"), rf"empty.* no class folders.*{accepted}")
    domains_refused(domain_folder(domain_root, "art"), rf"no class folders.*{accepted}")
    if (domain_root / "test").is_dir():
        (domain_root / "test" / "art").rename(domain_root / "test" / "oil")
        domains_refused(domain_root, "the same domains, .*only: art, oil.*`domains=`")
        shutil.rmtree(domain_root / "test")
        domains_refused(domain_root, "folder 'train' with domains but none named 'test'")
    else:
        for i in range(1, 10):
            (domain_root / "art" / "cat" / f"image_{i:03d}.png").unlink()
        domains_refused(domain_root, "class 'art/cat' has a single image")


@pytest.mark.parametrize("template", [Naive, Replay, EWC, LwF])
def test_avalanches_strategies_learn_the_domains(domain_root, template):
    options = {
        Naive: {},
        Replay: {"mem_size": 6},
        EWC: {"ewc_lambda": 1.0},
        LwF: {"alpha": 1.0, "temperature": 2.0},
    }
    benchmark = DomainImageFolder(domain_root, preprocessing=TINY, seed=0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    strategy = template(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=8,
        **options[template],
    )
    before = net[1].weight.detach().clone()
    for experience in benchmark.train_stream:
        strategy.train(experience)
    results = strategy.eval(benchmark.test_stream)
    assert not torch.equal(net[1].weight, before)
    for i in range(3):
        name = f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{i:03d}"
        assert 0 <= results[name] <= 1


def test_real_domains(data_root):
    root = data_root / "pacs"
    if not root.is_dir():
        pytest.skip(f"no PACS: {root} is not a folder")
    benchmark = DomainImageFolder(root, domains=["photo", "sketch"], preprocessing=TINY)
    assert benchmark.n_classes == 7
    assert benchmark.class_names[0] == "dog"
    sizes = [[len(e.dataset) for e in s] for s in (benchmark.train_stream, benchmark.test_stream)]
    truth = [
        [len(list((root / part / domain).glob("*/*.jpg"))) for domain in ("photo", "sketch")]
        for part in ("train", "test")
    ]
    assert sizes == truth
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))
    strategy = Naive(
        model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.01), train_mb_size=64
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    strategy.eval(benchmark.test_stream)


# -------------------------------------------------------------------------------------- image modes


def read(image, path):
    """Saves an image, reads it as a benchmark does, and returns the colours of its corners."""
    options = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    image.save(path, **options)
    small = ImagePreprocessing((3, 8, 8), interpolation="bilinear", crop_pct=1.0)
    resized = image_data.read_image(str(path), small)
    return resized[:, [0, 0, -1, -1], [0, -1, 0, -1]].T.tolist()


def quarters(values, dtype=np.uint8):
    """An 8 x 8 image of four plain quarters."""
    pixels = np.asarray(values, dtype=dtype).reshape(2, 2, *np.shape(values)[1:])
    return Image.fromarray(pixels.repeat(4, axis=0).repeat(4, axis=1))


RED, GREEN, BLUE, WHITE, BLACK = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3, [0] * 3


@pytest.fixture
def palette_image():
    image = quarters([0, 1, 2, 3])
    image.putpalette([*RED, *GREEN, *BLUE, *BLACK])
    assert image.mode == "P"
    return image


def test_grey_black_and_white_and_cmyk(tmp_path):
    grey = quarters([0, 50, 100, 255])
    assert read(grey, tmp_path / "grey.png") == [[v] * 3 for v in (0, 50, 100, 255)]
    bits = quarters([0, 255, 255, 0]).convert("1")
    assert read(bits, tmp_path / "bits.png") == [BLACK, WHITE, WHITE, BLACK]
    colours = quarters([RED, GREEN, BLUE, WHITE])
    cmyk = read(colours.convert("CMYK"), tmp_path / "cmyk.tiff")
    assert cmyk == [RED, GREEN, BLUE, WHITE]
    jpeg = np.array(read(colours.convert("CMYK"), tmp_path / "cmyk.jpg"))
    assert np.abs(jpeg - np.array([RED, GREEN, BLUE, WHITE])).max() < 60


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    image = quarters([0, 257 * 50, 257 * 100 + 128, 65535], dtype=np.uint16)
    assert read(image, tmp_path / f"deep.{suffix}") == [[v] * 3 for v in (0, 50, 100, 255)]


def test_transparent_pixels_are_blended_with_white(tmp_path, palette_image):
    clear_red, half_red = [255, 0, 0, 0], [255, 0, 0, 128]
    image = quarters([clear_red, half_red, [0, 255, 0, 255], [0, 0, 0, 0]])
    seen = [WHITE, [255, 127, 127], GREEN, WHITE]
    assert image.mode == "RGBA"
    assert read(image, tmp_path / "rgba.png") == seen
    grey = quarters([[0, 0], [0, 255], [80, 255], [0, 0]])
    assert grey.mode == "LA"
    assert read(grey, tmp_path / "la.png") == [WHITE, BLACK, [80] * 3, WHITE]

    assert read(palette_image, tmp_path / "opaque.png") == [RED, GREEN, BLUE, BLACK]
    palette_image.info["transparency"] = 1  # one colour of the palette
    assert read(palette_image, tmp_path / "one.png") == [RED, WHITE, BLUE, BLACK]
    palette_image.info["transparency"] = bytes([0, 255, 255, 0])  # an opacity per colour
    assert read(palette_image, tmp_path / "each.png") == [WHITE, GREEN, BLUE, WHITE]
    key = quarters([RED, GREEN, BLUE, BLACK])
    key.info["transparency"] = (0, 0, 255)  # one colour of an RGB image
    assert read(key, tmp_path / "key.png") == [RED, GREEN, WHITE, BLACK]


def test_floating_point_pixels_have_no_known_range(tmp_path):
    with pytest.raises(OSError, match=r"deep\.tiff' cannot be read .*no known range"):
        read(quarters([0.0, 0.5, 1.0, 2.0], dtype=np.float32), tmp_path / "deep.tiff")
