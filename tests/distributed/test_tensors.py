"""The part of a tensor that is on this process."""

from __future__ import annotations

import weakref

import torch

from weightflip.distributed.tensors import Identity, is_dtensor, local, local_gradient


def test_an_ordinary_tensor_is_returned_as_it_is():
    weight, gradient = torch.nn.Parameter(torch.ones(2, 2)), torch.ones(2, 2)
    assert not is_dtensor(weight)
    assert local(weight) is weight
    assert local_gradient(gradient, weight) is gradient


def test_an_identity_belongs_to_one_tensor_and_does_not_hold_it():
    one, equal = torch.ones(4), torch.ones(4)
    known = Identity(one)
    assert known == Identity(one)
    assert hash(known) == hash(Identity(one))
    assert known != Identity(equal)
    assert known != Identity(one.view(4))
    held = weakref.ref(one)
    del one
    assert held() is None
    # The memory of the tensor, and with it its id, may be reused.
    assert all(known != Identity(torch.ones(4)) for _ in range(100))
