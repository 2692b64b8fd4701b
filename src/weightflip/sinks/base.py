"""The sink protocol, and the conversion of ``sinks=`` arguments to sinks."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Protocol, TypeAlias, runtime_checkable

from weightflip import checks
from weightflip.records import FlipRecord, RunInfo
from weightflip.sinks.csv import CSVSink
from weightflip.sinks.jsonl import JSONLSink
from weightflip.sinks.tag_selection import LayerValues
from weightflip.sinks.tensorboard import TensorBoardSink
from weightflip.sinks.wandb import WandbSink


@runtime_checkable
class Sink(Protocol):
    """Receives records. If a method raises, there is one warning, and the sink gets no more records.

    A sink with a method ``alert(event)`` also gets each :class:`~weightflip.AlertEvent`, after its record.
    """

    def start(self, info: RunInfo, first_step: int) -> None:
        """Called before the first record, and again when ``info`` changes.

        Args:
            info: What is tracked and how.
            first_step: Step after which records start. Not 0 in a resumed run.
        """
        ...

    def write(self, record: FlipRecord) -> None:
        """Write one record."""
        ...

    def flush(self) -> None:
        """Write buffered output to disk."""
        ...

    def close(self) -> None:
        """Flush and release resources. A later ``start`` opens them again."""
        ...


SinkLike: TypeAlias = "Sink | str | PathLike[str] | Callable[[FlipRecord], object] | Any"


class CallableSink:
    """Calls a function with each record."""

    def __init__(self, function: Callable[[FlipRecord], object]) -> None:
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> CallableSink:
        return CallableSink(self.function)

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self.function)
        except Exception as error:
            warnings.warn(f"weightflip: a function in sinks= is not pickled with the optimizer: {error}", stacklevel=2)
            return {"function": _discard}
        return self.__dict__

    def start(self, info: RunInfo, first_step: int) -> None:
        """Nothing to open."""

    def write(self, record: FlipRecord) -> None:
        self.function(record)

    def flush(self) -> None:
        """Nothing to flush."""

    def close(self) -> None:
        """Nothing to close."""


def _discard(record: FlipRecord) -> None:
    """Replaces a function that could not be pickled."""


FILE_SINKS: dict[str, Callable[[str], Sink]] = {".jsonl": JSONLSink, ".csv": CSVSink}
"""The sink for a path in ``sinks=``, by the ending of the path."""


def make_sink(spec: SinkLike, layer_values: LayerValues = None) -> Sink:
    """Create the sink for one element of ``sinks=``.

    Args:
        spec: A ``Sink``, a ``SummaryWriter``, a ``wandb`` run, a path with an ending in :data:`FILE_SINKS`, or a
            function of a ``FlipRecord``.
        layer_values: As in :class:`TensorBoardSink`.

    Raises:
        TypeError: None of the above.
        ValueError: A path with another ending, or a file that the sink rejects.
        OSError: The path is not writable.
    """
    endings = " or ".join(FILE_SINKS)
    if isinstance(spec, (str, PathLike)):
        path = checks.path("a path in sinks=", spec)
        for ending, file_sink in FILE_SINKS.items():
            if path.endswith(ending):
                return file_sink(path)
        raise ValueError(
            f"a path in sinks= must end in {endings}, got {path!r}; for a TensorBoard directory use log_dir="
        )
    if isinstance(spec, type):
        raise TypeError(f"sinks= expects instances, got the class {spec.__name__}; create an instance of it")
    if isinstance(spec, Sink):
        return spec
    if hasattr(spec, "add_scalar"):
        writer: Any = spec
        return TensorBoardSink(writer=writer, layer_values=layer_values)
    if hasattr(spec, "define_metric") and hasattr(spec, "step"):
        run: Any = spec
        return WandbSink(run)
    if callable(spec):
        return CallableSink(spec)
    raise TypeError(
        f"sinks= expects SummaryWriters, wandb runs, paths that end in {endings}, functions of a FlipRecord, or "
        f"objects with start, write, flush and close; got {type(spec).__name__}"
    )


def make_sinks(specs: Sequence[SinkLike], layer_values: LayerValues = None) -> list[Sink]:
    """Create the sinks for ``sinks=``.

    Raises:
        TypeError: See :func:`make_sink`.
        ValueError: See :func:`make_sink`. Also if two sinks are the same or write to the same destination.
        OSError: See :func:`make_sink`.
    """
    sinks: list[Sink] = []
    used_keys: set[object] = set()
    for spec in specs:
        sink = make_sink(spec, layer_values)
        keys = {id(spec), getattr(sink, "destination", None)} - {None}
        if used_keys & keys:
            name = repr(str(spec)) if isinstance(spec, (str, PathLike)) else checks.describe(spec)
            raise ValueError(f"{name} is in sinks= twice, and every point would be written twice; remove one")
        used_keys |= keys
        sinks.append(sink)
    return sinks
