"""CVNet's weights from their Google Drive folder, by gdown."""

from __future__ import annotations

from pathlib import Path

from superglobal.data.catalogue import DRIVE, Source
from superglobal.download.transfer import Way
from superglobal.errors import InputError


def load_folder(source: Source, root: Path, way: Way) -> None:
    """All files of the folder into `root`; those that are there are not loaded again, parts are gone on with.

    Raises:
        InputError: gdown is not installed, or Google Drive did not give them: with the folder, and what to do by hand.
    """
    try:
        import gdown
    except ImportError as error:
        raise InputError("CVNet's weights need gdown: pip install gdown") from error
    try:
        gdown.download_folder(
            url=DRIVE, output=str(root), use_cookies=False, resume=True, timeout=way.timeout, retries=way.tries - 1
        )
    except Exception as error:  # gdown lets requests', its parser's and its own through
        raise InputError(
            f"Google Drive did not give CVNet's weights ({type(error).__name__}: {error})\n{by_hand(source, root)}"
        ) from error


def by_hand(source: Source, root: Path) -> str:
    """What to do without gdown."""
    names = " and ".join(file.name for file in source.files)
    return (
        f"Google limits how often a file is loaded. By hand: open {DRIVE} in a browser, download {names}, put them "
        f"into {root}, and call again to have them checked; or name a server that has them with --base-url"
    )
