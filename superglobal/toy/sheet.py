"""A contact sheet of a toy set: queries with easy, hard and junk photos, look-alikes, distractors."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from superglobal.toy.landmark import STREETS, STYLE_GROUP
from superglobal.toy.layout import relation
from superglobal.toy.photo import Photo
from superglobal.utils.io import write_atomically

CELL, TITLE, COLUMNS = 132, 14, 9
Cell = tuple[str, Photo]


def read_photos(root: Path) -> list[Photo]:
    """The lines of `photos.csv`."""
    with (root / "photos.csv").open(newline="", encoding="utf-8") as file:
        return [_photo(row) for row in csv.DictReader(file)]


def _photo(row: dict[str, str]) -> Photo:
    kinds = {"str": str, "int": int, "float": float}
    return Photo(**{name: kinds[str(Photo.__annotations__[name])](value) for name, value in row.items()})


def write_sheet(root: Path, path: Path, landmarks: int = 6) -> None:
    """Draw the sheet of the finished set in `root` as a JPEG."""
    photos = read_photos(root)
    there = {photo.landmark for photo in photos if photo.set == "query"}
    pairs = (number // 2 * STYLE_GROUP + number % 2 for number in range(landmarks))  # two of each style
    rows = [_landmark_row(photos, number) for number in pairs if number in there]
    others = [photo for photo in photos if photo.set == "distractor"]
    step = max(1, len(others) // COLUMNS)
    rows.append([("distractor" if p.place != STREETS else "no landmark", p) for p in others[::step]][:COLUMNS])
    train = [photo for photo in photos if photo.set == "train" and photo.view == 0]
    rows.append([(f"train, {p.style}", p) for p in train][:COLUMNS])
    sheet = Image.new("RGB", (CELL * COLUMNS, (CELL + TITLE) * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, (title, photo) in enumerate(row):
            _draw(sheet, x * CELL, y * (CELL + TITLE), title, root / photo.file, photo if title == "query" else None)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=82)
    write_atomically(path, buffer.getvalue())


def _landmark_row(photos: Sequence[Photo], landmark: int) -> list[Cell]:
    """A query with up to three easy, four hard and one junk photo."""
    query = next(p for p in photos if p.set == "query" and p.landmark == landmark)
    database = [p for p in photos if p.set == "database" and p.landmark == landmark]
    row = [("query", query)]
    for kind, most in (("easy", 3), ("hard", 4), ("junk", 1)):
        row += [(kind, p) for p in database if relation(query, p) == kind][:most]
    return row


def _draw(sheet: Image.Image, x: int, y: int, title: str, path: Path, boxed: Photo | None) -> None:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if boxed:
        ImageDraw.Draw(picture).rectangle((boxed.x1, boxed.y1, boxed.x2 - 1, boxed.y2 - 1), outline=(255, 220, 0))
    picture.thumbnail((CELL - 4, CELL - 4))
    sheet.paste(picture, (x + 2, y + TITLE))
    ImageDraw.Draw(sheet).text((x + 3, y + 1), title, fill=(20, 20, 20))
