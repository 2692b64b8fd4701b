"""Flip rate against step size as a picture: a point for each layer, and the line on which evenly spread weights lie."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from weightflip.overview import outliers
from weightflip.records import LayerRecord, Quotient
from weightflip.sinks.heatmap import FONT_SIZE, FRAME, INK, PAPER, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightflip.sinks.colours import Pixels

_LEFT, _TOP, _WIDTH, _HEIGHT = 90, 56, 440, 380
_GRID = (224, 224, 224)
_POINT, _FAR_OFF = (31, 119, 180), (176, 0, 32)
_RADIUS = 4
# A layer is named where its flip rate is this many times that of the line, or less than its part of it.
_FAR = 1.5
_MOST_NAMES = 8


class Spot(NamedTuple):
    """One layer.

    Attributes:
        name: The layer's.
        expected: Its flip rate, if its weights were spread evenly in their cells.
        flip_rate: Its flip rate; 0 is shown at the lower border.
        is_far: Whether it lies off the line, by more than chance.
        stands_out: Whether its flip rate is far from that of the others.
    """

    name: str
    expected: float
    flip_rate: float
    is_far: bool = False
    stands_out: bool = False

    @property
    def distance(self) -> float:
        """From the line, in factors, as a logarithm."""
        return abs(math.log(self.flip_rate / self.expected)) if self.flip_rate else math.inf


def spots(layers: Sequence[LayerRecord], value: str) -> list[Spot]:
    """The layers that have a value: the flip rate / the one that is expected."""
    rates = {layer.name: Quotient(layer.window.flips, layer.window.weight_steps) for layer in layers}
    odd = set(outliers(rates))
    found = []
    for layer in layers:
        quotient = layer.quotients.get(value)
        if quotient is None or not quotient.denominator or not layer.window.weight_steps:
            continue
        rate = layer.flip_rate
        # Where the group has not looked at all steps, only the quotient tells. No flips: what it has looked at.
        expected = rate / quotient.value if quotient.numerator else quotient.denominator / layer.window.weight_steps
        found.append(
            Spot(layer.name, expected, rate if quotient.numerator else 0.0, _is_far(quotient), layer.name in odd)
        )
    return found


def _is_far(quotient: Quotient) -> bool:
    """By a factor, and by more than chance does where few flips are counted."""
    found, expected = quotient
    is_much = not expected / _FAR <= found <= expected * _FAR
    return is_much and abs(found - expected) > 3 * math.sqrt(max(found, expected))


def draw(layers: Sequence[Spot], expects: str) -> Pixels:
    """The picture.

    Args:
        layers: At least one.
        expects: What the expected flip rate is.

    Returns:
        RGB, uint8, of shape (height, width, 3).
    """
    return _Plot(layers).picture(expects)


class _Plot:
    """Where the parts of the picture are, on logarithmic axes that are alike."""

    def __init__(self, layers: Sequence[Spot]) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self._layers = layers
        rates = [rate for spot in layers for rate in (spot.expected, spot.flip_rate) if rate > 0] or [1.0]
        self._low = math.floor(math.log10(min(rates)) - 0.05)
        self._high = max(self._low + 1, math.ceil(math.log10(max(rates))))
        self._font = ImageFont.load_default(FONT_SIZE)
        self._image = Image.new("RGB", (_LEFT + _WIDTH + 30, _TOP + _HEIGHT + 62), PAPER)
        self._paint = ImageDraw.Draw(self._image)

    def picture(self, expects: str) -> Pixels:
        import numpy as np

        self._axes(expects)
        self._line()
        far = sorted((spot for spot in self._layers if spot.is_far), key=lambda spot: -spot.distance)[:_MOST_NAMES]
        for spot in self._layers:
            self._point(spot, _FAR_OFF if spot in far else _POINT)
        self._names(far, [spot for spot in self._layers if spot.stands_out and spot not in far][:_MOST_NAMES])
        return np.asarray(self._image)

    def _at(self, expected: float, flip_rate: float) -> tuple[float, float]:
        def share(rate: float) -> float:
            place = (math.log10(rate) - self._low) / (self._high - self._low) if rate > 0 else 0.0
            return min(1.0, max(0.0, place))

        return _LEFT + share(expected) * _WIDTH, _TOP + (1 - share(flip_rate)) * _HEIGHT

    def _axes(self, expects: str) -> None:
        self._text(_LEFT, 14, "flip rate of each layer; the line: weights spread evenly in their cells", "lm")
        for power in range(self._low, self._high + 1):
            x, y = self._at(10.0**power, 10.0**power)
            self._paint.line((x, _TOP, x, _TOP + _HEIGHT), fill=_GRID)
            self._paint.line((_LEFT, y, _LEFT + _WIDTH, y), fill=_GRID)
            self._text(x, _TOP + _HEIGHT + 8, f"{10.0**power:g}", "mt")
            if power > self._low:
                self._text(_LEFT - 8, y, f"{10.0**power:g}", "rm")
        self._text(_LEFT + _WIDTH, _TOP + _HEIGHT + 32, expects, "rt")
        self._text(_LEFT, _TOP - 14, "flip rate", "lm")
        self._paint.rectangle((_LEFT, _TOP, _LEFT + _WIDTH, _TOP + _HEIGHT), outline=FRAME)

    def _line(self) -> None:
        self._paint.line((_LEFT, _TOP + _HEIGHT, _LEFT + _WIDTH, _TOP), fill=FRAME, width=2)
        self._text(_LEFT + 8, _TOP + 14, "above the line: more flips than the steps account for", "lm")
        self._text(_LEFT + _WIDTH - 8, _TOP + _HEIGHT - 14, "below: weights rest in their cells", "rm")

    def _point(self, spot: Spot, colour: tuple[int, int, int]) -> None:
        x, y = self._at(spot.expected, spot.flip_rate)
        self._paint.ellipse((x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS), fill=colour, outline=PAPER)

    def _names(self, far: Sequence[Spot], odd: Sequence[Spot]) -> None:
        """Beside their points, on the side where there is room; one above the other where points are close."""
        taken: list[float] = []
        for spot in (*far, *odd):
            x, y = self._at(spot.expected, spot.flip_rate)
            while any(abs(y - other) < FONT_SIZE for other in taken):
                y -= FONT_SIZE
            taken.append(y)
            is_right = x < _LEFT + _WIDTH / 2
            self._text(
                x + (8 if is_right else -8),
                y,
                shortened(spot.name),
                "lm" if is_right else "rm",
                _FAR_OFF if spot in far else INK,
            )

    def _text(self, x: float, y: float, words: str, anchor: str, ink: tuple[int, int, int] = INK) -> None:
        self._paint.text((x, y), words, fill=ink, font=self._font, anchor=anchor)
