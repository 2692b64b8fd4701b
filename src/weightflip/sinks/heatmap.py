"""Layers x time as a picture: a history of bounded size, and its drawing."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightflip.records import FlipRecord, Quotient, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

_COLUMNS = 200

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
_NOTHING = (224, 224, 224)
_INK = (33, 33, 33)
_FRAME = (96, 96, 96)
_PAPER = (255, 255, 255)

# Large letters in a small picture: TensorBoard shows it 350 pixels wide, until one clicks on it.
_PLOT_WIDTH = 440
_FONT_SIZE = 15
_NAME_CHARACTERS = 30
# Values that spread over more than this are shown on a logarithmic scale.
_LOGARITHMIC = 50.0


@dataclass
class _Column:
    """Some neighbouring records: the sums of each layer's numerators and denominators, in the order of the layers."""

    first_step: int
    last_step: int
    records: int = 0
    numerators: array[float] = field(default_factory=lambda: array("d"))
    denominators: array[float] = field(default_factory=lambda: array("d"))

    def add(self, row: int, numerator: float, denominator: float) -> None:
        for sums, number in ((self.numerators, numerator), (self.denominators, denominator)):
            if row >= len(sums):
                sums.extend([0.0] * (row + 1 - len(sums)))
            sums[row] += number

    def absorb(self, later: _Column) -> None:
        self.last_step = later.last_step
        self.records += later.records
        for row, (numerator, denominator) in enumerate(zip(later.numerators, later.denominators, strict=True)):
            self.add(row, numerator, denominator)

    def value(self, row: int) -> float:
        """NaN where nothing was counted."""
        known = row < len(self.denominators) and self.denominators[row]
        return self.numerators[row] / self.denominators[row] if known else math.nan


class History:
    """One value of the window, of each layer over time, in at most 200 columns.

    When they are full, neighbours are added up, two and two, and from then on each column takes twice as many records:
    counts are summed before they are divided. 8 bytes twice for each layer and column.

    Args:
        value: Its name, as in ``LayerRecord.quotients``.

    Attributes:
        layers: Names of the layers, in the order in which they came.
    """

    def __init__(self, value: str) -> None:
        self.value = value
        self.layers: dict[str, int] = {}
        self._columns: list[_Column] = []
        self._span = 1

    def __bool__(self) -> bool:
        return any(any(column.denominators) for column in self._columns)

    def add(self, record: FlipRecord, since: int) -> None:
        """Take the record of the steps after ``since``."""
        if not self._columns or self._columns[-1].records >= self._span:
            if len(self._columns) == _COLUMNS:
                self._halve()
            self._columns.append(_Column(since, record.step))
        column = self._columns[-1]
        column.last_step = record.step
        column.records += 1
        for layer in record.layers:
            row = self.layers.setdefault(layer.name, len(self.layers))
            column.add(row, *layer.quotients.get(self.value, Quotient(0, 0)))

    def _halve(self) -> None:
        for earlier, later in zip(self._columns[::2], self._columns[1::2], strict=True):
            earlier.absorb(later)
        self._columns = self._columns[::2]
        self._span *= 2

    @property
    def edges(self) -> list[int]:
        """Steps at which columns begin, and the one at which the last ends."""
        return [column.first_step for column in self._columns] + [column.last_step for column in self._columns[-1:]]

    @property
    def table(self) -> list[list[float]]:
        """A row for each layer, a column for each span of time; NaN where nothing was counted."""
        return [[column.value(row) for column in self._columns] for row in self.layers.values()]


@dataclass(frozen=True)
class _Scale:
    """From values to [0, 1]."""

    low: float
    high: float
    is_logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        known = [value for value in values if math.isfinite(value)]
        positive = [value for value in known if value > 0]
        if min(known, default=0.0) >= 0 and positive and max(positive) > _LOGARITHMIC * min(positive):
            return cls(min(positive), max(positive), True)
        return cls(min(known, default=0.0), max(known, default=0.0), False)

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
        if self.is_logarithmic:
            return math.exp(math.log(self.low) * (1 - position) + math.log(self.high) * position)
        return self.low * (1 - position) + self.high * position


def draw(history: History, title: str) -> Pixels:
    """The picture: a row for each layer with its name, time from left to right, and the colours' meaning below.

    Args:
        history: At least one record of one layer.
        title: What the colours stand for.

    Returns:
        RGB, uint8, of shape (height, width, 3).
    """
    return _Drawing(history).picture(title)


