"""Load distractors: images of unrelated places that are added to a database to make a benchmark harder."""

from __future__ import annotations

from pathlib import Path

from superglobal.data.download_links import SOURCES, download_command
from superglobal.data.evaluation_set import image_path
from superglobal.data.images import ImageItem
from superglobal.errors import InputError


def how_to_get_distractors(root: Path, name: str) -> str:
    """Return the layout of a distractor set and, for revisitop1m, the download command."""
    base = Path(root) / name
    text = f"{name} is expected as {base}/{name}.txt (one file name per line) and {base}/jpg/<line>"
    if name in SOURCES:
        text += f"; download it from {SOURCES[name].page}: {download_command(name, base)}"
    return text


def load_distractors(root: str | Path, name: str) -> list[ImageItem]:
    """Load the images `<root>/<name>/jpg/<line>` of the list `<root>/<name>/<name>.txt`, in its order.

    The list has one file name per line. Blank lines are ignored; ".jpg" is appended to names without an extension.

    Raises:
        InputError: the list is missing, empty or not UTF-8, or a name is repeated or not inside the folder.
    """
    folder = Path(root) / name
    source = folder / f"{name}.txt"
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
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
