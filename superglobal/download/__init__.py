"""Download data sets and weights.

This module prints the table of all sources. The module `fetch` downloads single files, `archives` unpacks archives, and
`sources` downloads a complete data set.
"""

from __future__ import annotations

from pathlib import Path

from superglobal.data.download_links import GROUPS, SOURCES, Source


def extracted_record(archive: Path) -> Path:
    """Return the path of the text file that lists the images extracted from `archive`, one per line."""
    return archive.with_name(f"{archive.name}.files")


def overview(data: Path) -> str:
    """Return a table of all sources: name, size, and which of the files exist below the folder `data`.

    No server is contacted.
    """
    lines = [f"{'name':20}{'archives':>17}{'images':>11}  in {data}"]
    for source in SOURCES.values():
        images = f"{source.n_images:,}" if source.n_images else ""
        archives = f"{len(source.archives)}" if source.archives else ""
        archives += f", {source.size / 1e9:.1f} GB" if source.size else ""
        lines.append(f"{source.name:20}{archives:>17}{images:>11}  {_status(source, data / source.folder)}")
        lines.append(f"    {source.description}")
    lines += [f"{name:20}all of {', '.join(members)}" for name, members in GROUPS.items()]
    return "\n".join(
        [*lines, "Sizes are approximate. Before a download, the exact sizes are requested from the server."]
    )


def _status(source: Source, root: Path) -> str:
    """Describe which files and archives of a source exist. `root` is the folder of the source."""
    files = sum((root / file.path).is_file() for file in source.files)
    archives = [root / archive.path for archive in source.archives]
    unpacked = sum(extracted_record(archive).is_file() for archive in archives)
    packed = sum(archive.is_file() for archive in archives)
    if not files + unpacked + packed:
        return "images from another source" if archives and (root / source.image_folder).is_dir() else "nothing"
    status = [f"{files} of {len(source.files)} files"]
    status += [f"{unpacked} of {len(archives)} archives unpacked"] if archives else []
    status += [f"{packed} of {len(archives)} archives packed"] if packed else []
    return ", ".join(status)
