"""Heat map of layers over time: a history of bounded size, and its drawing."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from weightflip.overview import MANY_LAYERS, blocks_of, outliers
from weightflip.records import FlipRecord, Quotient, printable
from weightflip.sinks.colors import ABOVE, BELOW, NO_DATA, ColorScale

if TYPE_CHECKING:
    from weightflip.sinks.colors import Pixels

_COLUMNS = 200

INK = (33, 33, 33)
FRAME = (96, 96, 96)
PAPER = (255, 255, 255)
# Names of outliers.
_RED = (176, 0, 32)

# Large text in a small picture: TensorBoard shows it 350 pixels wide until it is clicked.
_PLOT_WIDTH = 440
FONT_SIZE = 15
_NAME_CHARACTERS = 30


@dataclass
class _Column:
    """Sums of numerators and denominators over adjacent records, one entry per layer."""

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
        """The ratio of a layer; NaN if nothing was counted."""
        known = row < len(self.denominators) and self.denominators[row]
        return self.numerators[row] / self.denominators[row] if known else math.nan


class LayerHistory:
    """History of one windowed value of each layer, in at most 200 columns.

    When the columns are full, adjacent ones are summed in pairs, and from then on each column holds twice as many
    records. Counts are summed before they are divided. Memory: 16 bytes per layer and column.

    Args:
        value: Name of the value, as in ``LayerRecord.quotients``.

    Attributes:
        layers: Row of each layer, by name, in order of first appearance.
    """

    def __init__(self, value: str) -> None:
        self.value = value
        self.layers: dict[str, int] = {}
        self._columns: list[_Column] = []
        self._span = 1

    def __bool__(self) -> bool:
        return any(any(column.denominators) for column in self._columns)

    def add(self, record: FlipRecord, since: int) -> None:
        """Add a record that covers the steps after ``since``."""
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
        """Sum of each layer over the whole history, by name."""
        totals = {}
        for name, row in self.layers.items():
            columns = [column for column in self._columns if row < len(column.denominators)]
            totals[name] = Quotient(
                sum(column.numerators[row] for column in columns), sum(column.denominators[row] for column in columns)
            )
        return totals

    @property
    def edges(self) -> list[int]:
        """First step of each column, and the last step of the last column."""
        return [column.first_step for column in self._columns] + [column.last_step for column in self._columns[-1:]]

    @property
    def table(self) -> list[list[float]]:
        """One row per layer, one column per span of steps; NaN if nothing was counted."""
        return [[column.value(row) for column in self._columns] for row in self.layers.values()]


def draw(history: LayerHistory, title: str) -> Pixels:
    """Draw the heat map: one labeled row per layer, time from left to right, color legend below.

    Args:
        history: At least one record of one layer.
        title: Meaning of the colors.

    Returns:
        RGB, uint8, of shape (height, width, 3).
    """
    return _Drawing(history).render(title)


class _Label(NamedTuple):
    """A label next to a range of rows."""

    first: int
    last: int
    text: str
    stands_out: bool = False


class _RowLabels:
    """The order of the rows and their labels.

    Each layer is labeled if there is space. With more than 30 layers, model blocks and outliers are labeled.
    """

    def __init__(self, history: LayerHistory) -> None:
        names = list(history.layers)
        self.order = list(range(len(names)))
        self.labels = [_Label(row, row, name) for row, name in enumerate(names)]
        blocks = blocks_of(names) if len(names) > MANY_LAYERS else {}
        if not blocks:
            return
        # Param groups may have separated the layers of a block.
        by_block = [name for members in blocks.values() for name in members]
        self.order = [history.layers[name] for name in by_block]
        rows = {name: row for row, name in enumerate(by_block)}
        self.labels = [_Label(rows[name], rows[name], name, True) for name in outliers(history.sums)]
        for block, members in blocks.items():
            text = block if len(members) > 1 else members[0]
            self.labels.append(_Label(rows[members[0]], rows[members[-1]], text))

    def position(self, row_height: float) -> list[tuple[float, _Label]]:
        """The labels that fit, with their vertical positions in the plot. Earlier labels take precedence."""
        placed: list[tuple[float, _Label]] = []
        for label in self.labels:
            y = (label.first + label.last + 1) / 2 * row_height
            if all(abs(y - other) >= FONT_SIZE + 1 for other, _ in placed):
                placed.append((y, label))
        return placed


class _Drawing:
    """Layout of the picture and drawing of its parts."""

    def __init__(self, history: LayerHistory) -> None:
        import numpy as np
        from PIL import Image, ImageDraw, ImageFont

        rows = _RowLabels(history)
        self._table = np.array(history.table)[rows.order]
        count, columns = self._table.shape
        self._scale = ColorScale.fit(self._table)
        self._edges = history.edges
        self._font = ImageFont.load_default(FONT_SIZE)
        self._row_height = max(3, min(30, 720 // count))
        self._labels = rows.position(self._row_height)
        self._left = 20 + math.ceil(max(self._font.getlength(shortened(label.text)) for _, label in self._labels))
        self._top = 38
        self._right, self._bottom = self._left + _PLOT_WIDTH, self._top + count * self._row_height
        # The color bar goes below the plot, where it fits for any number of layers.
        self._bar_top = self._bottom + 62
        self._legend_extras = self._legend_entries()
        self._column_edges = np.round(np.linspace(0, _PLOT_WIDTH, columns + 1)).astype(int)
        height = self._bar_top + 44 + 20 * len(self._legend_extras)
        self._image = Image.new("RGB", (self._right + 40, height), PAPER)
        self._canvas = ImageDraw.Draw(self._image)

    def render(self, title: str) -> Pixels:
        import numpy as np

        self._draw_text(self._left, 14, title, "lm")
        self._draw_cells()
        self._draw_labels()
        self._draw_step_axis()
        self._draw_legend()
        return np.asarray(self._image)

    def _draw_text(self, x: float, y: float, words: str, anchor: str, ink: tuple[int, int, int] = INK) -> None:
        self._canvas.text((x, y), words, fill=ink, font=self._font, anchor=anchor)

    def _draw_cells(self) -> None:
        import numpy as np

        colors = self._scale.colors(self._table)
        self._paste(colors.repeat(self._row_height, axis=0).repeat(np.diff(self._column_edges), axis=1), self._top)
        self._canvas.rectangle((self._left - 1, self._top - 1, self._right, self._bottom), outline=FRAME)

    def _paste(self, pixels: Pixels, top: int) -> None:
        from PIL import Image

        self._image.paste(Image.fromarray(pixels), (self._left, top))

    def _draw_labels(self) -> None:
        for at, label in self._labels:
            ink = _RED if label.stands_out else INK
            self._draw_text(self._left - 8, self._top + at, shortened(label.text), "rm", ink)
            for row in (label.first, label.last + 1) if label.last > label.first else ():
                y = self._top + row * self._row_height
                self._canvas.line((self._left - 6, y, self._left - 2, y), fill=FRAME)

    def _draw_step_axis(self) -> None:
        import numpy as np

        for step in _ticks(self._edges[0], self._edges[-1]):
            x = self._left + float(np.interp(step, self._edges, self._column_edges))
            self._canvas.line((x, self._bottom, x, self._bottom + 5), fill=FRAME)
            self._draw_text(x, self._bottom + 8, f"{step:,}", "mt")
        self._draw_text(self._right, self._bottom + 28, "optimizer steps", "rt")

    def _legend_entries(self) -> list[tuple[tuple[int, int, int], str]]:
        scale, entries = self._scale, []
        if scale.lowest < scale.low:
            entries.append((BELOW, f"below {scale.low:.3g}, down to {scale.lowest:.3g}"))
        if scale.highest > scale.high:
            entries.append((ABOVE, f"above {scale.high:.3g}, up to {scale.highest:.3g}"))
        return entries

    def _draw_legend(self) -> None:
        import numpy as np

        scale = self._scale
        is_flat = scale.low == scale.high
        width = 30 if is_flat else 200
        bar = scale.colors(np.array([[scale.at(i / (width - 1)) for i in range(width)]]).clip(scale.low, scale.high))
        self._paste(bar.repeat(14, axis=0), self._bar_top)
        for position in (0.5,) if is_flat else (0.0, 0.5, 1.0):
            self._draw_text(self._left + position * width, self._bar_top + 20, f"{scale.at(position):.3g}", "mt")
        if scale.is_logarithmic:
            self._draw_text(self._left, self._bottom + 28, "logarithmic, 0 as lowest:", "lt")
        for line, (color, words) in enumerate(self._legend_extras):
            top = self._bar_top + 44 + 20 * line
            self._canvas.rectangle((self._left, top, self._left + 13, top + 13), fill=color)
            self._draw_text(self._left + 20, top + 7, words, "lm")
        if np.isnan(self._table).any():
            right, top = self._right, self._bar_top
            self._canvas.rectangle((right - 130, top, right - 117, top + 13), fill=NO_DATA)
            self._draw_text(right, top + 7, "nothing counted", "rm")


def shortened(name: str) -> str:
    """A long name without its beginning: the end distinguishes layers better."""
    name = printable(name)
    return name if len(name) <= _NAME_CHARACTERS else "..." + name[3 - _NAME_CHARACTERS :]


def _ticks(first: int, last: int) -> range:
    """About five round numbers in ``[first, last]``."""
    rough = max(1.0, (last - first) / 5)
    magnitude = 10 ** math.floor(math.log10(rough))
    width = int(next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough))
    return range(-(-first // width) * width, last + 1, width)
