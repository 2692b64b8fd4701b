"""The attributes of quantizers, and the defaults of objects that do not have them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weightflip import Codes, decode
from weightflip.counting.layer import TrackedWeight
from weightflip.quantizers import BaseQuantizer, adapt, quantizer_names, resolve
from weightflip.quantizers.floatx import FloatxQuantizer

ASKED = ("is_active", "has_state", "scope", "group", "reduction", "batchable", "encodes", "has_plain", "has_statistic")
SILENT = (True, False, None, None, "max", False, None, False, False)


class Sign:
    def encode(self, weight):
        return Codes(torch.sign(weight).to(torch.int8))


class Declared(BaseQuantizer):
    name = "declared"

    def encode(self, weight):
        return Sign().encode(weight)


def answers(quantizer):
    return tuple(getattr(quantizer, name) for name in ASKED)


@pytest.mark.parametrize("make", [Sign, Declared, lambda: torch.sign], ids=["object", "derived", "function"])
def test_missing_attributes_have_defaults(make):
    quantizer, weight = adapt(make()), torch.tensor([0.5, -2.0])
    assert answers(quantizer) == SILENT
    assert quantizer.encoder is quantizer
    assert quantizer.plain(weight) is weight
    assert torch.equal(quantizer.encode(weight).ordinals.sign(), torch.tensor([1, -1]))
    with pytest.raises(NotImplementedError):
        BaseQuantizer.statistic(quantizer, weight)
    if make is not Declared:
        assert answers(copy.deepcopy(quantizer)) == SILENT


def test_attributes_of_an_object_are_read_each_time():
    said = SimpleNamespace(encode=Sign().encode, plain=lambda weight: weight + 1, statistic=torch.amax)
    said.__dict__.update(is_active=1, has_state=[], scope="group", group=4, reduction="mean", encodes=Sign(), name="me")
    quantizer = adapt(said)
    assert answers(quantizer)[:6] == (True, False, "group", 4, "mean", False)
    assert (quantizer.has_plain, quantizer.has_statistic, quantizer.name) == (True, True, "me")
    assert quantizer.encoder.name == "Sign"
    assert quantizer.plain(torch.ones(1)).item() == 2.0
    assert quantizer.statistic(torch.arange(3.0)).item() == 2.0
    said.is_active, said.has_state, said.scope = False, True, "element"
    assert (quantizer.is_active, quantizer.has_state, quantizer.scope) == (False, True, "element")


def test_a_quantizer_is_returned_as_it_is():
    for name in quantizer_names():
        quantizer = resolve(name)
        assert adapt(quantizer) is quantizer
        assert (quantizer.is_active, quantizer.has_state, quantizer.encodes, quantizer.batchable) == (
            True,
            False,
            None,
            True,
        )


def test_quantizers_that_change_between_steps_are_not_batched():
    class Switched(FloatxQuantizer):
        @property
        def is_active(self):
            return True

    class SwitchedByHand(FloatxQuantizer):
        def __init__(self, element):
            super().__init__(element)
            self.is_active = True

    class Plainer(FloatxQuantizer):
        pass

    element = resolve("e3m4").format
    for cls, batchable in ((Switched, False), (SwitchedByHand, False), (Plainer, True)):
        assert TrackedWeight("w", nn.Parameter(torch.ones(2, 2)), cls(element)).is_batchable is batchable
    assert not TrackedWeight("w", nn.Parameter(torch.ones(2, 2)), Sign()).is_batchable


def test_decoding_without_decode_raises():
    codes = Codes(torch.ones(2, dtype=torch.int8), None, Sign())
    with pytest.raises(ValueError, match=r"Sign.* only encodes: it has no decode\(codes\)"):
        decode(codes)
    other = SimpleNamespace(encode=None, decode=lambda codes: codes.ordinals * 2.0)
    assert decode(Codes(codes.ordinals, None, other)).tolist() == [2.0, 2.0]
