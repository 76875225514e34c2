"""Draw a contact sheet of a toy data set: queries and their database images, distractors, and training images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from superglobal.data.images import read_image
from superglobal.toy.landmark import STREETS, STYLE_GROUP
from superglobal.toy.layout import relation
from superglobal.toy.photo import Photo
from superglobal.utils.io import read_csv, write_atomically

# The sheet is a grid: width of a cell and height of a title, in pixels, and number of images per row.
CELL, TITLE, COLUMNS = 132, 14, 9
Cell = tuple[str, Photo]
"""Title of an image, and the row of `photos.csv` that describes the image."""


def read_photos(root: Path) -> list[Photo]:
    """Load the rows of `photos.csv` from the folder of a data set."""
    columns, *rows = read_csv(root / "photos.csv")
    return [_photo(dict(zip(columns, row, strict=True))) for row in rows]


def _photo(row: dict[str, str]) -> Photo:
    """Convert a row of `photos.csv`, a dict of strings by column name, to a `Photo`."""
    kinds = {"str": str, "int": int, "float": float}
    return Photo(**{name: kinds[str(Photo.__annotations__[name])](value) for name, value in row.items()})


def write_sheet(root: Path, path: Path, landmarks: int = 6) -> None:
    """Write a contact sheet of a complete data set as a JPEG file.

    Args:
        root: folder of the data set.
        path: file to write.
        landmarks: maximum number of evaluation landmarks to show, one per row.
    """
    photos = read_photos(root)
    queried = {photo.landmark for photo in photos if photo.set == "query"}
    # Rows 2i and 2i + 1 of the sheet show two landmarks of the same style.
    pairs = (number // 2 * STYLE_GROUP + number % 2 for number in range(landmarks))
    rows = [_landmark_row(photos, number) for number in pairs if number in queried]
    distractors = [photo for photo in photos if photo.set == "distractor"]
    step = max(1, len(distractors) // COLUMNS)
    rows.append([("distractor" if p.place != STREETS else "no landmark", p) for p in distractors[::step]][:COLUMNS])
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
    """Choose the images for one row of the sheet, and return them with their titles.

    All images of the row show the evaluation landmark with the number `landmark`. The first image is a query. Up to
    three easy, four hard and one junk database image follow.
    """
    query = next(p for p in photos if p.set == "query" and p.landmark == landmark)
    database = [p for p in photos if p.set == "database" and p.landmark == landmark]
    row = [("query", query)]
    for kind, max_images in (("easy", 3), ("hard", 4), ("junk", 1)):
        row += [(kind, p) for p in database if relation(query, p) == kind][:max_images]
    return row


def _draw(sheet: Image.Image, x: int, y: int, title: str, path: Path, boxed: Photo | None) -> None:
    """Draw one image with its title on the contact sheet.

    Args:
        sheet: image to draw on.
        x: left edge of the title and the image in pixels.
        y: top edge of the title in pixels; the image is below.
        title: title above the image.
        path: image to show.
        boxed: row of the image in `photos.csv`, from which the bounding box of the landmark is drawn; None for no box.
    """
    picture = Image.fromarray(read_image(path))
    if boxed:
        ImageDraw.Draw(picture).rectangle((boxed.x1, boxed.y1, boxed.x2 - 1, boxed.y2 - 1), outline=(255, 220, 0))
    picture.thumbnail((CELL - 4, CELL - 4))
    sheet.paste(picture, (x + 2, y + TITLE))
    ImageDraw.Draw(sheet).text((x + 3, y + 1), title, fill=(20, 20, 20))
