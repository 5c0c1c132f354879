"""The small world of pictures: a circle and a square of two colours on white, and what can be said about them.

Everything here was written for this project. `make_data.py` and `make_model.py` draw from it. Importing it lets them
import what the quickstart shares, too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart"
if str(QUICKSTART) not in sys.path:
    sys.path.append(str(QUICKSTART))  # behind this folder, whose scripts have the same names

from shared import draw_number  # noqa: E402
from style import is_correct  # noqa: E402

SHAPES = ("circle", "square")
QUESTION = "Which colour is the circle?"
REQUEST = "Describe the picture."
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 180),
    "black": (20, 20, 20),
}
BACKGROUND = (245, 245, 245)
SIDE = 48
CELL = SIDE // 2
SPLITS = {
    "validation": ({"red", "green"}, {"blue", "black"}, {"yellow", "purple"}),
    "heldout": ({"red", "black"}, {"green", "purple"}, {"blue", "yellow"}),
}
"""Which two colours the pictures of a split have, either way round; those of `train` have any other two."""


@dataclass(frozen=True)
class Scene:
    """One picture.

    Attributes:
        circle: Colour of the circle.
        square: Colour of the square, another one.
        key: What places and sizes are drawn from; the same picture for the same key, everywhere.
    """

    circle: str
    square: str
    key: str

    def draw(self, shapes: tuple[str, ...] = SHAPES) -> Image.Image:
        """Returns the picture of some of `SHAPES`; each lies in a quarter of its own."""
        picture = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
        pen = ImageDraw.Draw(picture)
        first = draw_number(f"{self.key}/quarter") % 4
        quarters = {"circle": first, "square": (first + 1 + draw_number(f"{self.key}/other") % 3) % 4}
        for shape in shapes:
            left, top, size = (draw_number(f"{self.key}/{shape}/{what}") for what in ("left", "top", "size"))
            x, y = quarters[shape] % 2 * CELL + 1 + left % 4, quarters[shape] // 2 * CELL + 1 + top % 4
            length = 15 + size % 5
            outline = pen.ellipse if shape == "circle" else pen.rectangle
            outline((x, y, x + length, y + length), fill=COLOURS[getattr(self, shape)])
        return picture

    def describe(self, shapes: tuple[str, ...] = SHAPES) -> str:
        """Returns what is to be seen in a picture of these shapes."""
        return f"{' and '.join(f'a {getattr(self, shape)} {shape}' for shape in shapes)}.".capitalize()

    @property
    def answers(self) -> tuple[str, str]:
        """The right answer to `QUESTION` and the wrong one, which names the square's colour."""
        return f"The circle is {self.circle}.", f"The circle is {self.square}."

    def swapped(self) -> Scene:
        """Returns the scene with the colours exchanged, whose right answers are the wrong ones here."""
        return Scene(self.square, self.circle, self.key)

    def is_right(self, answer: str) -> bool:
        """Whether an answer names the circle's colour and no other."""
        return {colour for colour in COLOURS if is_correct(answer, colour)} == {self.circle}


def scenes(split: str, count: int) -> list[Scene]:
    """Returns `count` scenes of a split, "train", "validation" or "heldout": its pairs of colours in turn."""
    kept = [pair for pairs in SPLITS.values() for pair in pairs]
    pairs = [
        (circle, square)
        for circle in COLOURS
        for square in COLOURS
        if circle != square
        and ({circle, square} in SPLITS[split] if split in SPLITS else {circle, square} not in kept)
    ]
    return [Scene(*pairs[number % len(pairs)], key=f"{split}/{number}") for number in range(count)]
