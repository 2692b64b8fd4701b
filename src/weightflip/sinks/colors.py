"""Maps numbers to colors, on a scale that a few outliers do not stretch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightflip.overview import FAR_OUTSIDE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

# matplotlib's viridis (CC0) in steps of 1/16. Its lightness grows evenly, also for color-blind viewers and in print.
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
NO_DATA = (224, 224, 224)
# Numbers below and above the scale: darker than its dark end, and distinct from its bright end.
BELOW, ABOVE = (0, 0, 0), (214, 39, 40)

# A larger ratio of maximum to minimum gets a logarithmic scale.
_LOGARITHMIC = 50.0
# Outliers are excluded if they are at most this fraction, and the other values span less than this part of the scale.
_MAX_OUTLIERS, _NARROW = 1 / 8, 0.7


@dataclass(frozen=True)
class ColorScale:
    """Maps values to [0, 1].

    Attributes:
        low: The value at 0.
        high: The value at 1.
        is_logarithmic: Whether the scale is logarithmic instead of linear.
        lowest: The smallest value. It may be below ``low``.
        highest: The largest value. It may be above ``high``.
    """

    low: float
    high: float
    is_logarithmic: bool
    lowest: float
    highest: float

    @classmethod
    def fit(cls, values: Any) -> ColorScale:
        """The scale for an array of values, excluding a few outliers that would stretch it.

        An outlier is 3 interquartile ranges beyond a quartile on the full scale. Outliers are excluded only if they are
        at most an eighth of the values and the other values span less than 70 % of the full scale.
        """
        import numpy as np

        known = np.asarray(values)[np.isfinite(values)]
        whole = cls._fit_all(known)
        places = whole.positions(known)
        first, third = np.quantile(places, (0.25, 0.75)) if places.size else (0.0, 0.0)
        reach = FAR_OUTSIDE * (third - first)
        is_near = (places >= first - reach) & (places <= third + reach)
        near = places[is_near]
        has_few_outliers = near.size and near.size >= (1 - _MAX_OUTLIERS) * places.size
        if not has_few_outliers or not 0 < np.ptp(near) < _NARROW * np.ptp(places):
            return whole
        scale, far = cls._fit_all(known[is_near]), known[~is_near]
        return replace(scale, lowest=min(scale.lowest, *far.tolist()), highest=max(scale.highest, *far.tolist()))

    @classmethod
    def _fit_all(cls, known: Any) -> ColorScale:
        positive = known[known > 0]
        lowest, highest = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        low = float(positive.min()) if positive.size else 0.0
        if lowest >= 0 and positive.size and highest > _LOGARITHMIC * low:
            # 0 counts as the lowest value, not as below the scale.
            return cls(low, highest, True, low, highest)
        return cls(lowest, highest, False, lowest, highest)

    def positions(self, values: Any) -> Any:
        """Positions of an array of values on the scale. Values outside it, and 0 on a log scale, map to its ends."""
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
        """The value at a position on the scale."""
        if self.is_logarithmic:
            return math.exp(math.log(self.low) * (1 - position) + math.log(self.high) * position)
        return self.low * (1 - position) + self.high * position

    def colors(self, values: Any) -> Pixels:
        """Colors of an array of values. NaN and values outside the scale get colors that are not on the scale."""
        pixels = interpolate_colors(self.positions(values))
        if self.lowest < self.low:
            pixels[values < self.low] = BELOW
        if self.highest > self.high:
            pixels[values > self.high] = ABOVE
        return pixels


def interpolate_colors(positions: Any) -> Pixels:
    """Colors of positions on a scale."""
    import numpy as np

    stops = np.linspace(0, 1, len(_PALETTE))
    known = np.nan_to_num(positions)
    mixed = np.stack([np.interp(known, stops, channel) for channel in zip(*_PALETTE, strict=True)], axis=-1)
    mixed[np.isnan(positions)] = NO_DATA
    rounded: Pixels = np.round(mixed).astype(np.uint8)
    return rounded
