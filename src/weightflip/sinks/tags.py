"""Under which tag each number of a record is shown, wherever there are tags."""

from __future__ import annotations

from weightflip.records import MODEL_TAGS, FlipRecord, shown, variant

HISTOGRAMS_OF_ALL = 64


def tagged_values(record: FlipRecord) -> dict[str, float]:
    """The numbers that a logging point adds, by tag: the model's, then the layers', then the groups'.

    A number ``<value>`` is ``flips/<value>`` for the model, ``<value>/<layer>`` for a layer and
    ``<value>_by_group/<group>`` for a group of layers. What does not print in a name is escaped.
    """
    tagged = {}
    for quantizer, model in record.models.items():
        for name, value in model.news.items():
            tag = MODEL_TAGS.get(name, f"flips/{name}")
            tagged[variant(tag, quantizer) if quantizer else tag] = value
    for layer in record.layers:
        tagged.update({f"{name}/{layer.name}": value for name, value in layer.news.items()})
        if layer.nonfinite and layer.window.weight_steps:
            tagged[f"nonfinite_weights/{layer.name}"] = float(layer.nonfinite)
    for group, summed in record.group_sums.items():
        tagged.update({f"{name}_by_group/{group}": value for name, value in summed.news.items()})
    return {shown(tag): value for tag, value in tagged.items()}


def has_histograms(point: int) -> bool:
    """Whether the n-th logging point, from 1, is one at which histograms are written.

    The first 64, then 32 in each doubling: a histogram takes as much room as all the scalars of a layer, and
    TensorBoard shows no more than 500 of a tag.
    """
    return point <= HISTOGRAMS_OF_ALL or point % (1 << (point.bit_length() - HISTOGRAMS_OF_ALL.bit_length() + 1)) == 0
