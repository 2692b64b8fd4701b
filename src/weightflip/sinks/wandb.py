"""Records as metrics of a Weights & Biases run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from weightflip.records import AlertEvent, FlipRecord, RunInfo, printable
from weightflip.sinks.tags import is_histogram_point, tagged_values

_STEP = "weightflip/step"


class WandbSink:
    """Logs the numbers to a Weights & Biases run, under the same names as in TensorBoard.

    Their x axis is a separate metric, ``weightflip/step``, the number of optimizer steps. wandb's own step remains
    yours: the numbers are added to the open row without a step, and are sent with your next call of ``log``. Only if
    you have logged nothing since the last record, that row is committed, so that no record is lost. This increases
    wandb's step by 1. If you pass ``step=`` to ``log``, it must grow at least as fast as the records come (count
    optimizer steps, not epochs): wandb drops data for past steps.

    Args:
        run: A run from ``wandb.init``, which is not finished here. None starts a run at the first record and finishes
            it at the end.
        **init: Arguments for ``wandb.init`` if ``run`` is None: ``project``, ``name``, ``config``, ...

    Raises:
        ModuleNotFoundError: ``run`` is None and the wandb package is missing.
        TypeError: Both ``run`` and arguments for ``wandb.init`` are passed.
    """

    def __init__(self, run: Any = None, **init: Any) -> None:
        if run is not None and init:
            raise TypeError(
                f"WandbSink expects a run or arguments for wandb.init, got a run and {sorted(init)}; pass one of them"
            )
        if run is None and find_spec("wandb") is None:
            raise ModuleNotFoundError("WandbSink needs the wandb package: pip install wandb, or pass other sinks=")
        self._run = run
        self._init_args = init
        self._owns_run = run is None
        self._reset()

    def _reset(self) -> None:
        self._points = 0
        self._open_row: int | None = None
        self._sections: set[str] = set()

    def start(self, info: RunInfo, first_step: int) -> None:
        if self._run is None:
            import wandb

            self._run = wandb.init(**self._init_args)
            # After close(), and in a copy in another process, the same run is resumed.
            self._init_args = {**self._init_args, "id": self._run.id, "resume": "allow"}
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
        if is_histogram_point(self._points):
            numbers.update(_histograms(record))
        for section in dict.fromkeys(tag.split("/")[0] for tag in numbers):
            if section not in self._sections:
                self._sections.add(section)
                self._run.define_metric(f"{section}/*", step_metric=_STEP)
        if self._open_row == self._run.step:
            self._commit_open_row()
        self._open_row = self._run.step
        self._run.log({**numbers, _STEP: record.step}, commit=False)

    def alert(self, event: AlertEvent) -> None:
        """Send a wandb alert: in the app, and by mail or Slack if configured in wandb."""
        self._run.alert(title=event.rule, text=event.message)

    def flush(self) -> None:
        if self._owns_run and self._run is not None:
            self._commit_open_row()

    def close(self) -> None:
        if self._owns_run and self._run is not None:
            self._commit_open_row()
            self._run.finish()
            self._run = None
            self._reset()

    def _commit_open_row(self) -> None:
        """Commit the open row if it contains our numbers."""
        if self._open_row == self._run.step:
            self._run.log({}, commit=True)
        self._open_row = None

    def __deepcopy__(self, memo: dict[int, Any]) -> WandbSink:
        twin = WandbSink.__new__(WandbSink)
        twin.__dict__.update(self.__dict__, _sections=set(self._sections), _init_args=dict(self._init_args))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # A run cannot be pickled. The copy resumes the same run.
        init = self._init_args
        if not self._owns_run:
            init = {"entity": self._run.entity, "project": self._run.project, "id": self._run.id, "resume": "allow"}
        return {"_init_args": init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._init_args, self._run, self._owns_run = state["_init_args"], None, True
        self._reset()


def _histograms(record: FlipRecord) -> dict[str, Any]:
    by_tag = {
        printable(f"{name}/{layer.name}"): histogram
        for layer in record.layers
        for name, histogram in layer.histograms.items()
    }
    if not by_tag:
        return {}
    import wandb

    return {
        tag: wandb.Histogram(np_histogram=(list(histogram.counts), list(histogram.edges)))
        for tag, histogram in by_tag.items()
    }
