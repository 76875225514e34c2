"""Load distractors: images that are relevant to no query, added to a database to make a benchmark harder."""

from __future__ import annotations

from pathlib import Path

from superglobal.data.download_links import SOURCES, download_command
from superglobal.data.evaluation_set import image_path
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.utils.io import read_file


def how_to_get_distractors(root: Path, name: str) -> str:
    """Return the expected file layout of a distractor set and, if the set can be downloaded, the command to do so.

    Args:
        root: folder that contains the folder of the set.
        name: name of the set and of its folder.
    """
    base = Path(root) / name
    text = f"{name} is expected as {base}/{name}.txt (one file name per line) and {base}/jpg/<line>"
    if name in SOURCES:
        text += f"; download it from {SOURCES[name].page}: {download_command(name, base)}"
    return text


def load_distractors(root: str | Path, name: str) -> list[ImageItem]:
    """Load a list of distractors. The image files are not read.

    The list is `<root>/<name>/<name>.txt`. It contains one file name per line, relative to `<root>/<name>/jpg`. Blank
    lines are ignored, and ".jpg" is appended to names without an image extension.

    Args:
        root: folder that contains the folder of the set.
        name: name of the set and of its folder.

    Returns:
        The images in the order of the list.

    Raises:
        InputError: the list is missing, empty or not UTF-8, a name occurs twice, or a path leads outside
            `<root>/<name>/jpg`.
    """
    folder = Path(root) / name
    source = folder / f"{name}.txt"
    try:
        lines = [line.strip() for line in read_file(source).decode().splitlines()]
    except OSError as error:
        hint = how_to_get_distractors(Path(root), name)
        raise InputError(f"list of distractors not found: {source}\n{hint}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text; expected one file name per line") from error
    paths = [image_path(folder / "jpg", line, source) for line in lines if line]
    if not paths:
        raise InputError(f"{source}: empty; expected one file name per line")
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise InputError(f"{source}: {path.name} is listed twice; remove the duplicate")
        seen.add(path)
    return [ImageItem(path) for path in paths]
