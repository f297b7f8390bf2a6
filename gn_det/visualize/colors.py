"""The one palette of drawings, plots and reports."""

from __future__ import annotations

import colorsys

Color = tuple[int, int, int]

#: Far apart, and readable on white, on near black and on photographs.
_PALETTE: tuple[Color, ...] = (
    (59, 130, 246),
    (249, 115, 22),
    (34, 165, 89),
    (168, 85, 247),
    (229, 72, 77),
    (14, 165, 183),
    (183, 121, 31),
    (236, 72, 153),
    (107, 142, 35),
    (124, 131, 161),
)


def class_color(index: int) -> Color:
    """RGB color of a class or curve: the same in every picture, distinct from its neighbors."""
    if index < len(_PALETTE):
        return _PALETTE[index]
    step = index - len(_PALETTE)
    # The golden ratio never repeats a hue; three levels of lightness keep near hues apart.
    hue = (0.09 + 0.61803398875 * step) % 1.0
    r, g, b = colorsys.hls_to_rgb(hue, (0.5, 0.36, 0.66)[step % 3], 0.8)
    return round(r * 255), round(g * 255), round(b * 255)


def hex_color(index: int) -> str:
    """:func:`class_color` as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*class_color(index))
