"""What can be loaded, about how large it is, and what of it is there."""

from __future__ import annotations

from pathlib import Path

from superglobal.data.catalogue import GROUPS, SOURCES, Source
from superglobal.download.presence import list_beside


def overview(data: Path) -> str:
    """A table, a line or two for each name of the command. No server is asked."""
    lines = [f"{'name':20}{'archives':>17}{'photos':>11}  in {data}"]
    for source in SOURCES.values():
        photos = f"{source.photos:,}" if source.photos else ""
        lines.append(f"{source.name:20}{_archives(source):>17}{photos:>11}  {_there(source, data / source.folder)}")
        lines.append(f"    {source.about}")
    lines += [f"{name:20}all of {', '.join(parts)}" for name, parts in GROUPS.items()]
    return "\n".join([*lines, "Sizes are about; the servers are asked for them before anything is loaded."])


def _archives(source: Source) -> str:
    if not source.archives:
        return ""
    size = f", {source.size / 1e9:.1f} GB" if source.size else ""
    return f"{len(source.archives)}{size}"


def _there(source: Source, root: Path) -> str:
    parts = [(sum((root / file.path).is_file() for file in source.files), len(source.files), "files")]
    if source.archives:
        targets = [root / archive.path for archive in source.archives]
        parts.append((sum(list_beside(target).is_file() for target in targets), len(targets), "archives unpacked"))
        packed = sum(target.is_file() for target in targets)
        parts += [(packed, len(targets), "archives as such")] if packed else []
    if not any(count for count, _, _ in parts):
        return "nothing" if not source.archives or not (root / source.images).is_dir() else "photos of another origin"
    return ", ".join(f"{count} of {total} {what}" for count, total, what in parts)
