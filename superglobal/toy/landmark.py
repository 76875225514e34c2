"""Construct a landmark from its number, and the plain houses and trees around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from superglobal.toy.building import Builder
from superglobal.toy.facade import Style, draw_facade, draw_layout, draw_style
from superglobal.toy.numerics import RandomStream
from superglobal.toy.solids import Solid, block
from superglobal.toy.texture import Texture, ground_texture, roof_texture

TRAINING, EVALUATION, DISTRACTORS, STREETS = "train", "evaluation", "distractors", "streets"
STYLE_GROUP = 2  # number of consecutive landmarks that share a style
HOUSES = 10  # number of different houses from which all backgrounds are composed


@dataclass(frozen=True)
class Landmark:
    """A building with its surroundings, which are the same in all its images.

    A street is represented as a landmark without a building.

    Attributes:
        solids: solids of the building; empty for a street.
        houses: solids of the houses around the building.
        trees: (x, y, height) of each tree in meters.
        ground: texture of the ground.
        width: extent of the building along x in meters, symmetric about x = 0. For a street, the width, depth and
            height are those of the empty area in the center.
        depth: extent of the building along y in meters.
        height: extent of the building along z in meters.
    """

    solids: tuple[Solid, ...]
    houses: tuple[Solid, ...]
    trees: tuple[tuple[float, float, float], ...]
    ground: Texture
    width: float
    depth: float
    height: float


def style_number(split: str, number: int) -> tuple[str, int]:
    """Return the (split, group number) that determines the style of a landmark.

    A group consists of `STYLE_GROUP` landmarks with consecutive numbers. Every second group of distractor
    landmarks has the same style as a group of evaluation landmarks, so that these distractors are hard to distinguish
    from the evaluation landmarks.

    Args:
        split: split of the landmark, e.g. "train".
        number: number of the landmark in its split.
    """
    group = number // STYLE_GROUP
    return (EVALUATION, group // 2) if split == DISTRACTORS and group % 2 == 0 else (split, group)


@lru_cache(maxsize=4)
def landmark_of(seed: int, split: str, number: int) -> Landmark:
    """Return the landmark with the given number in a split. `style_number` determines the style of the landmark.

    For the split "streets", return houses and trees without a building.
    """
    if split == STREETS:
        return _street(seed, number)
    style_split, group = style_number(split, number)
    style = draw_style(RandomStream(seed, style_split, "style", group))
    rng = RandomStream(seed, split, "landmark", number)
    # Landmarks of the same style differ in the colors of their walls and roofs.
    style = replace(style, wall=rng.tint(style.wall, 70), roof=rng.tint(style.roof, 50))
    builder = Builder(rng, style, roof_texture(rng, style.roof))
    form = style.forms[0] if rng.chance(0.65) else style.forms[1]
    getattr(builder, form)()
    corners = [corner for solid in builder.solids for corner in solid.corners]
    width, height = 2 * max(abs(c[0]) for c in corners), max(c[2] for c in corners)
    depth = max(c[1] for c in corners)
    houses, trees = _surroundings(rng, house_pool(seed), width, depth)
    return Landmark(tuple(builder.solids), houses, trees, ground_texture(rng), width, depth, height)


def _street(seed: int, number: int) -> Landmark:
    """Return the street with the given number: houses and trees without a building."""
    rng = RandomStream(seed, STREETS, number)
    width, depth = rng.uniform(4, 24), rng.uniform(4, 12)
    houses, trees = _surroundings(rng, house_pool(seed), width, depth)
    return Landmark((), houses, trees, ground_texture(rng), width, depth, rng.uniform(8, 16))


@dataclass(frozen=True)
class House:
    """A plain house in the background.

    Attributes:
        width: width in meters.
        depth: depth in meters.
        height: height in meters, without the roof.
        walls: textures of the front and of the sides.
        style: style of the house.
        roof: texture of the roof.
    """

    width: float
    depth: float
    height: float
    walls: tuple[Texture, Texture]
    style: Style
    roof: Texture


@lru_cache(maxsize=2)
def house_pool(seed: int) -> tuple[House, ...]:
    """Return the `HOUSES` houses from which all backgrounds are composed.

    The backgrounds of all landmarks consist of the same houses. The background of an image therefore says little about
    which landmark the image shows.
    """
    pool = []
    for number in range(HOUSES):
        rng = RandomStream(seed, "house", number)
        style = draw_style(rng)
        width, depth, height = rng.uniform(9, 16), rng.uniform(9, 13), rng.uniform(7, 17)
        walls = [draw_facade(rng, style, draw_layout(rng, style, wide, height, False)) for wide in (width, depth)]
        pool.append(House(width, depth, height, (walls[0], walls[1]), style, roof_texture(rng, style.roof)))
    return tuple(pool)


def _surroundings(
    rng: RandomStream, pool: tuple[House, ...], width: float, depth: float
) -> tuple[tuple[Solid, ...], tuple[tuple[float, float, float], ...]]:
    """Return random houses and trees around a landmark.

    Args:
        rng: random number generator.
        pool: houses to choose from.
        width: width of the landmark in meters.
        depth: depth of the landmark in meters.

    Returns:
        The solids of houses to the left, to the right and behind the landmark, and the (x, y, height) of trees in
        meters.
    """
    houses: list[Solid] = []
    gap = rng.choice((1.0, 6.0, 12.0, 25.0))
    for side in (-1, 1):
        edge = width / 2 + gap
        for _ in range(rng.integer(1, 2)):
            house = rng.choice(pool)
            houses += place(house, side * (edge + house.width / 2), rng.uniform(-2.0, 8.0))
            edge += house.width + rng.choice((0.0, 0.0, 5.0))
    for _ in range(rng.integer(1, 4)):
        houses += place(rng.choice(pool), rng.uniform(-60, 60), depth + rng.uniform(12, 60))
    trees = [
        (rng.choice((-1, 1)) * rng.uniform(0.5, 1.1) * width, rng.uniform(-12, 6), rng.uniform(5, 11))
        for _ in range(rng.integer(0, 3))
    ]
    return tuple(houses), tuple(trees)


def place(house: House, x: float, y: float) -> list[Solid]:
    """Return the solids of a house and its roof. The house is centered at `x`, with its front at `y`, in meters."""
    builder = Builder(RandomStream("house"), house.style, house.roof)
    front, side = house.walls
    builder.solids.append(block(x, house.width, y, house.depth, 0, house.height, front, side, house.style.roof))
    builder.ridge(x, house.width, y, house.depth, house.height, 3.5, 3.0, False)
    return builder.solids
