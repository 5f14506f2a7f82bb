"""One ramp of colours for all heat maps: it reads on light and dark pages, and in grey."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STOPS = ((46, 32, 104), (43, 89, 152), (32, 144, 140), (122, 198, 104), (250, 232, 138))
"""Dark to light, evenly spaced."""
UNUSED = (214, 69, 65)
"""Stands out from the ramp: what is never used."""


def colours(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours `[…, 3]` of shares in [0, 1] `[…]`."""
    places = np.linspace(0, 1, len(STOPS))
    channels = [np.interp(shares, places, [stop[channel] for stop in STOPS]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def fill(share: float) -> tuple[str, str]:
    """A colour for a cell, and one to write on it."""
    red, green, blue = (int(channel) for channel in colours(np.asarray(share)))
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return css((red, green, blue)), "#14161a" if light else "#ffffff"


def css(colour: tuple[int, int, int]) -> str:
    """A colour as style sheets write it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
