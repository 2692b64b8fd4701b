"""Records as metrics of a Weights & Biases run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from weightflip.records import AlertEvent, FlipRecord, RunInfo, printable
from weightflip.sinks.tags import has_histograms, tagged_values

_STEP = "weightflip/step"


class WandbSink:
    """Logs the numbers to a run of Weights & Biases, under the names that TensorBoard has them.

    Their x axis is a metric of their own, ``weightflip/step``, the number of optimizer steps. wandb's own step stays
    yours: the numbers are added to the row that is open, without a step, and go with it when you log the next one. Only
    where you have logged nothing since the last record, that row is closed, so that none is lost; this moves wandb's
    step by 1. Where you give ``log`` a ``step=`` of yours, let it grow at least as fast as the records come (count
    optimizer steps, not epochs): wandb drops what comes at a step that is over.

    Args:
        run: The run, from ``wandb.init``; it is never finished here. None to begin one with the first record, and
            finish it at the end.
        **init: For ``wandb.init``, where ``run`` is None: ``project``, ``name``, ``config``, ...

    Raises:
        ModuleNotFoundError: ``run`` is None and the wandb package is missing.
        TypeError: Both ``run`` and arguments of ``wandb.init``.
    """

    def __init__(self, run: Any = None, **init: Any) -> None:
        if run is not None and init:
            raise TypeError(f"WandbSink takes a run or arguments of wandb.init, got a run and {sorted(init)}")
        if run is None and find_spec("wandb") is None:
            raise ModuleNotFoundError("WandbSink needs the wandb package: pip install wandb, or give other sinks=")
        self._run = run
        self._init = init
        self._owned = run is None
        self._begin()

    def _begin(self) -> None:
        self._points = 0
        self._open_row: int | None = None
        self._sections: set[str] = set()

    def start(self, info: RunInfo, first_step: int) -> None:
        if self._run is None:
            import wandb

            self._run = wandb.init(**self._init)
            # After close(), and in a copy from another process, the same run goes on.
            self._init = {**self._init, "id": self._run.id, "resume": "allow"}
        if not self._sections:
            self._run.define_metric(_STEP, hidden=True)
        tracked = {printable(name): quantizer for name, (_, _, quantizer) in info.tracked.items()}
        skipped = {printable(name): reason for name, reason in info.skipped.items()}
        self._run.config.update(
            {"weightflip": {**info.settings, "tracked": tracked, "skipped": skipped}}, allow_val_change=True
        )

    def write(self, record: FlipRecord) -> None:
        numbers: dict[str, Any] = dict(tagged_values(record))
        self._points += 1
        if has_histograms(self._points):
            numbers.update(_histograms(record))
        for section in dict.fromkeys(tag.split("/")[0] for tag in numbers):
            if section not in self._sections:
                self._sections.add(section)
                self._run.define_metric(f"{section}/*", step_metric=_STEP)
        if self._open_row == self._run.step:
            self._commit()
        self._open_row = self._run.step
        self._run.log({**numbers, _STEP: record.step}, commit=False)

    def alert(self, event: AlertEvent) -> None:
        """As wandb's own alert: in the app, and by mail or Slack if you have told wandb so."""
        self._run.alert(title=event.rule, text=event.message)

    def flush(self) -> None:
        if self._owned and self._run is not None:
            self._commit()

    def close(self) -> None:
        if self._owned and self._run is not None:
            self._commit()
            self._run.finish()
            self._run = None
            self._begin()

    def _commit(self) -> None:
        """Close the open row, if numbers of ours are in it."""
        if self._open_row == self._run.step:
            self._run.log({}, commit=True)
        self._open_row = None

    def __deepcopy__(self, memo: dict[int, Any]) -> WandbSink:
        twin = WandbSink.__new__(WandbSink)
        twin.__dict__.update(self.__dict__, _sections=set(self._sections), _init=dict(self._init))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # A run does not pickle: elsewhere, the same one is resumed.
        init = self._init
        if not self._owned:
            init = {"entity": self._run.entity, "project": self._run.project, "id": self._run.id, "resume": "allow"}
        return {"_init": init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._init, self._run, self._owned = state["_init"], None, True
        self._begin()


def _histograms(record: FlipRecord) -> dict[str, Any]:
    found = {
        printable(f"{name}/{layer.name}"): histogram
        for layer in record.layers
        for name, histogram in layer.histograms.items()
    }
    if not found:
        return {}
    import wandb

    return {
        tag: wandb.Histogram(np_histogram=(list(histogram.counts), list(histogram.edges)))
        for tag, histogram in found.items()
    }
