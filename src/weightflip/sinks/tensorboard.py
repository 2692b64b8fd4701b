"""Records as TensorBoard scalars, histograms and pictures, with a text panel and a layout of charts."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightflip.overview import spread
from weightflip.records import (
    ALERTS_TAG,
    CORE_VALUES,
    AlertEvent,
    FlipRecord,
    Histogram,
    RunInfo,
    Value,
    alert_lines,
    printable,
)
from weightflip.sinks.background import BackgroundSink, warn
from weightflip.sinks.chosen import ChosenLayers, LayerValues
from weightflip.sinks.files import check_writable, warn_of_deletion
from weightflip.sinks.layout import Layout
from weightflip.sinks.pictures import Pictures
from weightflip.sinks.tags import Point, has_histograms, model_points, points, spread_points

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

_SUFFIX = ".weightflip"


class TensorBoardSink(BackgroundSink):
    """Writes the numbers of the model, the layers and the groups; x axis: optimizer steps.

    ``flips/rate``, ``flips/cumulative_rate``, ``flips/stall_ratio`` and ``flips/<value>`` for the model;
    ``<value>/<layer>``, such as ``flip_rate/<layer>``, for the layers; ``<value>_by_group/<group>`` for groups;
    ``nonfinite_weights/<layer>`` for layers that hold NaN or infinities. Of weights tracked with several quantizers,
    each has its own series, ``@<quantizer>``. Histograms, where records have them, are ``<name>/<layer>``. The model's
    numbers are there once more as ``Model/<value>``, since TensorBoard sorts tags and opens what comes first.

    Of more than 30 layers, each has its cumulative flip rate, and its other numbers only if it stands out: if its flip
    rate is far from that of the others at three points in a row. All of them together are ``spread/<value>_min``,
    ``_p25``, ``_median``, ``_p75`` and ``_max``. Histograms are those of groups, ``<name>_by_group/<group>``.

    Beside them, pictures of all layers over time, ``weightflip/flip_rate``, ``weightflip/stall_ratio`` and those of
    metric groups (``weightflip/oscillation_ratio``), drawn at the 1st, 2nd, 4th, 8th, ... record, when flushed after an
    eighth more of them, and at the end. They begin with this object's first record: a resumed run has pictures from
    where it resumed.

    Args:
        log_dir: Where a ``SummaryWriter`` is opened when the first record comes; None for its own default place.
        writer: A ``SummaryWriter`` to use instead; it is flushed but never closed here.
        layer_values: Which numbers each layer has, whatever their number: ``"all"``, or names such as
            ``("flip_rate", "stall_ratio")``; the cumulative flip rate is always there.

    Raises:
        OSError: ``log_dir`` cannot be written.
        ModuleNotFoundError: The tensorboard package is missing.
    """

    def __init__(
        self, log_dir: str | None = None, *, writer: SummaryWriter | None = None, layer_values: LayerValues = None
    ) -> None:
        if writer is None:
            check_writable(Path("runs" if log_dir is None else log_dir), f"log_dir={log_dir!r}")
            _import_summary_writer()
        self.log_dir = log_dir
        self.layer_values = layer_values
        self._owned = writer is None
        # A writer of the user's is in use in the training's thread, too, and may be closed there.
        self.writes_in_background = self._owned
        self._writer = writer
        self._process = os.getpid()
        self._purged = False
        self._file: Path | None = None
        self._has_told = False
        self._begin()

    @property
    def place(self) -> str | None:
        """Where it writes; None before SummaryWriter has chosen."""
        # What is given as a SummaryWriter may be another object that has add_scalar.
        directory = self.log_dir if self._owned else getattr(self._writer, "log_dir", None)
        return os.path.realpath(directory) if isinstance(directory, (str, os.PathLike)) else None

    def _begin(self) -> None:
        self._info = RunInfo({}, {})
        self._points = 0
        self._drawn = 0
        self._last_step = 0
        self._chosen = ChosenLayers(self.layer_values)
        self._layout = Layout()
        self._described: set[str] = set()
        self._alerts: list[AlertEvent] = []
        self._values: dict[str, Value] = {value.name: value for value in CORE_VALUES}
        self._pictures: Pictures | None = Pictures()

    def start(self, info: RunInfo, first_step: int) -> None:
        if not self._owned and self._process != os.getpid():
            # The thread that takes its queue to the file does not live here: once it is full, that would wait for ever.
            raise RuntimeError("the SummaryWriter in sinks= is that of another process; make it in this one")
        if self._writer is None:
            self._open(self._purge_step(first_step))
        assert self._writer is not None
        if not self._points:
            self._last_step = first_step
        self._values.update({value.name: value for value in info.values})
        self._info = info
        self._writer.add_text("weightflip/tracking", info.to_markdown(), first_step)

    def _open(self, purge_step: int | None = None) -> None:
        before = self._files()
        self._writer = _import_summary_writer()(self.log_dir, purge_step=purge_step, filename_suffix=_SUFFIX)
        self.log_dir = self._writer.log_dir
        # Absolute, wherever the script goes then. None is found where the place is no directory, but a bucket.
        new = [file.absolute() for file in self._files() - before]
        self._file = max(new, key=lambda file: file.stat().st_mtime_ns, default=None)

    def _files(self) -> set[Path]:
        return set() if self.log_dir is None else set(Path(self.log_dir).glob("*tfevents*" + _SUFFIX))

    def _renew(self) -> bool:
        """Go on in a new file where ours was deleted: what is written to that one reaches nobody.

        Returns:
            Whether it was so.
        """
        if self._writer is None or self._file is None or self._file.exists():
            return False
        with contextlib.suppress(OSError):
            # Its thread may have failed at the missing directory.
            self._writer.close()
        self._writer, self.log_dir = None, str(self._file.parent)
        self._layout.forget()
        self._described = set()
        self._open()
        assert self._writer is not None
        self._writer.add_text("weightflip/tracking", self._info.to_markdown(), self._last_step)
        return True

    def _tell(self) -> None:
        if not self._has_told:
            self._has_told = True
            warn_of_deletion(Path(self.log_dir or "."))

    def _purge_step(self, first_step: int) -> int | None:
        """The step from which on TensorBoard hides what the directory holds; None to hide nothing.

        A resumed run repeats the steps that the earlier one did after its checkpoint. Only once, and only where all
        files are ours: a purge hides every tag, also of a writer of the user's that counts in other units.
        """
        if self._purged or not first_step or self.log_dir is None:
            return None
        self._purged = True
        files = Path(self.log_dir).glob("*tfevents*")
        return first_step + 1 if all(file.name.endswith(_SUFFIX) for file in files) else None

    def write(self, record: FlipRecord) -> None:
        is_new = self._renew()
        assert self._writer is not None
        self._write_alerts()
        self._name(self._chosen.look(record), record)
        self._lay_out(record)
        of_all = spread_points(record) if self._chosen.are_many else ()
        for point in itertools.chain(points(record, self._chosen.has), model_points(record), of_all):
            if self._chosen.begins(point):
                self._scalar(point, record.step)
        self._points += 1
        if has_histograms(self._points):
            self._histograms_of(record)
        if self._pictures is not None:
            self._pictures.add(record, self._last_step, self._values.values())
        self._last_step = record.step
        if self._points & (self._points - 1) == 0:
            self._draw()
        if is_new:
            # After the record: a warning may be an error.
            self._tell()

    def alert(self, event: AlertEvent) -> None:
        """The message, in the text panel: with the next record, since TensorBoard shows one text a step."""
        self._alerts.append(event)

    def _write_alerts(self) -> None:
        assert self._writer is not None
        for step, events in itertools.groupby(self._alerts, lambda event: event.step):
            self._writer.add_text(ALERTS_TAG, "\n".join(f"- {line}" for line in alert_lines(events)), step)
        self._alerts = []

    def flush(self) -> None:
        if self._writer is not None:
            is_new = self._renew()
            self._write_alerts()
            # Not for each point of a script that flushes after each.
            if self._points >= self._drawn * 9 / 8:
                self._draw()
            self._writer.flush()
            if is_new:
                self._tell()

    def close(self) -> None:
        if self._writer is None:
            return
        is_new = self._renew()
        self._write_alerts()
        self._draw()
        if self._owned:
            self._writer.close()
            self._writer = None
        else:
            self._writer.flush()
        if is_new:
            self._tell()

    def _name(self, outliers: list[str], record: FlipRecord) -> None:
        """Layers that stand out from now on, in the text panel."""
        if not outliers:
            return
        assert self._writer is not None
        rates = {layer.name: layer.flip_rate for layer in record.layers}
        lines = [f"- `{printable(name)}`: flip rate {rates[name]:.3g}" for name in outliers]
        usual = spread(rate for rate in rates.values() if math.isfinite(rate))
        assert usual is not None
        lines.append(f"- the median of all layers: {usual.median:.3g}")
        self._writer.add_text("weightflip/layers_that_stand_out", "\n".join(lines), record.step)

    def _lay_out(self, record: FlipRecord) -> None:
        """The charts, where there are others than before. TensorBoard shows the last layout of a run."""
        if not self._owned:
            # TensorBoard shows one layout a run: in a user's writer it would stand in the way of the user's own.
            return
        assert self._writer is not None
        layout = self._layout.news(record, self._values.values(), self._chosen)
        if layout is not None:
            self._writer.add_custom_scalars(layout)

    def _scalar(self, point: Point, step: int) -> None:
        assert self._writer is not None
        if not self._owned or point.tag in self._described:
            # What is given as a SummaryWriter may have no more than add_scalar.
            self._writer.add_scalar(point.tag, point.number, step)
            return
        self._described.add(point.tag)
        assert self._writer.file_writer is not None
        value = self._values.get(point.value)
        description = printable(f"{value.description or value.title if value else point.value}: {point.whose}")
        self._writer.file_writer.add_summary(_described_scalar(point, description), step)

    def _histograms_of(self, record: FlipRecord) -> None:
        for layer in record.layers:
            for name, histogram in layer.histograms.items():
                if self._chosen.has(name, layer.name):
                    self._histogram(printable(f"{name}/{layer.name}"), histogram, record.step)
        for group, summed in record.group_sums.items() if self._chosen.are_many else ():
            for name, histogram in summed.histograms.items():
                self._histogram(printable(f"{name}_by_group/{group}"), histogram, record.step)

    def _histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        filled = [i for i, count in enumerate(histogram.counts) if count]
        if not filled:
            return
        assert self._writer is not None
        edges, counts = histogram.edges, histogram.counts
        middles = [(left + right) / 2 for left, right in itertools.pairwise(edges)]
        self._writer.add_histogram_raw(
            tag,
            # TensorBoard leaves out empty bins at both ends, and takes these for the borders of what remains.
            min=edges[filled[0]],
            max=edges[filled[-1] + 1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def _draw(self) -> None:
        """The pictures, if there is anything new in them."""
        if self._points == self._drawn or self._pictures is None:
            return
        assert self._writer is not None
        self._drawn = self._points
        try:
            pictures = self._pictures.draw()
        except Exception as error:
            # Not worth the loss of the scalars.
            self._pictures = None
            warn(f"weightflip: no pictures of the layers over time: {type(error).__name__}: {error}")
            return
        for name, picture in pictures.items():
            self._writer.add_image(f"weightflip/{name}", picture, self._last_step, dataformats="HWC")

    def __getstate__(self) -> dict[str, Any]:
        # A SummaryWriter cannot be copied or pickled: a copy opens its own, in the same place, if it ever writes.
        log_dir = self.log_dir if self._writer is None else self._writer.log_dir
        return {"log_dir": log_dir, "layer_values": self.layer_values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.log_dir, self.layer_values = state["log_dir"], state["layer_values"]
        self._owned, self._writer, self._purged = True, None, True
        self._process = os.getpid()
        self._file, self._has_told = None, False
        self._begin()


def _described_scalar(point: Point, description: str) -> Summary:
    """What ``add_scalar`` writes, with a description, which TensorBoard takes from the first point of a tag."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    about = SummaryMetadata(summary_description=description, plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=point.tag, simple_value=point.number, metadata=about)])


def _import_summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "writing to TensorBoard needs the tensorboard package: pip install tensorboard, or give other sinks="
        ) from error
    return SummaryWriter
