"""Records as TensorBoard scalars, with a text panel and a layout of charts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightflip.records import FlipRecord, RunInfo
from weightflip.sinks.files import check_writable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Of the model, then of each layer, in the order in which they are written.
_MODEL_TAGS = ("flips/rate", "flips/cumulative_rate", "flips/stall_ratio")
_LAYER_TAGS = ("flip_rate", "cumulative_flip_rate", "stall_ratio")
_SUFFIX = ".weightflip"
_LAYOUT = {
    "weightflip": {
        "share of weights that flip in a step, by layer": ["Multiline", [r"^flip_rate/.*"]],
        "share of updates swallowed by rounding, by layer": ["Multiline", [r"^stall_ratio/.*"]],
        "flips since the start / weights, by layer": ["Multiline", [r"^cumulative_flip_rate/.*"]],
        "model": ["Multiline", [r"^flips/rate", r"^flips/stall_ratio"]],
    }
}


class TensorBoardSink:
    """Writes a few scalars for the model and for each layer; x axis: optimizer steps.

    ``flips/rate``, ``flips/cumulative_rate`` and ``flips/stall_ratio`` for the model; ``flip_rate/<layer>``,
    ``cumulative_flip_rate/<layer>`` and ``stall_ratio/<layer>`` for the layers; ``scale_changes/<layer>`` for layers
    with block or group scales; ``nonfinite_weights/<layer>`` for layers that hold NaN or infinities. Of weights tracked
    with several quantizers, each has its own series, ``@<quantizer>``.

    Args:
        log_dir: Where a ``SummaryWriter`` is opened when the first record comes; None for its own default place.
        writer: A ``SummaryWriter`` to use instead; it is flushed but never closed here.

    Raises:
        OSError: ``log_dir`` cannot be written.
        ModuleNotFoundError: The tensorboard package is missing.
    """

    def __init__(self, log_dir: str | None = None, *, writer: SummaryWriter | None = None) -> None:
        if writer is None:
            check_writable(Path("runs" if log_dir is None else log_dir), f"log_dir={log_dir!r}")
            _import_summary_writer()
        self.log_dir = log_dir
        self._owned = writer is None
        self._writer = writer
        self._purged = False

    def start(self, info: RunInfo, first_step: int) -> None:
        if self._writer is None:
            self._writer = _import_summary_writer()(
                self.log_dir, purge_step=self._purge_step(first_step), filename_suffix=_SUFFIX
            )
            self.log_dir = self._writer.log_dir
        self._writer.add_text("weightflip/tracking", info.to_markdown(), first_step)
        if self._owned:
            # TensorBoard shows one layout a run: in a user's writer it would stand in the way of the user's own.
            self._writer.add_custom_scalars(_LAYOUT)

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
        for quantizer, model in record.models.items():
            tags = tuple(f"{tag}@{quantizer}" if quantizer else tag for tag in _MODEL_TAGS)
            self._scalars(tags, (model.flip_rate, model.cumulative_flip_rate, model.stall_ratio), record.step)
        for layer in record.layers:
            if not layer.window.weight_steps:
                continue
            tags = tuple(f"{tag}/{layer.name}" for tag in _LAYER_TAGS)
            self._scalars(tags, (layer.flip_rate, layer.cumulative_flip_rate, layer.stall_ratio), record.step)
            self._scalars((f"scale_changes/{layer.name}",), (layer.scale_change_rate,), record.step)
            if layer.nonfinite:
                self._scalars((f"nonfinite_weights/{layer.name}",), (layer.nonfinite,), record.step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is None:
            return
        if self._owned:
            self._writer.close()
            self._writer = None
        else:
            self._writer.flush()

    def _scalars(self, tags: tuple[str, ...], values: tuple[float, ...], step: int) -> None:
        assert self._writer is not None
        for tag, value in zip(tags, values, strict=True):
            if not math.isnan(value):
                self._writer.add_scalar(tag, value, step)

    def __getstate__(self) -> dict[str, Any]:
        # A SummaryWriter cannot be copied or pickled: a copy opens its own, in the same place, if it ever writes.
        log_dir = self.log_dir if self._writer is None else self._writer.log_dir
        return {"log_dir": log_dir, "_owned": True, "_writer": None, "_purged": True}


def _import_summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "writing to TensorBoard needs the tensorboard package: pip install tensorboard, or give other sinks="
        ) from error
    return SummaryWriter
