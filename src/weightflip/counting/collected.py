"""What is read from many layers in each step, collected again only after one of them has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weightflip.counting.batch import Member
from weightflip.counting.layer import Changes, Layer, TrackedWeight
from weightflip.counting.stamps import Stamps


class CollectedLayers:
    """Layers, and lists of some of their attributes.

    Between two steps, training evicts the layers from the processor's caches. For a thousand of them, reading them
    again takes longer than comparing their weights.

    Args:
        changes: The changes of the layers.

    Attributes:
        layers: The layers.
        tracked: Their weights.
        stamps: Their stamps; None if one of them has no stamp.
        kept: The indices of those that are counted together with others and have kept codes.
        are_kept: Whether all of them are.
    """

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._collect([])

    def collect(self, layers: Sequence[Layer]) -> bool:
        """Read the attributes of layers that have a weight, unless they are still the same. Return whether it did."""
        has_changed = layers != self.layers or self._changes.number != self._number
        if has_changed:
            self._collect(layers)
        return has_changed

    def _collect(self, layers: Sequence[Layer]) -> None:
        self._number = self._changes.number
        self.layers = layers
        self.tracked: list[TrackedWeight] = [layer.tracked for layer in layers]  # type: ignore[misc]
        self._members: list[Member] | None = None
        stamps = [layer.stamp for layer in layers if layer.stamp is not None]
        self.stamps = Stamps(stamps) if len(stamps) == len(layers) else None
        self.kept = [index for index, layer in enumerate(layers) if layer.stamp is not None and layer.is_kept_together]
        self.are_kept = len(self.kept) == len(layers)
        self._stamps_of_kept: Stamps | None = None

    @property
    def members(self) -> list[Member]:
        """Their members of batches, which all of them must have."""
        if self._members is None:
            self._members = members_of(self.layers)
        return self._members

    @property
    def stamps_of_kept(self) -> Stamps:
        """The stamps of those in ``kept``."""
        if self._stamps_of_kept is None:
            stamps = [layer.stamp for layer in map(self.layers.__getitem__, self.kept) if layer.stamp is not None]
            self._stamps_of_kept = self.stamps if self.are_kept and self.stamps is not None else Stamps(stamps)
        return self._stamps_of_kept

    def release(self) -> None:
        """Release the layers."""
        self._collect([])

    def __reduce__(self) -> tuple[type[CollectedLayers], tuple[Changes]]:
        # Stamps identify parameters of this process.
        return CollectedLayers, (self._changes,)


def members_of(layers: Iterable[Layer]) -> list[Member]:
    """Return the members of the layers, in their order."""
    members = [layer.member for layer in layers]
    if None in members:
        names = ", ".join(repr(layer.name) for layer in layers if layer.member is None)
        raise RuntimeError(f"expected layers that are members of a batch, but {names} are not")
    return members  # type: ignore[return-value]
