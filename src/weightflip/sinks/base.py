"""What a sink is, and how one is found for what a user passes."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Protocol, TypeAlias, runtime_checkable

from weightflip import checks
from weightflip.records import FlipRecord, RunInfo
from weightflip.sinks.chosen import LayerValues


@runtime_checkable
class Sink(Protocol):
    """Takes records as they come. May raise: the error is warned about once, and the sink gets no more of them.

    A sink that also has a method ``alert(event)`` gets each :class:`~weightflip.AlertEvent`, after its record.
    """

    def start(self, info: RunInfo, first_step: int) -> None:
        """Called before the first record, and again when what is tracked changes.

        Args:
            info: What is tracked and how.
            first_step: The step number after which records come; not 0 in a resumed run.
        """
        ...

    def write(self, record: FlipRecord) -> None:
        """Take one record."""
        ...

    def flush(self) -> None:
        """Have everything on disk."""
        ...

    def close(self) -> None:
        """Flush and let go; a later ``start`` opens again."""
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
            return {"function": _nowhere}
        return self.__dict__

    def start(self, info: RunInfo, first_step: int) -> None:
        """Nothing to open."""

    def write(self, record: FlipRecord) -> None:
        self.function(record)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing to close."""


def _nowhere(record: FlipRecord) -> None:
    """Stands in for a function that could not be pickled."""


def make_sink(spec: SinkLike, layer_values: LayerValues = None) -> Sink:
    """The sink for one element of ``sinks=``.

    Args:
        spec: A ``Sink``, a ``SummaryWriter``, a ``wandb`` run, a path that ends in ``.jsonl`` or ``.csv``, or a
            function of a ``FlipRecord``.
        layer_values: As in :class:`TensorBoardSink`.

    Raises:
        TypeError: Nothing of the above.
        ValueError: A path with another ending, or to a ``.csv`` file with other columns.
        OSError: A path that cannot be written.
    """
    from weightflip.sinks.csv import CSVSink
    from weightflip.sinks.jsonl import JSONLSink
    from weightflip.sinks.tensorboard import TensorBoardSink
    from weightflip.sinks.wandb import WandbSink

    if isinstance(spec, (str, PathLike)):
        path = checks.path("a path in sinks=", spec)
        if path.endswith(".jsonl"):
            return JSONLSink(path)
        if path.endswith(".csv"):
            return CSVSink(path)
        raise ValueError(
            f"a path in sinks= ends in .jsonl or .csv, got {path!r}; for a TensorBoard directory use log_dir="
        )
    if isinstance(spec, type):
        raise TypeError(f"sinks= takes instances, got the class {spec.__name__}; call it")
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
        "sinks= takes SummaryWriters, wandb runs, paths that end in .jsonl or .csv, functions of a FlipRecord, or "
        f"objects with start, write, flush and close; got {type(spec).__name__}"
    )


def make_sinks(specs: Sequence[SinkLike], layer_values: LayerValues = None) -> list[Sink]:
    """The sinks for ``sinks=``.

    Raises:
        TypeError: As :func:`make_sink`.
        ValueError: As :func:`make_sink`; or one is there twice.
        OSError: As :func:`make_sink`.
    """
    sinks: list[Sink] = []
    seen: set[object] = set()
    for spec in specs:
        sink = make_sink(spec, layer_values)
        keys = {id(spec), getattr(sink, "place", None)} - {None}
        if seen & keys:
            shown = repr(str(spec)) if isinstance(spec, (str, PathLike)) else checks.describe(spec)
            raise ValueError(f"{shown} is twice in sinks=, and every point would be written twice; leave one out")
        seen |= keys
        sinks.append(sink)
    return sinks