class _Drawing:
    """Where the parts of a picture are, and how each is painted."""

    def __init__(self, history: History) -> None:
        import numpy as np
        from PIL import Image, ImageDraw, ImageFont

        self._table = np.array(history.table)
        rows, columns = self._table.shape
        self._scale = _Scale.of(self._table.ravel().tolist())
        self._edges = history.edges
        self._names = [_shortened(name) for name in history.layers]
        self._font = ImageFont.load_default(_FONT_SIZE)
        self._row_height = max(3, min(30, 720 // rows))
        self._left = 20 + math.ceil(max(self._font.getlength(name) for name in self._names))
        self._top = 38
        self._right, self._bottom = self._left + _PLOT_WIDTH, self._top + rows * self._row_height
        # The colours' bar stands below, where there is room for it however few the layers are.
        self._bar_top = self._bottom + 62
        self._borders = np.round(np.linspace(0, _PLOT_WIDTH, columns + 1)).astype(int)
        self._image = Image.new("RGB", (self._right + 40, self._bar_top + 44), _PAPER)
        self._paint = ImageDraw.Draw(self._image)

    def picture(self, title: str) -> Pixels:
        import numpy as np

        self._text(self._left, 14, title, "lm")
        self._cells()
        self._layers()
        self._steps()
        self._legend()
        return np.asarray(self._image)

    def _text(self, x: float, y: float, words: str, anchor: str) -> None:
        self._paint.text((x, y), words, fill=_INK, font=self._font, anchor=anchor)

    def _cells(self) -> None:
        import numpy as np

        colours = _colours(self._scale.positions(self._table))
        self._paste(colours.repeat(self._row_height, axis=0).repeat(np.diff(self._borders), axis=1), self._top)
        self._paint.rectangle((self._left - 1, self._top - 1, self._right, self._bottom), outline=_FRAME)

    def _paste(self, pixels: Pixels, top: int) -> None:
        from PIL import Image

        self._image.paste(Image.fromarray(pixels), (self._left, top))

    def _layers(self) -> None:
        every = math.ceil((_FONT_SIZE + 2) / self._row_height)
        for row in range(0, len(self._names), every):
            self._text(self._left - 8, self._top + (row + 0.5) * self._row_height, self._names[row], "rm")

    def _steps(self) -> None:
        import numpy as np

        for step in _ticks(self._edges[0], self._edges[-1]):
            x = self._left + float(np.interp(step, self._edges, self._borders))
            self._paint.line((x, self._bottom, x, self._bottom + 5), fill=_FRAME)
            self._text(x, self._bottom + 8, f"{step:,}", "mt")
        self._text(self._right, self._bottom + 28, "optimizer steps", "rt")

    def _legend(self) -> None:
        import numpy as np

        scale = self._scale
        is_flat = scale.low == scale.high
        width = 30 if is_flat else 200
        bar = _colours(scale.positions(np.array([[scale.at(i / (width - 1)) for i in range(width)]])))
        self._paste(bar.repeat(14, axis=0), self._bar_top)
        for position in (0.5,) if is_flat else (0.0, 0.5, 1.0):
            self._text(self._left + position * width, self._bar_top + 20, f"{scale.at(position):.3g}", "mt")
        if scale.is_logarithmic:
            self._text(self._left, self._bottom + 28, "logarithmic, 0 as the lowest:", "lt")
        if np.isnan(self._table).any():
            right, top = self._right, self._bar_top
            self._paint.rectangle((right - 130, top, right - 117, top + 13), fill=_NOTHING)
            self._text(right, top + 7, "nothing counted", "rm")


def _colours(positions: Any) -> Pixels:
    import numpy as np

    stops = np.linspace(0, 1, len(_PALETTE))
    known = np.nan_to_num(positions)
    colours = np.stack([np.interp(known, stops, channel) for channel in zip(*_PALETTE, strict=True)], axis=-1)
    colours[np.isnan(positions)] = _NOTHING
    rounded: Pixels = np.round(colours).astype(np.uint8)
    return rounded


def _shortened(name: str) -> str:
    """The end of a long name tells layers apart better than its beginning."""
    name = shown(name)
    return name if len(name) <= _NAME_CHARACTERS else "..." + name[3 - _NAME_CHARACTERS :]


def _ticks(first: int, last: int) -> range:
    """About five round numbers in ``[first, last]``."""
    rough = max(1.0, (last - first) / 5)
    magnitude = 10 ** math.floor(math.log10(rough))
    width = int(next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough))
    return range(-(-first // width) * width, last + 1, width)
