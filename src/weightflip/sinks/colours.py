"""From numbers to colours: a scale that a few outliers do not stretch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightflip.overview import FAR_OUTSIDE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

# matplotlib's viridis (CC0), every 1/16: its lightness grows evenly, also for colour-blind eyes and in print.
_PALETTE = (
    (68, 1, 84),
    (72, 24, 106),
    (71, 45, 123),
    (66, 64, 134),
    (59, 82, 139),
    (51, 99, 141),
    (44, 114, 142),
    (38, 129, 142),
    (33, 144, 140),
    (31, 159, 136),
    (40, 174, 128),
    (62, 188, 116),
    (93, 201, 99),
    (130, 211, 76),
    (171, 220, 50),
    (213, 226, 26),
    (253, 231, 37),
)
NOTHING = (224, 224, 224)
# Of numbers below and above the scale: beyond its dark end, and what its bright end is not taken for.
BELOW, ABOVE = (0, 0, 0), (214, 39, 40)

# Values that spread over more than this are shown on a logarithmic scale.
_LOGARITHMIC = 50.0
# What is far outside is left out where it is a few, and the others have no more of the scale than this.
_FEW, _MOST = 1 / 8, 0.7


@dataclass(frozen=True)
class Scale:
    """From values to [0, 1].

    Attributes:
        low: The value at 0.
        high: The value at 1.
        is_logarithmic: Whether it is.
        lowest: The smallest value, which may lie below ``low``.
        highest: The largest value, which may lie above ``high``.
    """

    low: float
    high: float
    is_logarithmic: bool
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Any) -> Scale:
        """The scale for an array of values: all of it, but for a few that would stretch it over nothing.

        A value is left out if it is 3 interquartile ranges beyond a quartile, on this scale. No more than an eighth of
        them are, and only where the others take up less than 70 % of the scale.
        """
        import numpy as np

        known = np.asarray(values)[np.isfinite(values)]
        whole = cls._whole(known)
        places = whole.positions(known)
        first, third = np.quantile(places, (0.25, 0.75)) if places.size else (0.0, 0.0)
        reach = FAR_OUTSIDE * (third - first)
        is_near = (places >= first - reach) & (places <= third + reach)
        near = places[is_near]
        if not near.size or near.size < (1 - _FEW) * places.size or not 0 < np.ptp(near) < _MOST * np.ptp(places):
            return whole
        scale, far = cls._whole(known[is_near]), known[~is_near]
        return replace(scale, lowest=min(scale.lowest, *far.tolist()), highest=max(scale.highest, *far.tolist()))

    @classmethod
    def _whole(cls, known: Any) -> Scale:
        positive = known[known > 0]
        lowest, highest = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        low = float(positive.min()) if positive.size else 0.0
        if lowest >= 0 and positive.size and highest > _LOGARITHMIC * low:
            # 0 is the lowest of it, and nothing that lies outside.
            return cls(low, highest, True, low, highest)
        return cls(lowest, highest, False, lowest, highest)

    def positions(self, values: Any) -> Any:
        """An array of values to one of places on the scale; those outside of it, 0 on a logarithmic one, to its end."""
        import numpy as np

        low, high = self.low, self.high
        if self.is_logarithmic:
            low, high = math.log(low), math.log(high)
            with np.errstate(divide="ignore"):
                values = np.log(values)
        if high == low:
            return np.where(np.isnan(values), np.nan, 0.5)
        return np.clip((values - low) / (high - low), 0, 1)

    def at(self, position: float) -> float:
        """The value at a place on the scale."""
        if self.is_logarithmic:
            return math.exp(math.log(self.low) * (1 - position) + math.log(self.high) * position)
        return self.low * (1 - position) + self.high * position

    def colours(self, values: Any) -> Pixels:
        """An array of values to one of colours: of what lies outside, and of NaN, colours that the scale has not."""
        found = colours(self.positions(values))
        if self.lowest < self.low:
            found[values < self.low] = BELOW
        if self.highest > self.high:
            found[values > self.high] = ABOVE
        return found


def colours(positions: Any) -> Pixels:
    """Places on a scale to colours."""
    import numpy as np

    stops = np.linspace(0, 1, len(_PALETTE))
    known = np.nan_to_num(positions)
    mixed = np.stack([np.interp(known, stops, channel) for channel in zip(*_PALETTE, strict=True)], axis=-1)
    mixed[np.isnan(positions)] = NOTHING
    rounded: Pixels = np.round(mixed).astype(np.uint8)
    return rounded
