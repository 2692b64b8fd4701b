"""Summaries of many layers: the blocks of well-known models, the spread, and the outliers."""

from __future__ import annotations

import numpy as np
import pytest

from weightflip.overview import blocks_of, outliers, spread
from weightflip.records import Quotient


def named(prefix: str, count: int, parts: str) -> list[str]:
    return [f"{prefix}.{i}.{part}.weight" for i in range(count) for part in parts.split()]


LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
GPT2 = "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"
VIT = "attn.qkv attn.proj mlp.fc1 mlp.fc2"
MODELS = {
    "llama": (
        ["model.embed_tokens.weight", *named("model.layers", 32, LLAMA), "lm_head.weight"],
        ["model.embed_tokens", *(f"model.layers.{i}" for i in range(32)), "lm_head"],
    ),
    "gpt2": (
        ["transformer.wte.weight", "transformer.wpe.weight", *named("transformer.h", 12, GPT2)],
        ["transformer.wte", "transformer.wpe", *(f"transformer.h.{i}" for i in range(12))],
    ),
    # fc1 and fc2, mlp.0 and mlp.2 have numbers too, but are not blocks of several weights.
    "vit": (named("blocks", 12, VIT), [f"blocks.{i}" for i in range(12)]),
    "bytes_gpt": (
        named("blocks", 4, "attention.qkv attention.out mlp.0 mlp.2"),
        [f"blocks.{i}" for i in range(4)],
    ),
    "cross-attention": (
        named("blocks", 8, "attn.q attn.k attn.v cross.q cross.k cross.v mlp.fc1 mlp.fc2"),
        [f"blocks.{i}" for i in range(8)],
    ),
    # Few blocks with many weights are split into their parts.
    "shallow": (
        named("blocks", 4, "attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down mlp.a mlp.b"),
        [f"blocks.{i}.{part}" for i in range(4) for part in ("attn", "mlp")],
    ),
    # The stages of a ResNet are too few to be informative; their blocks are not.
    "resnet": (
        ["conv1.weight"]
        + [f"layer{s}.{b}.conv{c}.weight" for s in range(1, 5) for b in range(4) for c in range(1, 4)]
        + ["fc.weight"],
        ["conv1", *(f"layer{s}.{b}" for s in range(1, 5) for b in range(4)), "fc"],
    ),
    "swin": (
        [
            name
            for s, blocks in enumerate((2, 2, 6, 2))
            for name in [*named(f"layers.{s}.blocks", blocks, VIT), f"layers.{s}.downsample.reduction.weight"]
        ],
        [
            name
            for s, blocks in enumerate((2, 2, 6, 2))
            for name in [*(f"layers.{s}.blocks.{b}" for b in range(blocks)), f"layers.{s} (rest)"]
        ],
    ),
    # 8 experts in each of 32 blocks are too many to list.
    "mixtral": (
        named("model.layers", 32, " ".join(f"moe.experts.{e}.w{w}" for e in range(8) for w in range(1, 4)) + " attn.q"),
        [f"model.layers.{i}" for i in range(32)],
    ),
    "no module": (["token", *named("h", 2, GPT2)], ["token", "h.0", "h.1"]),
}


@pytest.mark.parametrize("model", MODELS)
def test_blocks_of_models(model):
    names, expected = MODELS[model]
    found = blocks_of(names)
    assert list(found) == expected
    # Each weight is in exactly one block, so that the blocks add up to the model.
    assert sorted(name for members in found.values() for name in members) == sorted(names)
    for block, members in found.items():
        assert all(name.startswith(block.removesuffix(" (rest)")) for name in members)


def test_nothing_repeats():
    assert blocks_of([]) == {}
    assert blocks_of([f"{i}.weight" for i in range(0, 80, 2)]) == {}, "a block of one weight is that weight"
    assert blocks_of(["layers.0.q.weight", "layers.0.k.weight"]) == {}
    assert blocks_of([f"{part}.weight" for part in "abcdefgh"]) == {}


def test_many_weights_outside_of_blocks_are_few_groups():
    names = [*named("h", 12, GPT2), *(f"vision.stem_{part}.weight" for part in "abcdefghijklmnopqrst")]
    assert list(blocks_of(names)) == [*(f"h.{i}" for i in range(12)), "vision"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 30, 171])
def test_spread_is_that_of_numpy(count):
    values = np.random.default_rng(count).normal(size=count)
    expected = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    assert list(spread(values.tolist())) == pytest.approx(expected.tolist())
    assert spread([]) is None


def rates(values, weights=100_000):
    return {f"layer{i}": Quotient(round(value * weights), weights) for i, value in enumerate(values)}


def test_layers_that_stand_out():
    even = np.random.default_rng(0).uniform(0.08, 0.12, 170).tolist()
    assert outliers(rates(even)) == []
    assert outliers(rates([*even, 0.00002, 0.6])) == ["layer170", "layer171"], "the farthest first"
    assert outliers(rates([*even, 0.0])) == ["layer170"]
    # Near 1, the distance to 1 counts, as for stall ratios.
    assert outliers(rates([*(1 - x / 100 for x in even), 0.95])) == ["layer170"]
    # Twice the rate is not an outlier, however close together the others are.
    assert outliers(rates([*[0.1] * 170, 0.15])) == []
    assert outliers(rates([*[0.1] * 170, 0.3])) == ["layer170"]


def test_few_weights_or_few_layers_do_not_stand_out():
    assert outliers(rates([0.1, 0.1, 0.1, 0.0])) == [], "of so few layers none is far from the rest"
    even = [0.02] * 40
    # One step flips none of 16 weights: that may be chance.
    assert outliers({**rates(even), "small": Quotient(0, 16)}) == []
    assert outliers({**rates(even), "large": Quotient(0, 100_000)}) == ["large"]
    assert outliers({**rates(even), "nothing": Quotient(0, 0)}) == []
