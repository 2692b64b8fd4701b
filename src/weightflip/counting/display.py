"""The totals for notebooks and for users' own tables."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from weightflip import notebook
from weightflip.counting import summary
from weightflip.counting.history import History
from weightflip.records import Counts, split_variant

if TYPE_CHECKING:
    import pandas


def as_html(steps: int, layers: Iterable[tuple[str, str, int, Counts]], note: str = "", *, history: History) -> str:
    """The table of :func:`summary.as_text`, with small curves of all layers together.

    Args:
        steps: The number of steps so far.
        layers: As in :func:`summary.as_text`.
        note: Shown at the end.
        history: The history of the numbers.
    """
    found = summary.summarize(steps, layers)
    tables = [
        notebook.table((what, *summary.HEAD), [row.cells for row in rows], texts=2) if rows else ""
        for what, rows in found.tables
    ]
    pictures = [
        notebook.curves("flip rate", history.flip_rates()),
        notebook.curves("stall ratio", history.stall_ratios()),
    ]
    return notebook.page(
        notebook.paragraph(found.caption),
        *pictures,
        *tables,
        notebook.paragraph(found.ending),
        notebook.paragraph(note),
    )


class DisplayMixin(ABC):
    """The display of a tracker in notebooks, and its numbers as rows."""

    _show: weakref.WeakMethod[Callable[..., str]] | None

    @property
    @abstractmethod
    def history(self) -> History:
        """The history of all layers together."""

    @abstractmethod
    def totals(self) -> tuple[int, list[tuple[str, str, int, Counts]]]:
        """Return the number of steps, and for each layer its name, quantizer, number of weights and total counts."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the numbers since tracking began, one flat dictionary per layer, all with the same keys.

        Synchronizes with the device. ``flip_rate`` is the mean over the tracked steps, ``cumulative_flip_rate`` is
        flips / weights. A ratio with denominator 0 is NaN. Ratios of metric groups are included under the names they
        have in records; gauges are only in :class:`FlipRecord`. To aggregate layers, sum counts before dividing them.

        Example:
            >>> from weightflip import WeightFlipTracker
            >>> import torch
            >>> tracker, weight = WeightFlipTracker(), torch.tensor([[1.0, 2.0]])
            >>> tracker.snapshot_pre_step("fc", weight, "e4m3")
            >>> weight[0, 0] += 0.5
            >>> tracker.compute_flips_post_step("fc", weight, "e4m3")
            1
            >>> [(row["layer"], row["flips"], row["cumulative_flip_rate"]) for row in tracker.to_dicts()]
            [('fc', 1, 0.5)]
        """
        steps, layers = self.totals()
        ratios = dict.fromkeys(name for *_, counts in layers for name in counts.ratios)
        return [
            {
                "layer": split_variant(name)[0],
                "quantizer": quantizer,
                "step": steps,
                "weights": weights,
                "flips": counts.flips,
                "updates": counts.updates,
                "stalled": counts.stalled,
                "flip_rate": counts.flip_rate,
                "cumulative_flip_rate": counts.flips / weights if weights else math.nan,
                "stall_ratio": counts.stall_ratio,
                "updated_fraction": counts.updated_fraction,
                "scale_changes": counts.scale_change_rate,
                **{of: counts.ratios[of].value if of in counts.ratios else math.nan for of in ratios},
            }
            for name, quantizer, weights, counts in layers
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows of :meth:`to_dicts` as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas() needs pandas, which is not installed; run `pip install 'weightflip[pandas]'`, or use "
                "to_dicts(), which needs no other package"
            ) from error
        return pandas.DataFrame(self.to_dicts())

    def _repr_html_(self) -> str:
        form = partial(as_html, history=self.history)
        show = None if self._show is None else self._show()
        return form(*self.totals()) if show is None else show(form)
