"""Layers x time as a picture: a history of bounded size, and its drawing."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from weightflip.overview import MANY_LAYERS, blocks_of, outliers
from weightflip.records import FlipRecord, Quotient, printable
from weightflip.sinks.colours import ABOVE, BELOW, NOTHING, Scale

if TYPE_CHECKING:
    from weightflip.sinks.colours import Pixels

_COLUMNS = 200

INK = (33, 33, 33)
FRAME = (96, 96, 96)
PAPER = (255, 255, 255)
# Of the names of layers that stand out.
_RED = (176, 0, 32)

# Large letters in a small picture: TensorBoard shows it 350 pixels wide, until one clicks on it.
_PLOT_WIDTH = 440
FONT_SIZE = 15
_NAME_CHARACTERS = 30


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
    def sums(self) -> dict[str, Quotient]:
        """Of each layer, over all that it holds."""
        found = {}
        for name, row in self.layers.items():
            columns = [column for column in self._columns if row < len(column.denominators)]
            found[name] = Quotient(
                sum(column.numerators[row] for column in columns), sum(column.denominators[row] for column in columns)
            )
        return found

    @property
    def edges(self) -> list[int]:
        """Steps at which columns begin, and the one at which the last ends."""
        return [column.first_step for column in self._columns] + [column.last_step for column in self._columns[-1:]]

    @property
    def table(self) -> list[list[float]]:
        """A row for each layer, a column for each span of time; NaN where nothing was counted."""
        return [[column.value(row) for column in self._columns] for row in self.layers.values()]


def draw(history: History, title: str) -> Pixels:
    """The picture: a row for each layer with its name, time from left to right, and the colours' meaning below.

    Args:
        history: At least one record of one layer.
        title: What the colours stand for.

    Returns:
        RGB, uint8, of shape (height, width, 3).
    """
    return _Drawing(history).picture(title)


class _Label(NamedTuple):
    """What is written beside some rows."""

    first: int
    last: int
    text: str
    stands_out: bool = False


class _Rows:
    """In which order the layers are shown, and what is written beside them.

    Each has its name, if there is room; of more than 30 layers, blocks have, and those layers that stand out.
    """

    def __init__(self, history: History) -> None:
        names = list(history.layers)
        self.order = list(range(len(names)))
        self.labels = [_Label(row, row, name) for row, name in enumerate(names)]
        blocks = blocks_of(names) if len(names) > MANY_LAYERS else {}
        if not blocks:
            return
        # Parameter groups may have torn them apart.
        by_block = [name for members in blocks.values() for name in members]
        self.order = [history.layers[name] for name in by_block]
        rows = {name: row for row, name in enumerate(by_block)}
        self.labels = [_Label(rows[name], rows[name], name, True) for name in outliers(history.sums)]
        self.labels += [_Label(rows[of[0]], rows[of[-1]], block) for block, of in blocks.items() if len(of) > 1]
        self.labels += [_Label(rows[of[0]], rows[of[0]], of[0]) for of in blocks.values() if len(of) == 1]

    def places(self, row_height: float) -> list[tuple[float, _Label]]:
        """Those for which there is room, each at its height in the plot; the first ones first."""
        found: list[tuple[float, _Label]] = []
        for label in self.labels:
            at = (label.first + label.last + 1) / 2 * row_height
            if all(abs(at - other) >= FONT_SIZE + 1 for other, _ in found):
                found.append((at, label))
        return found


class _Drawing:
    """Where the parts of a picture are, and how each is painted."""

    def __init__(self, history: History) -> None:
        import numpy as np
        from PIL import Image, ImageDraw, ImageFont

        rows = _Rows(history)
        self._table = np.array(history.table)[rows.order]
        count, columns = self._table.shape
        self._scale = Scale.of(self._table)
        self._edges = history.edges
        self._font = ImageFont.load_default(FONT_SIZE)
        self._row_height = max(3, min(30, 720 // count))
        self._labels = rows.places(self._row_height)
        self._left = 20 + math.ceil(max(self._font.getlength(shortened(label.text)) for _, label in self._labels))
        self._top = 38
        self._right, self._bottom = self._left + _PLOT_WIDTH, self._top + count * self._row_height
        # The colours' bar stands below, where there is room for it however few the layers are.
        self._bar_top = self._bottom + 62
        self._outside = self._outside_of_scale()
        self._borders = np.round(np.linspace(0, _PLOT_WIDTH, columns + 1)).astype(int)
        height = self._bar_top + 44 + 20 * len(self._outside)
        self._image = Image.new("RGB", (self._right + 40, height), PAPER)
        self._paint = ImageDraw.Draw(self._image)

    def picture(self, title: str) -> Pixels:
        import numpy as np

        self._text(self._left, 14, title, "lm")
        self._cells()
        self._layers()
        self._steps()
        self._legend()
        return np.asarray(self._image)

    def _text(self, x: float, y: float, words: str, anchor: str, ink: tuple[int, int, int] = INK) -> None:
        self._paint.text((x, y), words, fill=ink, font=self._font, anchor=anchor)

    def _cells(self) -> None:
        import numpy as np

        colours = self._scale.colours(self._table)
        self._paste(colours.repeat(self._row_height, axis=0).repeat(np.diff(self._borders), axis=1), self._top)
        self._paint.rectangle((self._left - 1, self._top - 1, self._right, self._bottom), outline=FRAME)

    def _paste(self, pixels: Pixels, top: int) -> None:
        from PIL import Image

        self._image.paste(Image.fromarray(pixels), (self._left, top))

    def _layers(self) -> None:
        for at, label in self._labels:
            ink = _RED if label.stands_out else INK
            self._text(self._left - 8, self._top + at, shortened(label.text), "rm", ink)
            for row in (label.first, label.last + 1) if label.last > label.first else ():
                y = self._top + row * self._row_height
                self._paint.line((self._left - 6, y, self._left - 2, y), fill=FRAME)

    def _steps(self) -> None:
        import numpy as np

        for step in _ticks(self._edges[0], self._edges[-1]):
            x = self._left + float(np.interp(step, self._edges, self._borders))
            self._paint.line((x, self._bottom, x, self._bottom + 5), fill=FRAME)
            self._text(x, self._bottom + 8, f"{step:,}", "mt")
        self._text(self._right, self._bottom + 28, "optimizer steps", "rt")

    def _outside_of_scale(self) -> list[tuple[tuple[int, int, int], str]]:
        scale, found = self._scale, []
        if scale.lowest < scale.low:
            found.append((BELOW, f"below {scale.low:.3g}, down to {scale.lowest:.3g}"))
        if scale.highest > scale.high:
            found.append((ABOVE, f"above {scale.high:.3g}, up to {scale.highest:.3g}"))
        return found

    def _legend(self) -> None:
        import numpy as np

        scale = self._scale
        is_flat = scale.low == scale.high
        width = 30 if is_flat else 200
        bar = scale.colours(np.array([[scale.at(i / (width - 1)) for i in range(width)]]).clip(scale.low, scale.high))
        self._paste(bar.repeat(14, axis=0), self._bar_top)
        for position in (0.5,) if is_flat else (0.0, 0.5, 1.0):
            self._text(self._left + position * width, self._bar_top + 20, f"{scale.at(position):.3g}", "mt")
        if scale.is_logarithmic:
            self._text(self._left, self._bottom + 28, "logarithmic, 0 as the lowest:", "lt")
        for line, (colour, words) in enumerate(self._outside):
            top = self._bar_top + 44 + 20 * line
            self._paint.rectangle((self._left, top, self._left + 13, top + 13), fill=colour)
            self._text(self._left + 20, top + 7, words, "lm")
        if np.isnan(self._table).any():
            right, top = self._right, self._bar_top
            self._paint.rectangle((right - 130, top, right - 117, top + 13), fill=NOTHING)
            self._text(right, top + 7, "nothing counted", "rm")


def shortened(name: str) -> str:
    """The end of a long name tells layers apart better than its beginning."""
    name = printable(name)
    return name if len(name) <= _NAME_CHARACTERS else "..." + name[3 - _NAME_CHARACTERS :]


def _ticks(first: int, last: int) -> range:
    """About five round numbers in ``[first, last]``."""
    rough = max(1.0, (last - first) / 5)
    magnitude = 10 ** math.floor(math.log10(rough))
    width = int(next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough))
    return range(-(-first // width) * width, last + 1, width)
