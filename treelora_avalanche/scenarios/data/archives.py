"""Published archives: found on disk, or downloaded, checked and unpacked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.utils import download_url, extract_archive


class PublishedArchive(NamedTuple):
    """An archive with a public address.

    >>> IMAGENET_R.filename
    'imagenet-r.tar'

    :param title: name of the data set.
    :param url: its address.
    :param md5: checksum of the archive.
    :param folder: the folder that the archive contains.
    :param example: a path in that folder, named by errors.
    :param size: of the archive, for the reader.
    """

    title: str
    url: str
    md5: str
    folder: str
    example: str
    size: str

    @property
    def filename(self) -> str:
        """Name of the archive's file."""
        return self.url.rsplit("/", 1)[-1]


IMAGENET_R = PublishedArchive(
    title="ImageNet-R",
    url="https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
    md5="a61312130a589d0ca1a8fca1f2bd3337",
    folder="imagenet-r",
    example="n01443537/",
    size="2.2 GB",
)

CUB_200_2011 = PublishedArchive(
    title="CUB-200-2011",
    url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    md5="97eceeb196236b17998738112f37df78",
    folder="CUB_200_2011",
    example="images.txt",
    size="1.2 GB",
)


def published_folder(
    archive: PublishedArchive,
    dataset_root: str | Path,
    download: bool,
    is_unpacked: Callable[[Path], bool],
) -> Path:
    """Returns the unpacked archive: ``dataset_root`` itself or the published folder in it.

    A download is used only if its checksum is the published one, and is unpacked into a temporary
    folder first, so that an interruption never leaves a partial data set.

    :param archive: the archive.
    :param dataset_root: folder to search, and to download to.
    :param download: whether to download a missing archive.
    :param is_unpacked: returns whether a folder is the unpacked archive.
    :raises OSError: if the archive is missing, or cannot be downloaded.
    """
    root = Path(dataset_root).expanduser()
    if root.is_dir() and is_unpacked(root):
        return root
    folder = root / archive.folder
    if folder.is_dir():
        return folder
    if not download:
        raise FileNotFoundError(
            f"`dataset_root` {str(root)!r} holds no {archive.title}. Pass `download=True` to "
            f"download {archive.url} ({archive.size}) to it (an intact {archive.filename} in that "
            f"folder is unpacked, not downloaded again), or unpack it there yourself, so that "
            f"{str(folder / archive.example)!r} exists."
        )
    try:
        download_url(archive.url, root, archive.filename, archive.md5)
    # RuntimeError is torchvision's for a wrong checksum.
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{archive.title} could not be downloaded ({error}). Fetch {archive.url} "
            f"({archive.size}, MD5 {archive.md5}) by other means, save it as "
            f"{str(root / archive.filename)!r} and call again: it will be checked and unpacked."
        ) from error
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as temporary:
        extract_archive(root / archive.filename, temporary)
        (Path(temporary) / archive.folder).rename(folder)
    return folder
