"""Define the download addresses, sizes and target folders of all data sets and weights, and hints for error messages.

The addresses come from the GitHub repositories filipradenovic/revisitop (README and python/download.py),
cvdfoundation/google-landmark (README) and sungonce/CVNet (README). They have not been tested with the original servers.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GLDV2_PAGE = "https://github.com/cvdfoundation/google-landmark"
GOOGLE_DRIVE_FOLDER = "https://drive.google.com/drive/folders/1gMbZ8JlTyPlH2-6HW5NHRe58LmKfJybx"
TOY_DATA_HINT = (
    "without a download: run superglobal toy-data --size medium to render toy landmarks (two minutes), then "
    "python train.py experiment=demo and python eval.py dataset=toy"
)
"""Hint at the end of messages about missing data."""
_REVISITOP_PAGE = "https://github.com/filipradenovic/revisitop"
_REVISITOP = "http://cmp.felk.cvut.cz/revisitop/data"
_R1M = "http://ptak.felk.cvut.cz/revisitop/revisitop1m"
_GLDV2 = "https://s3.amazonaws.com/google-landmark"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_THOR = "https://thor.robots.ox.ac.uk"
ImageList = Literal["revisited", "distractors", "index", "test", "train"]


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Attributes:
        urls: addresses of the same file, tried in order.
        path: path to save the file to, relative to the folder of the source.
        md5_url: address of a text file that contains the MD5 checksum of the file; None if none is published.
    """

    urls: tuple[str, ...]
    path: str
    md5_url: str | None = None

    @property
    def name(self) -> str:
        """Name of the file, without the folder."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """Files and archives that `superglobal download <name>` downloads.

    Attributes:
        name: name of the source on the command line.
        description: description in one line.
        folder: folder to download to, relative to `--data`.
        page: web page of the data set or the weights.
        files: files that are not archives: lists, ground truth and weights.
        archives: tar files of images.
        image_folder: folder of the images, relative to `folder`.
        image_list: kind of list that contains the names of the images; None if there are no images.
        n_images: number of images; None if it is unknown or there are no images.
        size: approximate total size of the archives in bytes; None if it is unknown.
        corrupt: names of archive members that are known not to be images; the lists of image names do not contain them.
        google_drive: whether the files are in a shared Google Drive folder. The folder is downloaded as a
            whole, because its single files have no addresses.
    """

    name: str
    description: str
    folder: str
    page: str
    files: tuple[RemoteFile, ...] = ()
    archives: tuple[RemoteFile, ...] = ()
    image_folder: str = "jpg"
    image_list: ImageList | None = None
    n_images: int | None = None
    size: float | None = None
    corrupt: frozenset[str] = frozenset()
    google_drive: bool = False


def select_sources(names: Iterable[str]) -> list[Source]:
    """Return the sources with the given names, in the order of the names and without duplicates.

    A name can also be a key of `GROUPS`, which stands for several sources.
    """
    expanded = [member for name in names for member in GROUPS.get(name, (name,))]
    return [SOURCES[name] for name in dict.fromkeys(expanded)]


def download_command(name: str, folder: Path) -> str:
    """Return the command that downloads the source `name`, for messages.

    The command downloads to `folder` if the name of `folder` is the folder name of the source. Otherwise, it downloads
    to the default folder.
    """
    command = f"superglobal download {name}"
    # `superglobal download` can choose the parent folder, but it always uses the folder name of the source.
    if folder.name != SOURCES[name].folder:
        return command
    return f"{command} --data {shlex.quote(str(folder.parent))}"


def how_to_get_gldv2_train(root: Path) -> str:
    """Return the expected file layout of the GLDv2 training images in `root`, and the download command."""
    return (
        f"GLDv2 is expected as {root}/train/a/b/c/<id>.jpg with {root}/train.csv and {root}/train_clean.csv; download "
        f"it from {GLDV2_PAGE}: {download_command('gldv2-train', root)} (add --packed to keep the tar files, and set "
        f"data.tars={root}/archives/train)\nimages of your own, with one sub-folder per class: python train.py "
        f"data=folder data.root=FOLDER experiment=finetune_photos\n{TOY_DATA_HINT}"
    )


def how_to_get_gldv2(root: Path) -> str:
    """Return the expected file layout of the GLDv2 evaluation sets in `root`, and the download commands."""
    contents = {
        "test": "queries and solutions",
        "index": "database of gldv2_test",
        "train": "database of gldv2_recognition and gldv2_val",
    }
    commands = ", ".join(
        f"{download_command(f'gldv2-{split}', root)} ({content})" for split, content in contents.items()
    )
    return (
        f"GLDv2 is expected as {root}/{{index,test,train}}/a/b/c/<id>.jpg with its lists and solutions in {root}; "
        f"download it from {GLDV2_PAGE}: {commands}\n{TOY_DATA_HINT}; the toy data set also has this layout: "
        "dataset.root=data/toy/gldv2"
    )


def tree_path(image: bytes) -> str:
    """Return the path `a/b/c/<id>.jpg` of a GLDv2 image, relative to the folder of its split.

    a, b and c are the first three characters of the id.
    """
    name = image.decode()
    return f"{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


def _revisitop(path: str) -> RemoteFile:
    """Create a `RemoteFile` for a file on the server of the Revisited benchmarks.

    Args:
        path: path of the file on the server.
    """
    url = f"{_REVISITOP}/{path}"
    return RemoteFile((url, url.replace("http://", "https://", 1)), path.rpartition("/")[2])


def _ground_truth(name: str) -> RemoteFile:
    """Create a `RemoteFile` for the ground-truth file of the Revisited benchmark `name`."""
    return _revisitop(f"datasets/{name}/gnd_{name}.pkl")


def _lists(*names: str) -> tuple[RemoteFile, ...]:
    """Create a `RemoteFile` for each of the given GLDv2 lists of images or landmarks.

    Args:
        names: file names of the lists without the extension ".csv", such as "train_clean".
    """
    return tuple(RemoteFile((f"{_GLDV2}/metadata/{name}.csv",), f"{name}.csv") for name in names)


def _gldv2(
    split: ImageList, n_archives: int, n_images: int, archive_size: float, description: str, *lists: RemoteFile
) -> Source:
    """Return the `Source` of one split of GLDv2.

    Args:
        split: "train", "index" or "test".
        n_archives: number of archives of the split.
        n_images: number of images of the split.
        archive_size: approximate size of one archive in bytes.
        description: description of the source in one line.
        lists: lists of the images and other files that are not archives.
    """

    def archive(number: int) -> RemoteFile:
        name = f"images_{number:03d}"
        md5_url = f"{_GLDV2}/md5sum/{split}/md5.{name}.txt"
        return RemoteFile((f"{_GLDV2}/{split}/{name}.tar",), f"archives/{split}/{name}.tar", md5_url)

    archives = tuple(archive(number) for number in range(n_archives))
    return Source(
        f"gldv2-{split}",
        description,
        "gldv2",
        GLDV2_PAGE,
        lists,
        archives,
        image_folder=split,
        image_list=split,
        n_images=n_images,
        size=n_archives * archive_size,
    )


_SOLUTIONS = tuple(
    RemoteFile((f"{_GLDV2}/ground_truth/{task}_solution_v2.1.csv",), f"{task}_solution_v2.1.csv")
    for task in ("retrieval", "recognition")
)
# These files are HTML pages. The authors of Paris6k list them in corrupt.txt, and Revisited Paris does not use them.
_CORRUPT_PARIS = {
    "louvre": (136, 146),
    "moulinrouge": (422,),
    "museedorsay": (1059,),
    "notredame": (188,),
    "pantheon": (284, 960, 974),
    "pompidou": (195, 196, 201, 467, 640),
    "sacrecoeur": (299, 330, 353),
    "triomphe": (662, 833, 863, 867),
}
_ALL = (
    Source(
        "roxford5k",
        "Revisited Oxford; faces are blurred, as in all copies since 2022",
        "roxford5k",
        _REVISITOP_PAGE,
        (_ground_truth("roxford5k"),),
        (
            RemoteFile(
                (f"{_OXFORD}/oxbuildings/oxbuild_images-v1.tgz", f"{_THOR}/oxbuildings/oxbuild_images-v1.tgz"),
                "archives/oxbuild_images-v1.tgz",
            ),
        ),
        image_list="revisited",
        n_images=4993 + 70,
        size=1.94e9,
    ),
    Source(
        "rparis6k",
        "Revisited Paris; faces are blurred, as in all copies since 2022",
        "rparis6k",
        _REVISITOP_PAGE,
        (_ground_truth("rparis6k"),),
        tuple(
            RemoteFile(
                (f"{_OXFORD}/parisbuildings/{name}", f"{_THOR}/datasets/paris-buildings/{name}"), f"archives/{name}"
            )
            for name in ("paris_1-v1.tgz", "paris_2-v1.tgz")
        ),
        image_list="revisited",
        n_images=6322 + 70,
        corrupt=frozenset(f"paris_{place}_{n:06d}.jpg" for place, ns in _CORRUPT_PARIS.items() for n in ns),
    ),
    Source(
        "revisitop1m",
        "one million distractors for both Revisited sets",
        "revisitop1m",
        _REVISITOP_PAGE,
        (RemoteFile((f"{_R1M}/revisitop1m.txt",), "revisitop1m.txt"),),
        tuple(
            RemoteFile((f"{_R1M}/jpg/revisitop1m.{n}.tar.gz",), f"archives/revisitop1m.{n}.tar.gz")
            for n in range(1, 101)
        ),
        image_list="distractors",
    ),
    Source(
        "gldv2-csv",
        "all lists and solutions of Google Landmarks v2",
        "gldv2",
        GLDV2_PAGE,
        _lists("train", "train_clean", "train_attribution", "train_label_to_category", "train_label_to_hierarchical")
        + _lists("index", "index_image_to_landmark", "index_label_to_category", "index_label_to_hierarchical", "test")
        + _SOLUTIONS,
    ),
    _gldv2("test", 20, 117_577, 500e6, "queries of GLDv2, with the solutions", *_lists("test"), *_SOLUTIONS),
    _gldv2("index", 100, 761_757, 850e6, "database of GLDv2's retrieval task", *_lists("index")),
    _gldv2("train", 500, 4_132_914, 1e9, "training images of GLDv2", *_lists("train", "train_clean")),
    Source(
        "cvnet",
        "weights of CVNet, which the reference evaluates (Google Drive)",
        "cvnet",
        "https://github.com/sungonce/CVNet",
        tuple(
            RemoteFile((f"{GOOGLE_DRIVE_FOLDER}/{name}",), name)
            for name in ("CVPR2022_CVNet_R50.pyth", "CVPR2022_CVNet_R101.pyth")
        ),
        google_drive=True,
    ),
    Source(
        "revisited-features",
        "example descriptors by the authors of the Revisited sets, for scripts/check_metrics.py",
        "revisited-features",
        _REVISITOP_PAGE,
        tuple(
            file
            for name in ("roxford5k", "rparis6k")
            for file in (_ground_truth(name), _revisitop(f"features/{name}_resnet_rsfm120k_gem.mat"))
        ),
    ),
)
SOURCES = {source.name: source for source in _ALL}
GROUPS = {"gldv2": ("gldv2-csv", "gldv2-test", "gldv2-index", "gldv2-train")}
SOURCE_NAMES = [*SOURCES, *GROUPS]
