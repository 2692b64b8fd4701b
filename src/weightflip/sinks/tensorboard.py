"""Records as TensorBoard scalars, histograms and images, with text panels and a chart layout."""

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
from weightflip.sinks.files import check_writable, warn_of_deletion
from weightflip.sinks.layout import Layout
from weightflip.sinks.pictures import Pictures
from weightflip.sinks.tag_selection import LayerValues, TagSelection
from weightflip.sinks.tags import Point, is_histogram_point, model_points, points, spread_points

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

_SUFFIX = ".weightflip"


class TensorBoardSink(BackgroundSink):
    """Writes the numbers of the model, the layers and the layer groups. The x axis is optimizer steps.

    Tags are ``flips/rate``, ``flips/cumulative_rate``, ``flips/stall_ratio`` and ``flips/<value>`` for the model;
    ``<value>/<layer>``, such as ``flip_rate/<layer>``, for the layers; ``<value>_by_group/<group>`` for layer groups;
    ``nonfinite_weights/<layer>`` for layers with NaN or infinite weights. Weights tracked with several quantizers have
    one series per quantizer, ``@<quantizer>``. Histograms, if records contain them, are ``<name>/<layer>``. The numbers
    of the model are repeated as ``Model/<value>``, since TensorBoard sorts by tag and opens the first section.

    With more than 30 layers, each layer has its cumulative flip rate, and its other numbers only if its flip rate is
    far from that of the other layers at three consecutive points. The spread over all layers is
    ``spread/<value>_min``, ``_p25``, ``_median``, ``_p75`` and ``_max``. Histograms are those of layer groups,
    ``<name>_by_group/<group>``.

    There are also images of all layers over time: ``weightflip/flip_rate``, ``weightflip/stall_ratio`` and those of
    metric groups (``weightflip/oscillation_ratio``). They are drawn at records 1, 2, 4, 8, ..., on flush if there are
    an eighth more records, and at the end. They start with this object's first record, so a resumed run has images from
    where it resumed.

    Args:
        log_dir: Directory of the ``SummaryWriter``, which is opened at the first record. None for its default.
        writer: A ``SummaryWriter`` to use instead. It is flushed but never closed here.
        layer_values: Numbers written per layer, for any number of layers: ``"all"``, or names such as
            ``("flip_rate", "stall_ratio")``. The cumulative flip rate is always included.

    Raises:
        OSError: ``log_dir`` is not writable.
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
        self._owns_writer = writer is None
        # The training thread also uses a user's writer, and may close it.
        self.writes_in_background = self._owns_writer
        self._writer = writer
        self._process = os.getpid()
        self._has_purged = False
        self._file: Path | None = None
        self._has_warned = False
        self._reset()

    @property
    def destination(self) -> str | None:
        """The resolved directory; None until SummaryWriter has chosen its default."""
        # A user's writer may be any object with add_scalar.
        directory = self.log_dir if self._owns_writer else getattr(self._writer, "log_dir", None)
        return os.path.realpath(directory) if isinstance(directory, (str, os.PathLike)) else None

    def _reset(self) -> None:
        self._info = RunInfo({}, {})
        self._points = 0
        self._drawn_points = 0
        self._last_step = 0
        self._selection = TagSelection(self.layer_values)
        self._layout = Layout()
        self._described_tags: set[str] = set()
        self._alerts: list[AlertEvent] = []
        self._values: dict[str, Value] = {value.name: value for value in CORE_VALUES}
        self._pictures: Pictures | None = Pictures()

    def start(self, info: RunInfo, first_step: int) -> None:
        if not self._owns_writer and self._process != os.getpid():
            # The writer's thread does not exist in this process. Once its queue is full, writing would block forever.
            raise RuntimeError("the SummaryWriter in sinks= belongs to another process; create it in this process")
        if self._writer is None:
            self._open_writer(self._purge_step(first_step))
        assert self._writer is not None
        if not self._points:
            self._last_step = first_step
        self._values.update({value.name: value for value in info.values})
        self._info = info
        self._writer.add_text("weightflip/tracking", info.to_markdown(), first_step)

    def _open_writer(self, purge_step: int | None = None) -> None:
        before = self._event_files()
        self._writer = _import_summary_writer()(self.log_dir, purge_step=purge_step, filename_suffix=_SUFFIX)
        self.log_dir = self._writer.log_dir
        # Absolute, in case the script changes the working directory. A bucket has no local file.
        new = [file.absolute() for file in self._event_files() - before]
        self._file = max(new, key=lambda file: file.stat().st_mtime_ns, default=None)

    def _event_files(self) -> set[Path]:
        return set() if self.log_dir is None else set(Path(self.log_dir).glob("*tfevents*" + _SUFFIX))

    def _reopen_if_deleted(self) -> bool:
        """Continue in a new file if ours was deleted: nobody would see output in the old file.

        Returns:
            Whether a new file was opened.
        """
        if self._writer is None or self._file is None or self._file.exists():
            return False
        with contextlib.suppress(OSError):
            # Its thread may have failed because the directory is missing.
            self._writer.close()
        self._writer, self.log_dir = None, str(self._file.parent)
        self._layout.forget()
        self._described_tags = set()
        self._open_writer()
        assert self._writer is not None
        self._writer.add_text("weightflip/tracking", self._info.to_markdown(), self._last_step)
        return True

    def _warn_of_deletion(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn_of_deletion(Path(self.log_dir or "."))

    def _purge_step(self, first_step: int) -> int | None:
        """The step from which TensorBoard hides older data in the directory; None to hide nothing.

        A resumed run repeats the steps after its checkpoint. Purge only once, and only if all files are ours: a purge
        hides every tag, including those of a user's writer with a different step unit.
        """
        if self._has_purged or not first_step or self.log_dir is None:
            return None
        self._has_purged = True
        files = Path(self.log_dir).glob("*tfevents*")
        return first_step + 1 if all(file.name.endswith(_SUFFIX) for file in files) else None

    def write(self, record: FlipRecord) -> None:
        has_reopened = self._reopen_if_deleted()
        assert self._writer is not None
        self._write_alerts()
        self._write_outliers(self._selection.update(record), record)
        self._write_layout(record)
        spreads = spread_points(record) if self._selection.has_many_layers else ()
        for point in itertools.chain(points(record, self._selection.is_tagged), model_points(record), spreads):
            if self._selection.should_write(point):
                self._write_scalar(point, record.step)
        self._points += 1
        if is_histogram_point(self._points):
            self._write_histograms(record)
        if self._pictures is not None:
            self._pictures.add(record, self._last_step, self._values.values())
        self._last_step = record.step
        if self._points & (self._points - 1) == 0:
            self._write_pictures()
        if has_reopened:
            # After the record is written, since warnings may be turned into errors.
            self._warn_of_deletion()

    def alert(self, event: AlertEvent) -> None:
        """Write the message to the text panel with the next record: TensorBoard shows one text per step."""
        self._alerts.append(event)

    def _write_alerts(self) -> None:
        assert self._writer is not None
        for step, events in itertools.groupby(self._alerts, lambda event: event.step):
            self._writer.add_text(ALERTS_TAG, "\n".join(f"- {line}" for line in alert_lines(events)), step)
        self._alerts = []

    def flush(self) -> None:
        if self._writer is not None:
            has_reopened = self._reopen_if_deleted()
            self._write_alerts()
            # A script may flush after each record.
            if self._points >= self._drawn_points * 9 / 8:
                self._write_pictures()
            self._writer.flush()
            if has_reopened:
                self._warn_of_deletion()

    def close(self) -> None:
        if self._writer is None:
            return
        has_reopened = self._reopen_if_deleted()
        self._write_alerts()
        self._write_pictures()
        if self._owns_writer:
            self._writer.close()
            self._writer = None
        else:
            self._writer.flush()
        if has_reopened:
            self._warn_of_deletion()

    def _write_outliers(self, outliers: list[str], record: FlipRecord) -> None:
        """Write new outliers to the text panel."""
        if not outliers:
            return
        assert self._writer is not None
        rates = {layer.name: layer.flip_rate for layer in record.layers}
        lines = [f"- `{printable(name)}`: flip rate {rates[name]:.3g}" for name in outliers]
        usual = spread(rate for rate in rates.values() if math.isfinite(rate))
        assert usual is not None
        lines.append(f"- the median of all layers: {usual.median:.3g}")
        self._writer.add_text("weightflip/layers_that_stand_out", "\n".join(lines), record.step)

    def _write_layout(self, record: FlipRecord) -> None:
        """Write the chart layout if it has changed. TensorBoard shows the last layout of a run."""
        if not self._owns_writer:
            # TensorBoard shows one layout per run. In a user's writer, ours would replace the user's.
            return
        assert self._writer is not None
        layout = self._layout.update(record, self._values.values(), self._selection)
        if layout is not None:
            self._writer.add_custom_scalars(layout)

    def _write_scalar(self, point: Point, step: int) -> None:
        assert self._writer is not None
        if not self._owns_writer or point.tag in self._described_tags:
            # A user's writer may only have add_scalar.
            self._writer.add_scalar(point.tag, point.number, step)
            return
        self._described_tags.add(point.tag)
        assert self._writer.file_writer is not None
        value = self._values.get(point.value)
        description = printable(f"{value.description or value.title if value else point.value}: {point.subject}")
        self._writer.file_writer.add_summary(_described_scalar(point, description), step)

    def _write_histograms(self, record: FlipRecord) -> None:
        for layer in record.layers:
            for name, histogram in layer.histograms.items():
                if self._selection.is_tagged(name, layer.name):
                    self._write_histogram(printable(f"{name}/{layer.name}"), histogram, record.step)
        for group, summed in record.group_sums.items() if self._selection.has_many_layers else ():
            for name, histogram in summed.histograms.items():
                self._write_histogram(printable(f"{name}_by_group/{group}"), histogram, record.step)

    def _write_histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        filled = [i for i, count in enumerate(histogram.counts) if count]
        if not filled:
            return
        assert self._writer is not None
        edges, counts = histogram.edges, histogram.counts
        middles = [(left + right) / 2 for left, right in itertools.pairwise(edges)]
        self._writer.add_histogram_raw(
            tag,
            # TensorBoard drops empty bins at both ends and uses these as the edges of the rest.
            min=edges[filled[0]],
            max=edges[filled[-1] + 1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def _write_pictures(self) -> None:
        """Draw and write the pictures if there are new records."""
        if self._points == self._drawn_points or self._pictures is None:
            return
        assert self._writer is not None
        self._drawn_points = self._points
        try:
            pictures = self._pictures.draw()
        except Exception as error:
            # Keep writing scalars.
            self._pictures = None
            warn(
                f"weightflip: drawing pictures failed, so the run has no more of them: {type(error).__name__}: {error}"
            )
            return
        for name, picture in pictures.items():
            self._writer.add_image(f"weightflip/{name}", picture, self._last_step, dataformats="HWC")

    def __getstate__(self) -> dict[str, Any]:
        # A SummaryWriter cannot be copied or pickled. A copy opens its own in the same directory if it ever writes.
        log_dir = self.log_dir if self._writer is None else self._writer.log_dir
        return {"log_dir": log_dir, "layer_values": self.layer_values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.log_dir, self.layer_values = state["log_dir"], state["layer_values"]
        self._owns_writer, self._writer, self._has_purged = True, None, True
        self._process = os.getpid()
        self._file, self._has_warned = None, False
        self._reset()


def _described_scalar(point: Point, description: str) -> Summary:
    """What ``add_scalar`` writes, plus a description. TensorBoard reads it from the first point of a tag."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    about = SummaryMetadata(summary_description=description, plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=point.tag, simple_value=point.number, metadata=about)])


def _import_summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "writing to TensorBoard needs the tensorboard package: pip install tensorboard, or pass other sinks="
        ) from error
    return SummaryWriter
