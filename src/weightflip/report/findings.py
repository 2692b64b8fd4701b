"""What a run's numbers say, in plain words: pure functions from runs to sentences.

A rule speaks only where its sentence is true as it stands. What is usual in a healthy training, such as stall ratios
near 1 of float32 weights that are seen in 8 bits, is no finding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from weightflip.records import shown
from weightflip.report.run import Layer, Run, Series, sums

# Points that a rule about a development over time needs.
_POINTS = 4
_BURST_POINTS = 8
# Shares of the stored weights' updates that rounding swallows: a part, half, nearly all.
_LOST = (0.25, 0.5, 0.9)
# A layer whose updates reach its codes this many times less often than those of the other layers.
_BEHIND = 20.0
# Flips that take back the one before, and how many flips there have to be. In healthy trainings in 8 bits a fifth to
# half of the flips do, and half of the weights have an oscillation frequency above the threshold of Nagel et al.
_OSCILLATION_RATIO, _OSCILLATION_RATE, _TRAVEL = 0.9, 0.003, 3.0
# Flips of each weight in one window, beyond those of the windows around it, and the factor between the two.
_BURST, _BURST_FACTOR = 0.5, 4.0
_SCALE_DRIVEN, _SCALE_DRIVEN_RATE = 0.5, 0.02
_ALL_ZERO = 0.9
_UNDERFLOW = 0.5
# Of evenly spread weights a thirtieth have the outermost two codes of float8.
_SATURATED = 0.1
_RANK_LEFT = 0.5
# Formats of so few codes that many weights are at the largest one, and many round to 0, by design.
_COARSE = ("ternary", "binary", "int", "mxfp4", "nvfp4", "e0m", "e1m", "e2m1", "e3m0", "e2m0")
# Below these differences two runs are called alike.
_ALIKE, _ALIKE_FACTOR = 0.05, 2.0


class Severity(IntEnum):
    """How much a finding matters."""

    INFO = 0
    NOTE = 1
    WARNING = 2
    SERIOUS = 3


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say.

    Attributes:
        severity: How much it matters.
        rule: What was looked for, in one or two words.
        text: One or two plain sentences.
        runs: Names of the runs that it is about.
        layers: Names of the layers that it is about, as in the runs; empty for all.
        step: Since when, or when; None where it has no beginning.
    """

    severity: Severity
    rule: str
    text: str
    runs: tuple[str, ...]
    layers: tuple[str, ...] = ()
    step: int | None = None

    def __post_init__(self) -> None:
        # Names are in the sentence, and people read it.
        object.__setattr__(self, "text", shown(self.text))


def find(runs: Sequence[Run]) -> list[Finding]:
    """All findings about some runs, the worst first.

    Args:
        runs: As :func:`weightflip.report.read.read_runs` gives them. Several are compared with each other, too.

    Returns:
        At least one for each run: where nothing stands out, a sentence that says so.
    """
    found = [finding for run in runs for finding in find_in_run(run)]
    found += compare(runs)
    return sorted(found, key=lambda finding: (-finding.severity, finding.rule != "comparison"))


def find_in_run(run: Run) -> list[Finding]:
    """All findings about one run."""
    broken = _nonfinite(run)
    # Codes of non-finite weights stand still or are all alike: no other number of theirs means anything.
    healthy = [layer for layer in run.layers.values() if not layer.get("nonfinite_weights")]
    found = [*_alerts(run), *broken, *_lost(run, healthy)]
    for rule in (_dead, _stuck, _behind, _oscillating, _bursts, _scale_driven, _ranges, _ranks):
        found += rule(run, healthy)
    found += _formats(run)
    if not any(finding.severity for finding in found):
        found.append(_nothing(run))
    return found


# ---------------------------------------------------------------------- words


def percent(share: float) -> str:
    """A share in percent, with digits where they count, near 0 % and 100 %; never rounded to either.

    Example:
        >>> [percent(share) for share in (0, 0.00001, 0.0123, 0.5, 0.99912, 0.999999, 1)]
        ['0 %', 'less than 0.01 %', '1.2 %', '50 %', '99.91 %', 'more than 99.99 %', '100 %']
    """
    number = 100 * share
    if number in (0, 100):
        return f"{number:.0f} %"
    room = min(number, 100 - number)
    if room < 0.01:
        return "less than 0.01 %" if number < 50 else "more than 99.99 %"
    return f"{number:.{0 if room >= 10 else 1 if room >= 1 else 2}f} %"


def _times(factor: float) -> str:
    return f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"


def _names(names: Sequence[str], of: int) -> str:
    """Layers by name; many of them by number."""
    if len(names) == 1:
        return names[0]
    if len(names) == of:
        return f"all {of} layers" if of > 2 else "both layers"
    shown = list(names[:3])
    more = len(names) - len(shown)
    listed = ", ".join(shown) + f" and {more} more" if more else " and ".join([", ".join(shown[:-1]), shown[-1]])
    return f"{len(names)} of {of} layers ({listed})"


def _format(layer: Layer) -> str:
    return f"stored {layer.dtype} bits" if layer.is_stored and layer.dtype else layer.quantizer or "its format"


def _formats_of(layers: Sequence[Layer]) -> str:
    return " and ".join(dict.fromkeys(_format(layer) for layer in layers))


def _keeps(layers: Sequence[Layer]) -> str:
    """What becomes of an update that changes no code."""
    if all(layer.is_stored for layer in layers):
        return "Rounding swallows these updates for good"
    kept = " and ".join(dict.fromkeys(layer.dtype for layer in layers if not layer.is_stored and layer.dtype))
    return f"The {kept or 'master'} weights may still move, the forward pass sees nothing of it"


# ---------------------------------------------------------------------- one run


def _late(run: Run, layer: Layer, value: str) -> Series:
    return layer.get(value).part(run.late)


def _alerts(run: Run) -> Iterator[Finding]:
    alerts = sorted(run.alerts, key=lambda alert: (alert.layer, alert.rule))
    for (layer, rule), group in itertools.groupby(alerts, key=lambda alert: (alert.layer, alert.rule)):
        first, *later = sorted(group)
        again = f" (and {len(later)} times more, last at step {later[-1].step:,})" if later else ""
        where = f" for {layer}" if layer else ""
        text = f"Alert at step {first.step:,}{where}: {first.message or rule}{again}"
        layers = (layer,) if layer in run.layers else ()
        yield Finding(Severity.WARNING, "alert", text, (run.name,), layers, first.step)


def _nonfinite(run: Run) -> Iterator[Finding]:
    hit = [layer for layer in run.layers.values() if len(layer.get("nonfinite_weights"))]
    if not hit:
        return
    first = min(hit, key=lambda layer: layer.get("nonfinite_weights").steps[0])
    since = int(first.get("nonfinite_weights").steps[0])
    now = [layer for layer in hit if layer.get("nonfinite_weights").steps[-1] == layer.get("flip_rate").steps[-1]]
    of = len(run.layers)
    where = _names([layer.name for layer in hit], of)
    order = f", first in {first.name}" if len(hit) > 1 else ""
    if now:
        count = int(sum(layer.get("nonfinite_weights").values[-1] for layer in now))
        size = sum(layer.weights for layer in now)
        amount = f"{count:,} of {size:,} weights" if size else f"{count:,} weights"
        text = (
            f"NaN or infinite weights in {where} since step {since:,}{order}: {amount} at the end. The training has "
            "diverged there, and the other numbers of these layers mean nothing from then on"
        )
    else:
        text = f"NaN or infinite weights in {where} at step {since:,}{order}; they were gone again at the end"
    severity = Severity.SERIOUS if now else Severity.WARNING
    yield Finding(severity, "non-finite", text, (run.name,), tuple(layer.name for layer in hit), since)


def _lost(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Updates that leave a weight of few bits as it was, where no finer copy is kept."""
    stored = [layer for layer in layers if layer.is_stored and layer.dtype not in ("float32", "float64")]
    stalls = sums(stored).get("stall_ratio")
    if stalls is None:
        return
    share, late = stalls.summary, stalls.part(run.late).summary
    severity = _loss(stalls, run.late)
    if not severity:
        return
    dtype = " and ".join(dict.fromkeys(layer.dtype for layer in stored if layer.dtype)) or "weights"
    text = (
        f"{percent(share)} of the updates left the stored {dtype} weight as it was, {percent(late)} in the last "
        "quarter of the run: rounding swallowed them, and they are lost unless the optimizer keeps a finer copy or "
        "rounds stochastically. Float32 master weights, stochastic rounding or a higher learning rate help"
    )
    names = () if len(stored) == len(run.layers) else tuple(layer.name for layer in stored)
    yield Finding(severity, "lost updates", text, (run.name,), names)


def _loss(stalls: Series, late: float) -> Severity:
    """How bad it is that so many updates are lost: over all, or in the last quarter."""
    worst = max(stalls.summary, stalls.part(late).summary if len(stalls) >= _POINTS else 0)
    return Severity(sum(worst >= limit for limit in _LOST))


def _counts_stalls(run: Run) -> bool:
    return any(len(layer.get("stall_ratio")) for layer in run.layers.values())


def _dead(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Layers without a gradient."""
    if "stalls" not in run.info.settings.get("metrics", "stalls"):
        return
    late = [layer for layer in layers if len(_late(run, layer, "flip_rate"))]
    silent = [layer for layer in late if not len(_late(run, layer, "stall_ratio"))]
    if not silent:
        return
    of = len(run.layers)
    if len(silent) == len(late) and not _counts_stalls(run):
        text = (
            "No gradient was there at the end of any step, so there is no stall ratio. Something zeroes or frees the "
            "gradients within step()"
        )
        if any(_late(run, layer, "flip_rate").numerators.any() for layer in late):
            yield Finding(Severity.INFO, "no gradients", text, (run.name,))
            return
    for moves in (False, True):
        hit = [layer for layer in silent if bool(_late(run, layer, "flip_rate").numerators.any()) is moves]
        if not hit:
            continue
        names = tuple(layer.name for layer in hit)
        last = max(int(steps[-1]) if len(steps := layer.get("stall_ratio").steps) else 0 for layer in hit)
        since = f"since step {last:,}" if last else "in the whole run"
        if moves:
            severity = Severity.NOTE
            text = f"No gradient for {_names(names, of)} {since}, yet weights change: weight decay or momentum alone"
        else:
            severity = Severity.WARNING
            text = (
                f"Dead: no gradient for {_names(names, of)} {since}, and no weight changed. Is it used in the forward "
                "pass, not detached, and not behind units that are always 0?"
            )
        yield Finding(severity, "dead", text, (run.name,), names, last or None)


def _moved_last(layer: Layer) -> int:
    """The step of the last point with a flip; 0 for none."""
    flips = layer.get("flip_rate")
    moved = flips.steps[flips.numerators > 0]
    return int(moved[-1]) if len(moved) else 0


def _stuck_layers(run: Run, layers: Sequence[Layer]) -> list[Layer]:
    return [
        layer
        for layer in layers
        if len(layer.get("flip_rate")) >= _POINTS
        and len(late := _late(run, layer, "flip_rate"))
        and not late.numerators.any()
        and (len(_late(run, layer, "stall_ratio")) or not _counts_stalls(run))
    ]


def _stuck(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """No flip at all in the last quarter."""
    hit = _stuck_layers(run, layers)
    if not hit:
        return
    names = tuple(layer.name for layer in hit)
    last = max(_moved_last(layer) for layer in hit)
    since = f"since step {last:,}" if last else "in the whole run"
    what = "update" if _counts_stalls(run) else "step"
    ended = (
        " Has the learning rate come to 0?"
        if len(hit) == len(layers)
        else " Its steps are too small for the distance of its codes"
        if len(hit) == 1
        else " Their steps are too small for the distance of their codes"
    )
    text = (
        f"Stuck: no {what} of {_names(names, len(run.layers))} has moved a weight to another code {since} "
        f"({_formats_of(hit)}). {_keeps(hit)}.{ended}"
    )
    # A learning rate that has decayed stops a coarse format a while before the end: no loss where weights are finer.
    long = run.end - last >= (run.end - run.begin) / 2
    severity = Severity.WARNING if long else Severity.NOTE
    if all(layer.is_stored for layer in hit):
        severity = Severity.SERIOUS
    yield Finding(severity, "stuck", text, (run.name,), names, last)


def _behind(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Layers whose updates reach their codes far less often than those of the others in the same format."""
    if len(run.steps) < _POINTS:
        return
    for variant, grid in dict.fromkeys((layer.variant, layer.grid) for layer in layers):
        moved = {
            layer.name: 1 - stalls.summary
            for layer in layers
            if (layer.variant, layer.grid) == (variant, grid) and len(stalls := _late(run, layer, "stall_ratio"))
        }
        others = {
            name: float(np.median([share for other, share in moved.items() if other != name]))
            for name in (moved if len(moved) > 1 else ())
        }
        hit = {name: moved[name] for name, middle in others.items() if 0 < moved[name] < middle / _BEHIND}
        if not hit:
            continue
        name, share = min(hit.items(), key=lambda item: item[1])
        ever = _late(run, run.layers[name], "ever_flipped").summary
        excess = _late(run, run.layers[name], "flip_excess").summary
        clauses = "" if math.isnan(ever) else f"; {percent(ever)} of its weights have flipped since the start"
        cause = "Look at its gradients, its learning rate and its scale"
        if 0.5 <= excess <= 2:
            cause = f"Its steps are small (flip excess {excess:.2f}): look at its learning rate and its gradients"
        text = (
            f"{_names(list(hit), len(run.layers))} {'stands' if len(hit) == 1 else 'stand'} nearly still: in the last "
            f"quarter {percent(share)} of the updates of {name} changed a code, {percent(others[name])} in the other "
            f"layers{clauses}. {cause}"
        )
        yield Finding(Severity.WARNING, "nearly still", text, (run.name,), tuple(hit))


def _oscillating(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Many flips, and nearly all of them back to where the weight came from."""
    hit: dict[str, tuple[float, str]] = {}
    for layer in layers:
        rate, back, travel, share, net = (
            _late(run, layer, value).summary
            for value in ("flip_rate", "oscillation_ratio", "travel_ratio", "oscillating_fraction", "net_flipped")
        )
        few = len(layer.get("flip_rate")) < _POINTS
        if few or not (back >= _OSCILLATION_RATIO and rate >= _OSCILLATION_RATE) or travel < _TRAVEL:
            continue
        clauses = [
            f"{percent(back)} of its flips took back the flip before",
            f"{percent(rate)} of its weights flipped in a step",
        ]
        if not math.isnan(share):
            clauses.append(f"{percent(share)} of them went to and fro not long before the end")
        if not math.isnan(travel):
            clauses.append(f"its quantized weights travelled {_times(travel)} times as far as the weights themselves")
        flips = layer.get("cumulative_flip_rate").summary
        if flips > 1 and not math.isnan(net):
            clauses.append(
                f"{_times(flips)} flips a weight since the start left {percent(1 - net)} of them on their first code"
            )
        hit[layer.name] = back, ", ".join(clauses)
    if not hit:
        return
    name = max(hit, key=lambda name: hit[name][0])
    as_in = f", most of all {name}" if len(hit) > 1 else ""
    text = (
        f"{_names(list(hit), len(run.layers))} {'oscillates' if len(hit) == 1 else 'oscillate'}{as_in}: in the last "
        f"quarter {hit[name][1]}. A lower learning rate at the end, dampening, or freezing such weights helps"
    )
    yield Finding(Severity.WARNING, "oscillating", text, (run.name,), tuple(hit))


class _Burst(NamedTuple):
    layer: str
    begin: int
    end: int
    flips: float
    usual: float


def _bursts(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """One window in which far more weights flip than in those around it."""
    found: list[_Burst] = []
    for layer in layers:
        flips = layer.get("flip_rate")
        if len(flips) < _BURST_POINTS:
            continue
        rates = flips.values
        # Tracked steps of each window. The size is unknown to event files without a text panel: there it counts as 1.
        steps = flips.denominators / max(1, layer.weights)
        padded = np.pad(rates, 3, mode="reflect")
        around = np.stack([padded[shift : shift + len(rates)] for shift in (0, 1, 2, 4, 5, 6)])
        # As high as either side goes: a warmup, or a learning rate that falls in a step, is no burst.
        usual = np.maximum(np.median(around[:3], axis=0), np.median(around[3:], axis=0))
        at = int(np.argmax((rates - usual) * steps))
        if (rates[at] - usual[at]) * steps[at] >= _BURST and rates[at] >= _BURST_FACTOR * usual[at]:
            begin, end = int(flips.steps[at - 1]) if at else run.begin, int(flips.steps[at])
            found.append(_Burst(layer.name, begin, end, float(rates[at] * steps[at]), float(usual[at] * steps[at])))
    for begin, end in dict.fromkeys((burst.begin, burst.end) for burst in found):
        bursts = [burst for burst in found if (burst.begin, burst.end) == (begin, end)]
        biggest = max(bursts, key=lambda burst: burst.flips)
        names = tuple(burst.layer for burst in bursts)
        whose = "its" if len(names) == 1 else f"{biggest.layer}'s"
        text = (
            f"A burst in {_names(names, len(run.layers))} between step {begin:,} and {end:,}: {whose} weights flipped "
            f"{biggest.flips:.2f} times each, {biggest.usual:.2f} times in the windows around it. A moved scale does "
            "this, a spike of the loss, or weights that were written through .data"
        )
        yield Finding(Severity.NOTE, "burst", text, (run.name,), names, end)


def _scale_driven(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    shares = {
        layer.name: share
        for layer in layers
        if (share := _late(run, layer, "weight_driven_fraction").summary) < _SCALE_DRIVEN
        and _late(run, layer, "flip_rate").summary >= _SCALE_DRIVEN_RATE
    }
    if shares:
        name, share = min(shares.items(), key=lambda item: item[1])
        text = (
            f"Most flips of {_names(list(shares), len(run.layers))} come from a moving scale: in the last quarter only "
            f"{percent(share)} of those of {name} would be there with the scale of the step before. Read its flip "
            "rate with that in mind; a scale per row or a power of two moves less"
        )
        yield Finding(Severity.NOTE, "scale-driven", text, (run.name,), tuple(shares))


def _ranges(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Too many weights at the ends of the format."""
    coarse = {layer.name for layer in layers if layer.grid.startswith(_COARSE)}

    def above(value: str, limit: Callable[[Layer], float]) -> dict[str, float]:
        shares = {layer.name: layer.get(value).summary for layer in layers}
        return {name: share for name, share in shares.items() if share >= limit(run.layers[name])}

    checks = [
        ("zero", above("zero_fraction", lambda layer: _ALL_ZERO), "is 0 in the forward pass"),
        (
            "underflow",
            above("underflow_fraction", lambda layer: math.inf if layer.name in coarse else _UNDERFLOW),
            "is not 0 and rounds to 0",
        ),
        (
            "saturated",
            above("saturated_fraction", lambda layer: math.inf if layer.name in coarse else _SATURATED),
            "sits at the ends of the format",
        ),
    ]
    for rule, hit, what in checks:
        if hit:
            name, share = max(hit.items(), key=lambda item: item[1])
            advice = {
                "zero": "The layer is dying out, or its scale follows a few outliers",
                "underflow": "A scale per row or block, or a format with more exponent bits, keeps small weights",
                "saturated": "A larger scale, or a scale per row or block, keeps large weights apart",
            }[rule]
            text = (
                f"{percent(share)} of {name} {what} at the end"
                + (f", and many weights of {_names(list(hit), len(run.layers))}" if len(hit) > 1 else "")
                + f". {advice}"
            )
            yield Finding(Severity.WARNING, rule, text, (run.name,), tuple(hit))


def _ranks(run: Run, layers: Sequence[Layer]) -> Iterator[Finding]:
    hit: dict[str, tuple[float, float, int]] = {}
    for layer in layers:
        rank = layer.get("effective_rank")
        if len(rank) >= _POINTS and rank.values[-1] < _RANK_LEFT * rank.values[0]:
            hit[layer.name] = float(rank.values[0]), float(rank.values[-1]), int(rank.steps[0])
    if hit:
        name, (first, last, step) = min(hit.items(), key=lambda item: item[1][1] / item[1][0])
        text = (
            f"The effective rank of {_names(list(hit), len(run.layers))} fell to less than half"
            + (f", most in {name}" if len(hit) > 1 else "")
            + f": from {first:.1f} at step {step:,} to {last:.1f}. Its weights have lost directions; some of it is "
            "usual in training, a low-precision format can add to it"
        )
        yield Finding(Severity.NOTE, "rank", text, (run.name,), tuple(hit))


def _formats(run: Run) -> Iterator[Finding]:
    """Which of several formats swallows most."""
    stalls = {name: model.get("stall_ratio") for name, model in run.models.items() if name}
    shares = {name: series.summary for name, series in stalls.items() if series is not None}
    if len(shares) > 1:
        low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
        text = (
            f"Of the {len(shares)} formats that see this training, {low} swallows the fewest updates in the step that "
            f"makes them ({percent(shares[low])}) and {high} the most ({percent(shares[high])})"
        )
        yield Finding(Severity.INFO, "formats", text, (run.name,))


def _nothing(run: Run) -> Finding:
    looked = ["non-finite weights", "layers without updates", "layers that stand still", "bursts of flips"]
    values = {value for layer in run.layers.values() for value in layer.values}
    looked += ["oscillation"] * bool(values & {"oscillation_ratio", "oscillating_fraction"})
    looked += ["moving scales"] * ("weight_driven_fraction" in values)
    looked += ["range"] * bool(values & {"zero_fraction", "saturated_fraction", "underflow_fraction"})
    looked += ["rank"] * ("effective_rank" in values)
    text = f"Nothing stands out up to step {run.end:,} (looked for: {', '.join(looked)})"
    if len(run.steps) < _BURST_POINTS:
        text += f". {len(run.steps)} points are few to judge by"
    return Finding(Severity.INFO, "healthy", text, (run.name,))


# ---------------------------------------------------------------------- several runs


@dataclass(frozen=True)
class _Pair:
    """The weights that two runs share, each as one quantizer sees them, up to the step that both have reached."""

    names: tuple[str, str]
    layers: tuple[tuple[Layer, ...], tuple[Layer, ...]]
    end: int

    @property
    def both_stored(self) -> bool:
        return all(layer.is_stored and layer.dtype for side in self.layers for layer in side)

    @property
    def same_grid(self) -> bool:
        return all(a.grid == b.grid and a.grid for a, b in zip(*self.layers, strict=True))

    @property
    def same_storage(self) -> bool:
        return all(a.dtype == b.dtype for a, b in zip(*self.layers, strict=True))

    def shares(self, value: str) -> tuple[float, float]:
        a, b = (sums(side).get(value, None) for side in self.layers)
        nothing = math.nan
        return (
            a.part(-1, self.end).summary if a is not None else nothing,
            b.part(-1, self.end).summary if b is not None else nothing,
        )

    @property
    def value(self) -> str:
        """What is compared."""
        return "stall_ratio" if not any(map(math.isnan, self.shares("stall_ratio"))) else "flip_rate"

    @property
    def difference(self) -> float:
        """For the choice of the biggest one."""
        return abs(_gap(*self.shares(self.value)))

    @property
    def is_alike(self) -> bool:
        a, b = self.shares(self.value)
        low, high = sorted((a, b))
        return high - low < _ALIKE and not (
            high - low >= 0.001 and (high >= _ALIKE_FACTOR * low or 1 - low >= _ALIKE_FACTOR * (1 - high))
        )

    def format(self, side: int) -> str:
        return _formats_of(self.layers[side])


def _pairs(a: Run, b: Run) -> list[_Pair]:
    pairs = []
    for one, other in itertools.product(a.models, b.models):
        mine = {layer.weight: layer for layer in a.layers.values() if layer.variant == one}
        theirs = {layer.weight: layer for layer in b.layers.values() if layer.variant == other}
        common = [
            name
            for name in mine
            if name in theirs
            and not len(mine[name].get("nonfinite_weights"))
            and not len(theirs[name].get("nonfinite_weights"))
        ]
        if common:
            layers = (tuple(mine[name] for name in common), tuple(theirs[name] for name in common))
            pairs.append(_Pair((a.name, b.name), layers, min(a.end, b.end)))
    return pairs


def compare(runs: Sequence[Run]) -> list[Finding]:
    """The biggest difference between two of several runs, like with like.

    Alike are the same weights seen in the same format, or each as its own stored bits: there a stalled update is one
    that left the weight as it was, whatever its dtype. Other formats have other distances between their codes: such
    runs are named, and not compared.
    """
    found: list[Finding] = []
    comparable: list[_Pair] = []
    unlike: list[_Pair] = []
    strangers: list[tuple[str, str]] = []
    for a, b in itertools.combinations(runs, 2):
        pairs = _pairs(a, b)
        # Stored bits of different dtypes first: what is lost and what is not is the biggest thing to say.
        good = sorted(
            (pair for pair in pairs if pair.both_stored or pair.same_grid),
            key=lambda pair: (not (pair.both_stored and not pair.same_storage), not pair.same_grid, -pair.difference),
        )
        if good:
            comparable.append(good[0])
        elif pairs:
            unlike.append(pairs[0])
        else:
            strangers.append((a.name, b.name))
    comparable = [pair for pair in comparable if not any(map(math.isnan, pair.shares(pair.value)))]
    if comparable:
        found.append(_difference(max(comparable, key=lambda pair: pair.difference), len(comparable)))
    if unlike:
        pair = unlike[0]
        (a_name, b_name), more = pair.names, len(unlike) - 1
        keeps = [f"{name} as {pair.format(side)}" for side, name in enumerate((a_name, b_name))]
        text = (
            f"{a_name} and {b_name} are seen in different formats, {' and '.join(keeps)}: their rates are not compared"
            + (f" (nor are those of {more} more pairs of runs)" if more else "")
            + '. Track both with the same quantizer=, or with quantizer="native" to compare what is stored'
        )
        found.append(Finding(Severity.INFO, "not compared", text, pair.names))
    if strangers and not comparable and not unlike:
        text = "The runs have no healthy layer in common: each is reported by itself"
        found.append(Finding(Severity.INFO, "not compared", text, strangers[0]))
    return found


def _difference(pair: _Pair, pairs: int) -> Finding:
    a, b = pair.shares(pair.value)
    low, high = (0, 1) if a <= b else (1, 0)
    shares = (a, b)
    names = pair.names
    steps = f"up to step {pair.end:,}"
    among = f", the biggest difference among {pairs} pairs of runs" if pairs > 1 else ""
    if pair.is_alike:
        what = "of the updates change no code" if pair.value == "stall_ratio" else "of the weights flip in a step"
        text = (
            f"{names[0]} and {names[1]} differ little{among}: {percent(a)} and {percent(b)} {what} ({pair.format(0)}, "
            f"{steps})"
        )
        return Finding(Severity.INFO, "comparison", text, names)
    if pair.value == "flip_rate":
        text = (
            f"In a step {percent(shares[high])} of the weights of {names[high]} flip, {percent(shares[low])} of those "
            f"of {names[low]} ({pair.format(high)}, {steps}{among})"
        )
        return Finding(Severity.NOTE, "comparison", text, names)

    most = _most(pair, high)
    if pair.both_stored and not pair.same_grid:
        dtypes = [" and ".join(dict.fromkeys(layer.dtype for layer in side)) for side in pair.layers]
        text = (
            f"In {names[high]} (stored {dtypes[high]} weights) {percent(shares[high])} of the updates left the stored "
            f"weight as it was, in {names[low]} (stored {dtypes[low]} weights) {percent(shares[low])}: steps below "
            f"half the distance of two {dtypes[high]} numbers are rounded away ({steps}{among}){most}"
        )
        stalls = sums(pair.layers[high])["stall_ratio"].part(-1, pair.end)
        severity = max(Severity.NOTE, _loss(stalls, 0.75 * pair.end))
        return Finding(severity, "comparison", text, names)
    text = (
        f"In {names[high]} {percent(shares[high])} of the updates changed no code, in {names[low]} "
        f"{percent(shares[low])} (both seen in {pair.layers[0][0].grid}, {steps}{among})"
    )
    keeps = [all(not layer.is_stored for layer in side) for side in pair.layers]
    stores = [all(layer.is_stored for layer in side) for side in pair.layers]
    for side in (0, 1):
        if keeps[side] and stores[1 - side]:
            dtype = " and ".join(dict.fromkeys(layer.dtype for layer in pair.layers[side] if layer.dtype)) or "finer"
            text += (
                f": {names[side]} keeps such updates in its {dtype} weights, where they add up, {names[1 - side]} "
                "stores no finer copy and loses them"
            )
    text += most
    return Finding(Severity.NOTE, "comparison", text, names)


def _gap(a: float, b: float) -> float:
    """How far a share is above another; near 1 a factor of what is left counts, too."""
    return a - b + 0.05 * math.log(max(1 - b, 1e-6) / max(1 - a, 1e-6))


def _most(pair: _Pair, high: int) -> str:
    """The layer with the biggest difference, where it is far from that of all layers."""
    overall = pair.shares("stall_ratio")
    gaps = []
    for mine, theirs in zip(pair.layers[high], pair.layers[1 - high], strict=True):
        a, b = (layer.get("stall_ratio").part(-1, pair.end).summary for layer in (mine, theirs))
        if not math.isnan(a - b):
            gaps.append((_gap(a, b), mine.weight, a, b))
    if len(gaps) < 2:
        return ""
    gap, name, a, b = max(gaps)
    if gap < _gap(overall[high], overall[1 - high]) + 0.1:
        return ""
    return f"; most in {name}, {percent(a)} against {percent(b)}"
