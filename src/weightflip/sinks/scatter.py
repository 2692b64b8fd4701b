"""Scatter plot of flip rate against step size: one point per layer, and the line of evenly spread weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from weightflip.overview import outliers
from weightflip.records import LayerRecord, Quotient
from weightflip.sinks.heatmap import FONT_SIZE, FRAME, INK, PAPER, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightflip.sinks.colors import Pixels

_LEFT, _TOP, _WIDTH, _HEIGHT = 90, 56, 440, 380
_GRID = (224, 224, 224)
_POINT, _FAR_OFF = (31, 119, 180), (176, 0, 32)
_RADIUS = 4
# A layer is labeled if its flip rate differs from the line by more than this factor, in either direction.
_FAR = 1.5
_MAX_NAMES = 8


class Spot(NamedTuple):
    """One layer.

    Attributes:
        name: Name of the layer.
        expected: Its flip rate if its weights were spread evenly in their cells.
        flip_rate: Its flip rate. 0 is drawn at the lower edge.
        is_far: Whether it lies off the line by more than chance.
        stands_out: Whether its flip rate is far from that of the other layers.
    """

    name: str
    expected: float
    flip_rate: float
    is_far: bool = False
    stands_out: bool = False

    @property
    def distance(self) -> float:
        """Distance from the line, as the logarithm of the factor."""
        return abs(math.log(self.flip_rate / self.expected)) if self.flip_rate else math.inf


def spots(layers: Sequence[LayerRecord], value: str) -> list[Spot]:
    """The layers with a value that is the flip rate / the expected flip rate."""
    rates = {layer.name: Quotient(layer.window.flips, layer.window.weight_steps) for layer in layers}
    outlying = set(outliers(rates))
    collected = []
    for layer in layers:
        quotient = layer.quotients.get(value)
        if quotient is None or not quotient.denominator or not layer.window.weight_steps:
            continue
        rate = layer.flip_rate
        # If the group skips steps, only the ratio is comparable. Without flips, use the steps that it has seen.
        expected = rate / quotient.value if quotient.numerator else quotient.denominator / layer.window.weight_steps
        collected.append(
            Spot(layer.name, expected, rate if quotient.numerator else 0.0, _is_far(quotient), layer.name in outlying)
        )
    return collected


def _is_far(quotient: Quotient) -> bool:
    """Whether flips differ from the expected number by a factor, and by more than chance with few flips."""
    flips, expected = quotient
    is_much = not expected / _FAR <= flips <= expected * _FAR
    return is_much and abs(flips - expected) > 3 * math.sqrt(max(flips, expected))


def draw(layers: Sequence[Spot], expects: str) -> Pixels:
    """Draw the scatter plot.

    Args:
        layers: At least one layer.
        expects: Description of the expected flip rate.

    Returns:
        RGB, uint8, of shape (height, width, 3).
    """
    return _Plot(layers).render(expects)


class _Plot:
    """Layout and drawing, on logarithmic axes with equal ranges."""

    def __init__(self, layers: Sequence[Spot]) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self._layers = layers
        rates = [rate for spot in layers for rate in (spot.expected, spot.flip_rate) if rate > 0] or [1.0]
        self._low = math.floor(math.log10(min(rates)) - 0.05)
        self._high = max(self._low + 1, math.ceil(math.log10(max(rates))))
        self._font = ImageFont.load_default(FONT_SIZE)
        self._image = Image.new("RGB", (_LEFT + _WIDTH + 30, _TOP + _HEIGHT + 62), PAPER)
        self._canvas = ImageDraw.Draw(self._image)

    def render(self, expects: str) -> Pixels:
        import numpy as np

        self._draw_axes(expects)
        self._draw_line()
        far = sorted((spot for spot in self._layers if spot.is_far), key=lambda spot: -spot.distance)[:_MAX_NAMES]
        for spot in self._layers:
            self._draw_point(spot, _FAR_OFF if spot in far else _POINT)
        self._draw_names(far, [spot for spot in self._layers if spot.stands_out and spot not in far][:_MAX_NAMES])
        return np.asarray(self._image)

    def _position(self, expected: float, flip_rate: float) -> tuple[float, float]:
        def fraction(rate: float) -> float:
            position = (math.log10(rate) - self._low) / (self._high - self._low) if rate > 0 else 0.0
            return min(1.0, max(0.0, position))

        return _LEFT + fraction(expected) * _WIDTH, _TOP + (1 - fraction(flip_rate)) * _HEIGHT

    def _draw_axes(self, expects: str) -> None:
        self._draw_text(_LEFT, 14, "flip rate of each layer; the line: weights spread evenly in their cells", "lm")
        for power in range(self._low, self._high + 1):
            x, y = self._position(10.0**power, 10.0**power)
            self._canvas.line((x, _TOP, x, _TOP + _HEIGHT), fill=_GRID)
            self._canvas.line((_LEFT, y, _LEFT + _WIDTH, y), fill=_GRID)
            self._draw_text(x, _TOP + _HEIGHT + 8, f"{10.0**power:g}", "mt")
            if power > self._low:
                self._draw_text(_LEFT - 8, y, f"{10.0**power:g}", "rm")
        self._draw_text(_LEFT + _WIDTH, _TOP + _HEIGHT + 32, expects, "rt")
        self._draw_text(_LEFT, _TOP - 14, "flip rate", "lm")
        self._canvas.rectangle((_LEFT, _TOP, _LEFT + _WIDTH, _TOP + _HEIGHT), outline=FRAME)

    def _draw_line(self) -> None:
        self._canvas.line((_LEFT, _TOP + _HEIGHT, _LEFT + _WIDTH, _TOP), fill=FRAME, width=2)
        self._draw_text(_LEFT + 8, _TOP + 14, "above the line: more flips than the steps explain", "lm")
        self._draw_text(_LEFT + _WIDTH - 8, _TOP + _HEIGHT - 14, "below: weights rest in their cells", "rm")

    def _draw_point(self, spot: Spot, color: tuple[int, int, int]) -> None:
        x, y = self._position(spot.expected, spot.flip_rate)
        self._canvas.ellipse((x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS), fill=color, outline=PAPER)

    def _draw_names(self, far: Sequence[Spot], outlying: Sequence[Spot]) -> None:
        """Draw names next to their points, on the side with space. Names of close points are stacked."""
        used: list[float] = []
        for spot in (*far, *outlying):
            x, y = self._position(spot.expected, spot.flip_rate)
            # Above the axis labels.
            y = min(y, _TOP + _HEIGHT - FONT_SIZE)
            while any(abs(y - other) < FONT_SIZE for other in used):
                y -= FONT_SIZE
            used.append(y)
            is_right = x < _LEFT + _WIDTH / 2
            self._draw_text(
                x + (8 if is_right else -8),
                y,
                shortened(spot.name),
                "lm" if is_right else "rm",
                _FAR_OFF if spot in far else INK,
            )

    def _draw_text(self, x: float, y: float, words: str, anchor: str, ink: tuple[int, int, int] = INK) -> None:
        self._canvas.text((x, y), words, fill=ink, font=self._font, anchor=anchor)
