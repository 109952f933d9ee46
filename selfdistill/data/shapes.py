"""Drawn pictures to try an image-text model on: a circle or a square in one of four colours, somewhere on white."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")
PROMPT = "What colour is the shape? Answer with one word."


def draw_shape(colour: str, shape: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A circle or a square in a colour that Pillow knows, 4 pixels from the edges of a white picture of this size."""
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)((4, 4, size[0] - 5, size[1] - 5), fill=colour)
    return image


def draw_shapes(file: str | os.PathLike[str], count: int) -> list[dict[str, Any]]:
    """Write rows that ask for the colour of a drawn shape, and their pictures of 32 x 32 pixels.

    Args:
        file: the ``.jsonl`` file to write. The pictures lie beside it: ``train0.png`` for row 0 of ``train.jsonl``. The
            name is the random seed, so files of one name are equal, and ``test.jsonl`` has other rows.
        count: number of rows.

    Returns:
        The rows: ``prompt``, ``completion`` (the colour) and ``images`` (one path, relative to the file).
    """
    path = Path(file)
    rows: list[dict[str, Any]] = []
    chance = random.Random(path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour, shape = chance.choice(COLOURS), chance.choice(SHAPES)
        size, image = chance.randint(16, 26), Image.new("RGB", (32, 32), "white")
        image.paste(draw_shape(colour, shape, (size, size)), (chance.randint(0, 6), chance.randint(0, 6)))
        picture = f"{path.stem}{number}.png"
        image.save(path.parent / picture)
        rows.append({"prompt": PROMPT, "completion": colour, "images": [picture]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows
