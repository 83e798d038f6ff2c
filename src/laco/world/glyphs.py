"""Letters, digits and shapes as small alpha masks, drawn once and kept; the fonts come with matplotlib."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Bold", "STIXGeneralBol")
FONT_SIZES = (13, 14, 15)
# Without I, J, O, Q, U, V, W: told apart from their twins by one or two pixels at this size.
LETTERS = "ABCDEFGHKLMNPRSTXYZ"
DIGITS = "0123456789"

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 215),
    "yellow": (232, 190, 25),
    "purple": (150, 50, 180),
    "cyan": (40, 185, 200),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")

_SUPERSAMPLE = 4  # shapes are drawn this much larger and shrunk, for smooth edges


@cache
def glyph(font: str, size: int, char: str) -> tuple[np.ndarray, int]:
    """Alpha mask of one character and its advance.

    Returns:
        (height, width) float32 in [0, 1], every glyph of a font and size on the same baseline and height, and the
        advance to the next character in pixels.
    """
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    face = ImageFont.truetype(str(path), size)
    ascent, _ = face.getmetrics()
    top = round(face.getbbox("H")[1])  # capitals and digits have no descender: cut the line above and below them
    advance = max(round(face.getlength(char)), 1)
    picture = Image.new("L", (advance + 2, ascent - top + 1))
    ImageDraw.Draw(picture).text((1, -top), char, fill=255, font=face)
    return np.asarray(picture, dtype=np.float32) / 255, advance


@cache
def shape_mask(kind: str, size: int) -> np.ndarray:
    """Alpha mask of a shape, (size, size) float32 in [0, 1]."""
    n = size * _SUPERSAMPLE
    picture = Image.new("L", (n, n))
    draw = ImageDraw.Draw(picture)
    m, e = n / 2, n - 1
    if kind == "circle":
        draw.ellipse((0, 0, e, e), fill=255)
    elif kind == "ring":
        draw.ellipse((0, 0, e, e), fill=255)
        draw.ellipse((n * 0.27, n * 0.27, e - n * 0.27, e - n * 0.27), fill=0)
    elif kind == "square":
        draw.rectangle((n * 0.06, n * 0.06, e - n * 0.06, e - n * 0.06), fill=255)
    elif kind == "triangle":
        draw.polygon([(m, 0), (e, e), (0, e)], fill=255)
    elif kind == "diamond":
        draw.polygon([(m, 0), (e, m), (m, e), (0, m)], fill=255)
    else:
        assert kind == "cross", kind
        draw.rectangle((n * 0.34, 0, n * 0.66, e), fill=255)
        draw.rectangle((0, n * 0.34, e, n * 0.66), fill=255)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
