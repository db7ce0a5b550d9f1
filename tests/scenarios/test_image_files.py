"""Folders of images as people have them: left files, links, equal images, formats, orientation."""

import shutil
import struct
import time

import numpy as np
import pytest
from PIL import Image

from treelora_avalanche.models import ImagePreprocessing
from treelora_avalanche.scenarios import DomainImageFolder, GroupedImageFolder, SplitImageFolder
from treelora_avalanche.scenarios.data.images import read_image
from treelora_avalanche.scenarios.data.overlap import equal_files

TINY = ImagePreprocessing(input_size=(3, 8, 8))
EXACT = ImagePreprocessing(input_size=(3, 8, 8), interpolation="nearest", crop_pct=1.0)
LEFT = [".ipynb_checkpoints", ".cache", "__MACOSX", "@eaDir", "Thumbs.db"]


def write(folder, n=3, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def split(root, n_experiences=1, **options):
    return SplitImageFolder(root, n_experiences, preprocessing=TINY, seed=0, **options)


def images(benchmark):
    """The images of both streams, as bytes."""
    return [
        {np.asarray(x).tobytes() for experience in stream for x, *_ in experience.dataset}
        for stream in (benchmark.train_stream, benchmark.test_stream)
    ]


def sizes(benchmark):
    return [
        sum(len(experience.dataset) for experience in stream)
        for stream in (benchmark.train_stream, benchmark.test_stream)
    ]


@pytest.fixture
def pets(tmp_path):
    """Two classes in a given split, 3 and 2 images each."""
    tmp_path = tmp_path / "pets"
    for seed, name in enumerate(["ant", "bee"]):
        write(tmp_path / "train" / name, 3, seed=seed)
        write(tmp_path / "test" / name, 2, seed=10 + seed)
    return tmp_path


@pytest.fixture
def pacs(tmp_path):
    """Two domains of two classes, 5 images each."""
    tmp_path = tmp_path / "pacs"
    for seed in range(4):
        write(tmp_path / ("photo", "sketch")[seed // 2] / ("ant", "bee")[seed % 2], 5, seed)
    return tmp_path


# -------------------------------------------------------------------------------- names left out


@pytest.mark.parametrize("left", LEFT)
def test_left_folders_are_skipped_at_every_depth_of_a_given_split(pets, left):
    before = images(split(pets))
    test_images = list((pets / "test").glob("*/*.png"))
    for place in ("", "train", "test", "train/ant", "train/ant/deep", "test/bee"):
        folder = pets / place / left
        folder.mkdir(parents=True)
        for n, file in enumerate(test_images):
            shutil.copy(file, folder / f"{n}.png")
    benchmark = split(pets)
    assert benchmark.class_names == ["ant", "bee"]
    assert sizes(benchmark) == [6, 4]
    assert images(benchmark) == before


@pytest.mark.parametrize("left", LEFT)
def test_left_folders_are_no_classes_and_no_domains(pacs, left):
    write(pacs / left / "ant", 5, seed=7)
    write(pacs / left, 5, seed=8)
    write(pacs / "photo" / left, 5, seed=9)
    write(pacs / "photo" / "bee" / left, 5, seed=10)
    benchmark = DomainImageFolder(pacs, preprocessing=TINY, seed=0)
    assert sorted(benchmark.domain_names) == ["photo", "sketch"]
    assert benchmark.class_names == ["ant", "bee"]
    assert sizes(benchmark) == [16, 4]
    photo = split(pacs / "photo")
    assert photo.class_names == ["ant", "bee"]
    assert sizes(photo) == [8, 2]


def test_hidden_images_are_skipped(pets):
    (pets / "train" / "ant" / "._0.png").write_bytes(b"\0\5\26\7 resource fork")
    (pets / "train" / "ant" / ".DS_Store").write_bytes(b"\0")
    write(pets / "train" / "bee", 1)
    (pets / "train" / "bee" / "0.png").rename(pets / "train" / "bee" / ".trash.png")
    assert sizes(split(pets)) == [5, 4]


def test_left_folder_in_a_class_called_train_is_no_layout(tmp_path):
    for seed, name in enumerate(["train", "tram"]):
        write(tmp_path / name, 5, seed)
    write(tmp_path / "train" / ".ipynb_checkpoints", 1)
    assert split(tmp_path).class_names == ["train", "tram"]


def test_dataset_within_a_hidden_folder_is_read(tmp_path):
    for seed, name in enumerate(["ant", "bee"]):
        write(tmp_path / ".cache" / "pets" / name, 5, seed)
    assert sizes(split(tmp_path / ".cache" / "pets")) == [8, 2]


# -------------------------------------------------------------------------------- symbolic links


def test_loops_of_links_end_and_add_nothing(pets):
    before = images(split(pets))
    for n in range(3):  # several loops in one another: without a check, exponentially many paths
        (pets / "train" / "ant" / f"self{n}").symlink_to(".", target_is_directory=True)
        (pets / "train" / f"up{n}").symlink_to("..", target_is_directory=True)
    (pets / "train" / "bee" / "root").symlink_to(pets, target_is_directory=True)
    (pets / "train" / "bee" / "one").symlink_to("two")
    (pets / "train" / "bee" / "two").symlink_to("one")
    begin = time.monotonic()
    benchmark = split(pets)
    assert time.monotonic() - begin < 5
    assert benchmark.class_names == ["ant", "bee"]
    assert images(benchmark) == before


def test_links_to_classes_and_images_elsewhere_are_followed(tmp_path):
    for seed, name in enumerate(["ant", "bee"]):
        write(tmp_path / "store" / name, 5, seed)
    root = tmp_path / "pets"
    root.mkdir()
    (root / "ant").symlink_to(tmp_path / "store" / "ant", target_is_directory=True)
    (root / "bee").mkdir()
    for file in (tmp_path / "store" / "bee").iterdir():
        (root / "bee" / file.name).symlink_to(file)
    assert images(split(root)) == images(split(tmp_path / "store"))


# -------------------------------------------------------------------------------- equal images


def test_test_image_among_the_training_images_is_refused(pets):
    shutil.copy(pets / "test" / "bee" / "1.png", pets / "train" / "ant" / "again.png")
    match = r"1 of 4 test images .*'test/bee/1\.png', which equals 'train/ant/again\.png'.*allow_"
    with pytest.raises(ValueError, match=match):
        split(pets)
    assert sizes(split(pets, allow_overlap=True)) == [7, 4]
    options = {"classes_per_task": 1, "preprocessing": TINY, "seed": 0}
    with pytest.raises(ValueError, match=match):
        GroupedImageFolder(pets, {"insects": ["ant", "bee"]}, **options)
    GroupedImageFolder(pets, {"insects": ["ant", "bee"]}, allow_overlap=True, **options)


def test_equal_images_in_a_drawn_split_are_refused(tmp_path):
    for seed, name in enumerate(["ant", "bee"]):
        write(tmp_path / name, 10, seed)
    for file in list(tmp_path.glob("*/*.png")):  # every image twice: some pair is divided
        shutil.copy(file, file.with_name(f"copy_of_{file.name}"))
    with pytest.raises(ValueError, match=r"which equals .*allow_overlap=True"):
        split(tmp_path)
    assert sizes(split(tmp_path, allow_overlap=True)) == [32, 8]


@pytest.mark.parametrize("given", [True, False])
def test_equal_images_across_domains_are_refused(pacs, given):
    if given:
        for domain in ("photo", "sketch"):
            shutil.copytree(pacs / domain, pacs / "train" / domain)
            for seed, name in enumerate(["ant", "bee"]):
                write(pacs / "test" / domain / name, 2, seed=50 + 10 * (domain == "photo") + seed)
            shutil.rmtree(pacs / domain)
        source, target = pacs / "test" / "sketch" / "ant", pacs / "train" / "photo" / "bee"
        shutil.copy(source / "0.png", target / "again.png")
    else:
        for file in (pacs / "photo" / "ant").iterdir():
            shutil.copy(file, pacs / "sketch" / "bee" / f"from_photo_{file.name}")
    with pytest.raises(ValueError, match=r"which equals .*allow_overlap=True"):
        DomainImageFolder(pacs, preprocessing=TINY, seed=0)
    DomainImageFolder(pacs, preprocessing=TINY, seed=0, allow_overlap=True)


def test_equal_files_are_those_of_equal_content(tmp_path):
    """Checks sizes, tails and contents: files that differ in one of them only are not equal."""
    long = bytes(10_000)
    contents = [b"", b"a", b"b", b"ab", long, b"x" + long[1:], long[1:] + b"x", long + b"x"]
    files = []
    for side in range(2):
        for n, content in enumerate(contents):
            file = tmp_path / f"{side}_{n}"
            file.write_bytes(content)
            files.append(str(file))
    first, second = files[: len(contents)], files[len(contents) :]
    assert equal_files(first[::2], second) == list(zip(first[::2], second[::2], strict=True))
    assert equal_files(first[:3], second[3:]) == []


def test_files_of_different_sizes_are_not_read(tmp_path, monkeypatch):
    for n in range(6):
        (tmp_path / str(n)).write_bytes(bytes(n))
    paths = [str(tmp_path / str(n)) for n in range(6)]
    monkeypatch.setattr("builtins.open", None)
    assert equal_files(paths[:3], paths[3:]) == []


# -------------------------------------------------------------------------------- pixels

# How pixels are stored in a file of each EXIF orientation; 6 is shown a quarter turn clockwise.
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def photograph():
    """Four different corners, wider than high."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16, 0] = pixels[:8, 16:, 1] = pixels[8:, :16, 2] = 255
    return pixels


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_photographs_are_read_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](photograph())))
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options.get(suffix, {}))
    Image.fromarray(photograph()).save(tmp_path / f"b.{suffix}", **options.get(suffix, {}))
    found, upright = (read_image(str(tmp_path / f"{name}.{suffix}"), TINY).short() for name in "ab")
    assert (found - upright).abs().max() <= (3 if suffix == "jpg" else 0)


def test_16_bit_image_with_orientation_is_read_upright(tmp_path):
    pixels = photograph()[:, :, 0].astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels, 1).copy()).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    found, upright = (read_image(str(tmp_path / f"{name}.png"), TINY) for name in "ab")
    assert found.equal(upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"]
)
def test_broken_exif_is_ignored(tmp_path, exif):
    image = Image.fromarray(photograph())
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "b.jpg", exif=exif)
    found, plain = (read_image(str(tmp_path / f"{name}.jpg"), TINY) for name in "ab")
    assert found.equal(plain)


def write_tiff(file, pixels, sample_format):
    """Writes 32-bit integers as a TIFF without compression, by its specification."""
    height, width = pixels.shape
    data = pixels.astype("<u4" if sample_format == 1 else "<i4").tobytes()
    tags = {256: width, 257: height, 258: 32, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format}
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    for tag, value in sorted(tags.items()):
        content += struct.pack("<HHII", tag, 4, 1, value)
    file.write_bytes(content + bytes(4))


@pytest.mark.parametrize(
    ("low", "high", "sample_format"),
    [(0, 1000, 2), (0, 2**31 - 1, 2), (-(2**31), 2**31 - 1, 2), (-5, 250, 2), (7, 2**32 - 1, 1)],
)
def test_32_bit_integers_are_scaled_by_their_own_range(tmp_path, low, high, sample_format):
    steps = np.arange(64).reshape(8, 8)
    write_tiff(tmp_path / "a.tif", low + (high - low) * steps // 63, sample_format)
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "I"
    found = read_image(str(tmp_path / "a.tif"), EXACT)
    assert np.abs(found.numpy().astype(int) - 255 * steps / 63).max() <= 1
    assert (found.min(), found.max()) == (0, 255)


def test_16_bit_images_keep_the_range_of_their_format(tmp_path):
    pixels = (np.arange(64, dtype=np.uint16).reshape(8, 8)) * 100
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(content)
    for suffix in ("png", "pgm"):
        found = read_image(str(tmp_path / f"a.{suffix}"), EXACT).numpy()
        assert np.abs(found - pixels / 257).max() <= 0.5


# -------------------------------------------------------------------------------- formats

UNREAD = {"a.GIF": 1, "b.gif": 1, "c.jfif": 1, "d.avif": 1, "e.heic": 1}


def test_formats_that_are_not_read_are_counted_in_one_line(pets, pacs, caplog):
    for folder in (pets / "train" / "ant", pets / "test" / "bee", pacs / "sketch" / "ant"):
        for name in UNREAD:
            (folder / name).touch()
        (folder / "notes.txt").touch()
        (folder / "._f.heic").touch()
    assert sizes(split(pets)) == [6, 4]
    line = "left out 10 images of formats that are not read: 2 .avif, 4 .gif, 2 .heic, 2 .jfif;"
    (message,) = caplog.messages
    assert message.startswith(f"{pets}: {line}")
    caplog.clear()
    DomainImageFolder(pacs, domains=["photo", "sketch"], preprocessing=TINY)
    (message,) = caplog.messages
    assert "left out 5 images of formats that are not read: 1 .avif, 2 .gif, 1 .heic" in message


def test_nothing_is_said_about_folders_of_images_alone(pets, caplog):
    split(pets)
    assert not caplog.messages
