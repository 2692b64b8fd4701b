"""The totals for notebooks and for people's own tables."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from weightflip import notebook
from weightflip.counting import summary
from weightflip.counting.course import Course
from weightflip.records import Counts, split_variant

if TYPE_CHECKING:
    import pandas


def as_html(steps: int, layers: Iterable[tuple[str, str, int, Counts]], note: str = "", *, course: Course) -> str:
    """The table of :func:`summary.as_text`, with small curves of all layers together.

    Args:
        steps: How many there were.
        layers: As in :func:`summary.as_text`.
        note: What else there is to say.
        course: How the numbers went.
    """
    found = summary.summarize(steps, layers)
    tables = [
        notebook.table((what, *summary.HEAD), [row.cells for row in rows], texts=2) if rows else ""
        for what, rows in found.tables
    ]
    pictures = [
        notebook.curves("flip rate", course.flip_rates()),
        notebook.curves("stall ratio", course.stall_ratios()),
    ]
    return notebook.page(
        notebook.paragraph(found.caption),
        *pictures,
        *tables,
        notebook.paragraph(found.ending),
        notebook.paragraph(note),
    )


class Displayed(ABC):
    """A tracker as a notebook shows it, and its numbers as rows."""

    _show: weakref.WeakMethod[Callable[..., str]] | None

    @property
    @abstractmethod
    def course(self) -> Course:
        """The numbers of all layers together at each record."""

    @abstractmethod
    def totals(self) -> tuple[int, list[tuple[str, str, int, Counts]]]:
        """Steps; and of each layer its name, its quantizer, how many weights it has, and its counts since the start."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """The numbers since tracking began, one flat dictionary for each layer, all with the same keys.

        Waits for the device. ``flip_rate`` is the mean over the tracked steps, ``cumulative_flip_rate`` is flips /
        weights. A share of nothing is NaN. Counts of metric groups are there as shares, under the names that records
        have; what they only find at logging points is in :class:`FlipRecord` alone. Sum counts over layers before you
        divide them.

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
        """The rows of :meth:`to_dicts` as a table of pandas.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas() needs pandas, which is not installed; `pip install 'weightflip[pandas]'`, or use "
                "to_dicts(), which needs nothing"
            ) from error
        return pandas.DataFrame(self.to_dicts())

    def _repr_html_(self) -> str:
        form = partial(as_html, course=self.course)
        show = None if self._show is None else self._show()
        return form(*self.totals()) if show is None else show(form)
