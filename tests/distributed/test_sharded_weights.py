"""The sharded weights of one optimizer, in a process group of one process that holds all shards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from weightflip.distributed.shards import ShardedWeights
from weightflip.quantizers import adapt, resolve
from weightflip.quantizers.adapt import quantizer_name


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def weight(mesh, placement=Shard(0)):  # noqa: B008
    return nn.Parameter(distribute_tensor(torch.ones(8, 64), mesh, [placement]))


def update(weights: ShardedWeights, *tracked, compare=False) -> bool:
    return weights.update(tracked, quantizer_name, compare=compare, is_membership_unknown=False)


def test_unsharded_and_replicated_weights_are_not_sharded(mesh):
    weights = ShardedWeights()
    quantizer = adapt(resolve("float8_e4m3"))
    plain, replicated = nn.Parameter(torch.ones(8, 64)), weight(mesh, Replicate())
    assert not update(weights, ("plain", plain, quantizer), ("replicated", replicated, quantizer))
    assert not weights
    assert weights.rank_groups == []
    assert weights.tables == []


def test_weights_are_compared_when_they_change(mesh):
    weights, first, second = ShardedWeights(), weight(mesh), weight(mesh)
    scaled, cast = adapt(resolve("float8_e4m3")), adapt(resolve("bfloat16"))
    assert update(weights, ("first", first, scaled))
    assert not update(weights, ("first", first, scaled))
    assert update(weights, ("first", first, scaled), compare=True)
    assert update(weights, ("first", first, scaled), ("second", second, cast))
    assert list(weights) == ["first", "second"]
    # A cast needs no statistic of the whole weight.
    assert [names for _, names in weights.tables] == [["first"]]
    ((group, members),) = weights.rank_groups
    assert group == ((0,), "cpu")
    assert [member.weights for member in members] == [8 * 64, 8 * 64]


def test_a_weight_that_is_no_longer_tracked_remains_in_the_sums(mesh):
    weights, first, second = ShardedWeights(), weight(mesh), weight(mesh)
    quantizer = adapt(resolve("float8_e4m3"))
    update(weights, ("first", first, quantizer), ("second", second, quantizer))
    assert update(weights, ("second", second, quantizer))
    assert list(weights) == ["first", "second"]
    assert [names for _, names in weights.tables] == [["second"]]


def test_a_weight_that_cannot_be_encoded_by_shards_is_refused_with_the_reason(mesh):
    weights, first, second = ShardedWeights(), weight(mesh), weight(mesh)
    silent = SimpleNamespace(encode=lambda weight: None)
    update(weights, ("first", first, adapt(silent)), ("second", second, adapt(resolve("float8_e4m3"))))
    assert list(weights) == ["second"]
    assert list(weights.rejected) == ["first"]
    assert "does not say how much of a weight one code depends on" in weights.rejected["first"]
    assert weights.reported_elsewhere == set()
