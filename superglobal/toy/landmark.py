"""Landmarks by number, and the plain houses and trees that stand around them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from superglobal.toy.building import Builder
from superglobal.toy.draws import Draws
from superglobal.toy.facade import Style, draw_facade, draw_layout, draw_style
from superglobal.toy.solids import Solid, block
from superglobal.toy.texture import Texture, ground_texture, roof_texture

TRAINING, EVALUATION, DISTRACTORS, STREETS = "train", "evaluation", "distractors", "streets"
STYLE_GROUP = 2
HOUSES = 10  # in the pool from which all backgrounds are taken


@dataclass(frozen=True)
class Landmark:
    """One place: the building, and the houses that always stand around it."""

    solids: tuple[Solid, ...]
    houses: tuple[Solid, ...]
    trees: tuple[tuple[float, float, float], ...]
    """(x, y, height) of the trees of the place."""
    ground: Texture
    width: float
    depth: float
    height: float


def style_number(split: str, number: int) -> tuple[str, int]:
    """(split, group) whose style a landmark has: `STYLE_GROUP` numbers that follow each other.

    Every other group of distractors borrows the style of an evaluation group, so that they look alike.
    """
    group = number // STYLE_GROUP
    return (EVALUATION, group // 2) if split == DISTRACTORS and group % 2 == 0 else (split, group)


@lru_cache(maxsize=4)
def landmark_of(seed: int, split: str, number: int) -> Landmark:
    """Landmark `number` of a split; neighbours in number share their style. A street has houses only."""
    if split == STREETS:
        return _street(seed, number)
    style_split, group = style_number(split, number)
    style = draw_style(Draws(seed, style_split, "style", group))
    draws = Draws(seed, split, "landmark", number)
    style = replace(style, wall=draws.tint(style.wall, 70), roof=draws.tint(style.roof, 50))  # each has its own paint
    builder = Builder(draws, style, roof_texture(draws, style.roof))
    form = style.forms[0] if draws.chance(0.65) else style.forms[1]
    getattr(builder, form)()
    corners = [corner for one in builder.solids for corner in one.corners]
    width, height = 2 * max(abs(c[0]) for c in corners), max(c[2] for c in corners)
    depth = max(c[1] for c in corners)
    houses, trees = _surroundings(draws, house_pool(seed), width, depth)
    return Landmark(tuple(builder.solids), houses, trees, ground_texture(draws), width, depth, height)


def _street(seed: int, number: int) -> Landmark:
    draws = Draws(seed, STREETS, number)
    width, depth = draws.real(4, 24), draws.real(4, 12)
    houses, trees = _surroundings(draws, house_pool(seed), width, depth)
    return Landmark((), houses, trees, ground_texture(draws), width, depth, draws.real(8, 16))


@dataclass(frozen=True)
class House:
    """A plain house of the pool: `walls` front and side."""

    width: float
    depth: float
    height: float
    walls: tuple[Texture, Texture]
    style: Style
    roof: Texture


@lru_cache(maxsize=2)
def house_pool(seed: int) -> tuple[House, ...]:
    """The houses all backgrounds are made of: what stands around a landmark tells little about which one it is."""
    pool = []
    for number in range(HOUSES):
        draws = Draws(seed, "house", number)
        style = draw_style(draws)
        width, depth, height = draws.real(9, 16), draws.real(9, 13), draws.real(7, 17)
        walls = [draw_facade(draws, style, draw_layout(draws, style, wide, height, False)) for wide in (width, depth)]
        pool.append(House(width, depth, height, (walls[0], walls[1]), style, roof_texture(draws, style.roof)))
    return tuple(pool)


def _surroundings(
    draws: Draws, pool: tuple[House, ...], width: float, depth: float
) -> tuple[tuple[Solid, ...], tuple[tuple[float, float, float], ...]]:
    """Houses left and right (on closed squares) and behind, and some trees."""
    houses: list[Solid] = []
    gap = draws.pick((1.0, 6.0, 12.0, 25.0))
    for side in (-1, 1):
        edge = width / 2 + gap
        for _ in range(draws.whole(1, 2)):
            house = draws.pick(pool)
            houses += place(house, side * (edge + house.width / 2), draws.real(-2.0, 8.0))
            edge += house.width + draws.pick((0.0, 0.0, 5.0))
    for _ in range(draws.whole(1, 4)):
        houses += place(draws.pick(pool), draws.real(-60, 60), depth + draws.real(12, 60))
    trees = [
        (draws.pick((-1, 1)) * draws.real(0.5, 1.1) * width, draws.real(-12, 6), draws.real(5, 11))
        for _ in range(draws.whole(0, 3))
    ]
    return tuple(houses), tuple(trees)


def place(house: House, x: float, y: float) -> list[Solid]:
    """The house with its roof, centred at `x`, its front at `y`."""
    builder = Builder(Draws("house"), house.style, house.roof)
    front, side = house.walls
    builder.solids.append(block(x, house.width, y, house.depth, 0, house.height, front, side, house.style.roof))
    builder.ridge(x, house.width, y, house.depth, house.height, 3.5, 3.0, False)
    return builder.solids
