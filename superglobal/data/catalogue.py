"""What is had where: addresses, about how large, and below which folder it goes. Nothing is loaded here.

Addresses: filipradenovic/revisitop (README, python/download.py), cvdfoundation/google-landmark (README), sungonce/CVNet
(README). None of these hosts could be reached from where this was written.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GLDV2_PAGE = "https://github.com/cvdfoundation/google-landmark"
GLDV2 = "https://s3.amazonaws.com/google-landmark"
GROUND_TRUTH = "http://cmp.felk.cvut.cz/revisitop/data/datasets/{name}/gnd_{name}.pkl"
FEATURES = "http://cmp.felk.cvut.cz/revisitop/data/features/{name}_resnet_rsfm120k_gem.mat"
R1M = "http://ptak.felk.cvut.cz/revisitop/revisitop1m"
DRIVE = "https://drive.google.com/drive/folders/1gMbZ8JlTyPlH2-6HW5NHRe58LmKfJybx"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_THOR = "https://thor.robots.ox.ac.uk"
Lists = Literal["revisited", "distractors", "index", "test", "train"]
"""Which kind of list says what photos there are."""


@dataclass(frozen=True)
class Remote:
    """One file.

    Attributes:
        urls: where it is had; the first that has it serves.
        path: where it goes, below the folder of its source.
        md5: address of a text with its md5, where one is published.
    """

    urls: tuple[str, ...]
    path: str
    md5: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """What one name of the command stands for.

    Attributes:
        name: on the command line.
        about: in a line.
        folder: below `--data`.
        page: where its owners describe it.
        files: lists, ground truths, weights.
        archives: of photos.
        images: folder of the photos, below `folder`.
        lists: the kind of list that says what photos there are.
        photos: how many.
        size: of the archives together in bytes, about; None where no source says.
        corrupt: photos in the archives that are none, by file name; they are in no list.
        drive: whether the files are in a folder of Google Drive, which gives none by its address.
    """

    name: str
    about: str
    folder: str
    page: str
    files: tuple[Remote, ...] = ()
    archives: tuple[Remote, ...] = ()
    images: str = "jpg"
    lists: Lists | None = None
    photos: int | None = None
    size: float | None = None
    corrupt: frozenset[str] = frozenset()
    drive: bool = False


def chosen(names: list[str]) -> list[Source]:
    """The sources that names of the command mean, each once, in order; "gldv2" is all of its parts."""
    parts = [part for name in names for part in GROUPS.get(name, (name,))]
    return [SOURCES[part] for part in dict.fromkeys(parts)]


def download_command(name: str, folder: Path) -> str:
    """The command that gets a source into `folder`, for messages."""
    if folder.name != folder_of(name):
        return f"python scripts/download.py {name}"  # of a folder that has another name
    return f"python scripts/download.py {name} --data {shlex.quote(str(folder.parent))}"


def folder_of(name: str) -> str:
    """The folder of a source or a group, below `--data`."""
    return chosen([name])[0].folder


def _mirrored(url: str) -> tuple[str, ...]:
    """The address, and the same by https."""
    return url, url.replace("http://", "https://", 1)


def _ground_truth(name: str, folder: str = "") -> Remote:
    return Remote(_mirrored(GROUND_TRUTH.format(name=name)), f"{folder}gnd_{name}.pkl")


def _features(name: str) -> Remote:
    url = FEATURES.format(name=name)
    return Remote(_mirrored(url), url.rpartition("/")[2])


def _csv(*names: str) -> tuple[Remote, ...]:
    return tuple(Remote((f"{GLDV2}/metadata/{name}.csv",), f"{name}.csv") for name in names)


def _gldv2(split: Lists, tars: int, photos: int, each: float, about: str, *lists: Remote) -> Source:
    def tar(number: int) -> Remote:
        name = f"images_{number:03d}"
        md5 = f"{GLDV2}/md5sum/{split}/md5.{name}.txt"
        return Remote((f"{GLDV2}/{split}/{name}.tar",), f"archives/{split}/{name}.tar", md5)

    return Source(
        f"gldv2-{split}",
        about,
        "gldv2",
        GLDV2_PAGE,
        lists,
        tuple(tar(number) for number in range(tars)),
        split,
        split,
        photos,
        tars * each,
    )


_SOLUTIONS = tuple(
    Remote((f"{GLDV2}/ground_truth/{task}_solution_v2.1.csv",), f"{task}_solution_v2.1.csv")
    for task in ("retrieval", "recognition")
)
_REVISITOP = "https://github.com/filipradenovic/revisitop"
# HTML pages in place of JPEGs; the authors of Paris6k list them as corrupt.txt, Revisited Paris does without them.
_CORRUPT = {
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
        "Revisited Oxford, faces blurred as it is given out since 2022",
        "roxford5k",
        _REVISITOP,
        (_ground_truth("roxford5k"),),
        (
            Remote(
                (f"{_OXFORD}/oxbuildings/oxbuild_images-v1.tgz", f"{_THOR}/oxbuildings/oxbuild_images-v1.tgz"),
                "archives/oxbuild_images-v1.tgz",
            ),
        ),
        lists="revisited",
        photos=4993 + 70,
        size=1.94e9,
    ),
    Source(
        "rparis6k",
        "Revisited Paris, faces blurred as it is given out since 2022",
        "rparis6k",
        _REVISITOP,
        (_ground_truth("rparis6k"),),
        tuple(
            Remote((f"{_OXFORD}/parisbuildings/{name}", f"{_THOR}/datasets/paris-buildings/{name}"), f"archives/{name}")
            for name in ("paris_1-v1.tgz", "paris_2-v1.tgz")
        ),
        lists="revisited",
        photos=6322 + 70,
        corrupt=frozenset(f"paris_{place}_{n:06d}.jpg" for place, numbers in _CORRUPT.items() for n in numbers),
    ),
    Source(
        "revisitop1m",
        "a million distractors for the two",
        "revisitop1m",
        _REVISITOP,
        (Remote((f"{R1M}/revisitop1m.txt",), "revisitop1m.txt"),),
        tuple(
            Remote((f"{R1M}/jpg/revisitop1m.{n}.tar.gz",), f"archives/revisitop1m.{n}.tar.gz") for n in range(1, 101)
        ),
        lists="distractors",
    ),
    Source(
        "gldv2-csv",
        "all lists and solutions of Google Landmarks v2",
        "gldv2",
        GLDV2_PAGE,
        _csv("train", "train_clean", "train_attribution", "train_label_to_category", "train_label_to_hierarchical")
        + _csv("index", "index_image_to_landmark", "index_label_to_category", "index_label_to_hierarchical", "test")
        + _SOLUTIONS,
    ),
    _gldv2("test", 20, 117_577, 500e6, "queries of GLDv2, with the solutions", *_csv("test"), *_SOLUTIONS),
    _gldv2("index", 100, 761_757, 850e6, "database of GLDv2's retrieval task", *_csv("index")),
    _gldv2("train", 500, 4_132_914, 1e9, "training photos of GLDv2", *_csv("train", "train_clean")),
    Source(
        "cvnet",
        "CVNet's weights, which the reference evaluates (Google Drive)",
        "cvnet",
        "https://github.com/sungonce/CVNet",
        tuple(Remote((f"{DRIVE}/{name}",), name) for name in ("CVPR2022_CVNet_R50.pyth", "CVPR2022_CVNet_R101.pyth")),
        drive=True,
    ),
    Source(
        "revisited-features",
        "the Revisited authors' example features, for scripts/check_metrics.py",
        "revisited-features",
        _REVISITOP,
        tuple(one(name) for name in ("roxford5k", "rparis6k") for one in (_ground_truth, _features)),
    ),
)
SOURCES = {source.name: source for source in _ALL}
GROUPS = {"gldv2": ("gldv2-csv", "gldv2-test", "gldv2-index", "gldv2-train")}
NAMES = [*SOURCES, *GROUPS]
