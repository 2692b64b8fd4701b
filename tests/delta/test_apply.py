"""Applying a delta recreates the new files byte for byte. Anything else fails and leaves no files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import case
from delta_cases import bits, files_below, nudged, random_bits, save, save_sharded, weights
from safetensors.torch import load_file

from weightflip.delta import DeltaError, apply, diff
from weightflip.delta.bits import OF_TORCH
from weightflip.delta.output import atomic_directory, atomic_file

DTYPES = list(OF_TORCH)


def every_dtype(seed: int) -> dict[str, torch.Tensor]:
    return {
        f"layer.{name}": random_bits(dtype, 33, 5, seed=seed + at) for at, (dtype, name) in enumerate(OF_TORCH.items())
    }


def some_checkpoint(tmp_path, name="old", seed=0):
    tensors = {"a": weights(64, 48, seed=seed), "b": weights(48, seed=seed + 1), "c": weights(8, 8, seed=7)}
    return save(tmp_path / f"{name}.safetensors", tensors, {"step": str(seed)})


def test_files_of_another_process_come_back_byte_for_byte(tmp_path):
    """Random bits of every dtype that safetensors can write from torch, including -0 and NaN payloads."""
    code = """
import sys, numpy as np, torch
from safetensors.torch import save_file
names = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64"
dtypes = [getattr(torch, name) for name in (names + " float8_e4m3fn float8_e5m2 complex64").split()]
for path, seed in ((sys.argv[1], 0), (sys.argv[2], 1)):
    random, tensors = np.random.default_rng(5), {}
    for dtype in dtypes:
        size = torch.empty((), dtype=dtype).element_size()
        data = random.integers(0, 2 if dtype is torch.bool else 256, 96 * size, np.uint8)
        if seed:
            at = np.random.default_rng(seed).integers(0, len(data), len(data) // 20)
            data[at] ^= 1
        tensors[str(dtype)] = torch.from_numpy(data).view(dtype).reshape(8, 12)
    zeros = torch.tensor([0.0, -0.0]).bfloat16()
    tensors["zeros"] = zeros.flip(0) if seed else zeros
    nans = torch.tensor([0x7FC1, -0x3E, 0x7F81], dtype=torch.int16)
    tensors["nans"] = (nans + seed).view(torch.bfloat16)
    tensors["empty"], tensors["scalar"] = torch.empty(0, 4), torch.tensor(1.5 + seed)
    save_file(tensors, path, {"seed": str(seed), "text": "\\u00e9\\n"})
"""
    old, new, delta, made = (tmp_path / f"{name}.safetensors" for name in ("old", "new", "delta", "made"))
    subprocess.run([sys.executable, "-c", code, str(old), str(new)], check=True)
    found = diff(old, new, write=delta)
    before, after = load_file(old), load_file(new)
    for tensor in found.tensors:
        assert tensor.changed == np.count_nonzero(bits(before[tensor.name]) != bits(after[tensor.name])), tensor.name
    assert {t.name: t.changed for t in found.tensors}["zeros"] == 2
    assert found.delta_nbytes == delta.stat().st_size
    apply(old, delta, made)
    assert made.read_bytes() == new.read_bytes()


def test_every_kind_of_tensor(tmp_path):
    """All dtypes, and tensors that are added, removed, reshaped, resized, converted, empty, 0-dim or identical."""
    old = {
        **every_dtype(0),
        "same": weights(10, 3),
        "gone": weights(4),
        "reshaped": weights(6, 4),
        "resized": weights(6, 4),
        "retyped": weights(6, 4),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2, dtype=torch.int64),
    }
    new = {
        **every_dtype(100),
        "same": weights(10, 3),
        "added": weights(5, 2, seed=2),
        "reshaped": nudged(weights(6, 4), 0.5).reshape(3, 8),
        "resized": weights(7, 4, seed=3),
        "retyped": weights(6, 4).float(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }
    paths = [save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in (("old", old), ("new", new))]
    delta, made = tmp_path / "delta.safetensors", tmp_path / "made.safetensors"
    found = {tensor.name: tensor for tensor in diff(*paths, write=delta).tensors}
    apply(paths[0], delta, made)
    assert made.read_bytes() == paths[1].read_bytes()
    notes = {name: tensor.note for name, tensor in found.items() if tensor.note}
    assert notes == {
        "gone": "removed",
        "added": "added",
        "reshaped": "shape was [6, 4]",
        "resized": "shape was [6, 4]",
        "retyped": "was BF16",
    }
    counts = {name: found[name].changed for name in ("same", "reshaped", "resized", "retyped", "empty", "scalar")}
    assert counts == {"same": 0, "reshaped": 12, "resized": None, "retyped": None, "empty": 0, "scalar": 1}


def test_several_chunks(tmp_path, monkeypatch):
    """Several chunks, one of them unchanged and one incomplete."""
    monkeypatch.setattr("weightflip.delta.coding.CHUNK", 1000)
    monkeypatch.setattr("weightflip.delta.container.Manifest.__new__.__defaults__", (1000,))
    old = weights(2750)
    new = torch.cat([nudged(old[:1000], 0.1), old[1000:2000], nudged(old[2000:], 0.5)])
    paths = [save(tmp_path / f"{name}.safetensors", {"w": w}) for name, w in (("old", old), ("new", new))]
    found = diff(*paths, write=tmp_path / "delta.safetensors")
    assert found.changed == 100 + 375
    apply(paths[0], tmp_path / "delta.safetensors", tmp_path / "made.safetensors")
    assert (tmp_path / "made.safetensors").read_bytes() == paths[1].read_bytes()


def test_shards_come_back_as_shards_from_any_form_of_the_old_weights(tmp_path):
    first = {"a": weights(30, 20), "b": weights(20), "c": weights(5, 5, dtype=torch.float32)}
    second = {name: nudged(tensor, 0.1) for name, tensor in first.items()}
    old = save_sharded(tmp_path / "old", [{"a": first["a"]}, {"b": first["b"], "c": first["c"]}])
    new = save_sharded(tmp_path / "new", [{"a": second["a"], "b": second["b"]}, {"c": second["c"]}])
    one, saved = save(tmp_path / "one.safetensors", first), tmp_path / "old.pt"
    torch.save(first, saved)
    delta = tmp_path / "delta.safetensors"
    diff(old, new, write=delta)
    for at, start in enumerate((old, old / "model.safetensors.index.json", one, saved)):
        made = tmp_path / f"made{at}"
        apply(start, delta, made)
        assert files_below(made) == files_below(new)
    with pytest.raises(DeltaError, match="new or empty directory"):
        apply(old, delta, made)
    with pytest.raises(DeltaError, match="new or empty directory"):
        apply(old, delta, one, force=True)


def test_files_of_torch_save(tmp_path):
    """Nested containers, tied and strided tensors become a safetensors file with the same tensors."""

    def saved(name, seed):
        base = weights(12, 10, seed=seed)
        content = {
            "model": {"w": base, "tied": base, "t": base.t(), "part": base[2:5, 1:7:2], "wide": base[0].expand(3, 10)},
            "list": [weights(3, seed=seed), {"deep": torch.nn.Parameter(weights(2, 2, seed=seed))}],
            "empty": torch.empty(0, 2),
            "scalar": torch.tensor(float(seed)),
            "step": 7,
        }
        torch.save(content, tmp_path / name)
        flat = {f"model.{key}": value for key, value in content["model"].items()}
        flat |= {"list.0": content["list"][0], "list.1.deep": content["list"][1]["deep"].detach()}
        return tmp_path / name, flat | {"empty": content["empty"], "scalar": content["scalar"]}

    (old, before), (new, after) = saved("old.pt", 0), saved("new.pt", 1)
    delta, made = tmp_path / "delta.safetensors", tmp_path / "made.safetensors"
    found = {tensor.name: tensor for tensor in diff(old, new, write=delta).tensors}
    assert found["model.tied"].same_as == "model.w"
    assert found["model.tied"].changed is None
    for name in ("model.w", "model.t", "model.part", "model.wide", "list.1.deep", "empty"):
        assert found[name].changed == np.count_nonzero(bits(before[name]) != bits(after[name])), name
    apply(old, delta, made)
    loaded = load_file(made)
    assert loaded.keys() == after.keys()
    for name, tensor in after.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert np.array_equal(bits(loaded[name]), bits(tensor)), name


def test_anything_but_the_old_weights_is_refused(tmp_path):
    old, new = some_checkpoint(tmp_path), some_checkpoint(tmp_path, "new", 3)
    delta = tmp_path / "delta.safetensors"
    diff(old, new, write=delta)
    tensors = load_file(old)
    one_bit = tensors["c"].clone()
    one_bit.view(torch.int16)[7, 7] ^= 1
    others = {
        "tensor 'c' has other weights": {**tensors, "c": one_bit},
        "tensor 'b' is missing": {name: tensors[name] for name in "ac"},
        "tensor 'd' is unexpected": {**tensors, "d": torch.ones(1)},
        r"tensor 'b' is F32 \[48\], expected BF16 \[48\]": {**tensors, "b": tensors["b"].float()},
        r"tensor 'a' is BF16 \[48, 64\], expected BF16 \[64, 48\]": {**tensors, "a": tensors["a"].reshape(48, 64)},
    }
    (tmp_path / "out").mkdir()
    for message, other in others.items():
        path = save(tmp_path / "other.safetensors", other)
        with case(message), pytest.raises(DeltaError, match=message):
            apply(path, delta, tmp_path / "out" / "made.safetensors")
        assert os.listdir(tmp_path / "out") == []
    with pytest.raises(DeltaError, match="has other weights"):
        apply(new, delta, tmp_path / "out" / "made.safetensors")
    assert os.listdir(tmp_path / "out") == []


def test_a_tensor_that_is_gone_is_checked_too(tmp_path):
    old = save(tmp_path / "old.safetensors", {"a": weights(4), "gone": weights(5)})
    other = save(tmp_path / "other.safetensors", {"a": weights(4), "gone": weights(5, seed=1)})
    new = save(tmp_path / "new.safetensors", {"a": weights(4)})
    delta = tmp_path / "delta.safetensors"
    diff(old, new, write=delta)
    with pytest.raises(DeltaError, match="'gone' has other weights"):
        apply(other, delta, tmp_path / "made.safetensors")
    assert not (tmp_path / "made.safetensors").exists()


def test_200_random_corruptions_are_refused(tmp_path):
    old, new = some_checkpoint(tmp_path), some_checkpoint(tmp_path, "new", 3)
    whole = tmp_path / "delta.safetensors"
    diff(old, new, write=whole)
    data = whole.read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    random = np.random.default_rng(0)
    damaged = tmp_path / "damaged.safetensors"

    def damage(kind: int) -> bytes:
        at = int(random.integers(len(data)))
        if kind == 0:
            return data[:at]
        if kind == 1:
            return data[:at] + bytes([data[at] ^ (1 << int(random.integers(8)))]) + data[at + 1 :]
        if kind == 2:
            return data[:at] + random.bytes(int(random.integers(1, 9))) + data[at:]
        if kind == 3:
            return data[:at] + data[at + int(random.integers(1, 9)) :]
        length = int(random.integers(1, 65))
        return data[:at] + random.bytes(length) + data[at + length :]

    for trial in range(200):
        bad = damage(trial % 5)
        if bad == data:
            continue
        damaged.write_bytes(bad)
        with case(trial), pytest.raises(DeltaError):
            apply(old, damaged, out / "made.safetensors")
        assert os.listdir(out) == []
    apply(old, whole, out / "made.safetensors")
    assert (out / "made.safetensors").read_bytes() == new.read_bytes()


def test_what_has_a_right_checksum_and_makes_other_weights_is_refused(tmp_path):
    """Modified with a correct checksum: the digests of the new tensors still detect it."""
    import xxhash

    old, new = some_checkpoint(tmp_path), some_checkpoint(tmp_path, "new", 3)
    whole = tmp_path / "delta.safetensors"
    diff(old, new, write=whole)
    data = bytearray(whole.read_bytes())
    end = json.loads(data[8:512])["data"]["data_offsets"][1]
    random = np.random.default_rng(1)
    for trial in range(40):
        bad = bytearray(data)
        bad[512 + int(random.integers(end))] ^= 1 << int(random.integers(8))
        bad[-16:] = xxhash.xxh3_128(bytes(bad[512:-16]) + bytes(bad[:512])).digest()
        whole.write_bytes(bad)
        with case(trial), pytest.raises(DeltaError, match=r"cannot be decoded|differs from the original new tensor"):
            apply(old, whole, tmp_path / "made.safetensors")
        assert not (tmp_path / "made.safetensors").exists()


def test_outputs_that_are_there(tmp_path):
    old, new = some_checkpoint(tmp_path), some_checkpoint(tmp_path, "new", 3)
    delta, made = tmp_path / "delta.safetensors", tmp_path / "made.safetensors"
    diff(old, new, write=delta)
    with pytest.raises(DeltaError, match=r"already exists.*--force"):
        diff(old, new, write=delta)
    diff(old, new, write=delta, force=True)
    made.write_text("something")
    with pytest.raises(DeltaError, match=r"already exists.*--force"):
        apply(old, delta, made)
    assert made.read_text() == "something"
    apply(old, delta, made, force=True)
    assert made.read_bytes() == new.read_bytes()
    for path in (old, new):
        with pytest.raises(DeltaError, match="to another file"):
            diff(old, new, write=path, force=True)
    with pytest.raises(DeltaError, match="is the delta itself"):
        apply(old, delta, delta, force=True)
    with pytest.raises(DeltaError, match=r"expected a file name that ends in \.safetensors, got"):
        apply(old, delta, tmp_path / "made.pt")
    with pytest.raises(DeltaError, match="got the directory"):
        diff(old, new, write=tmp_path, force=True)
    with pytest.raises(DeltaError, match="create it first"):
        apply(old, delta, tmp_path / "none" / "made.safetensors")


def test_in_place(tmp_path):
    old, new = some_checkpoint(tmp_path), some_checkpoint(tmp_path, "new", 3)
    delta = tmp_path / "delta.safetensors"
    diff(old, new, write=delta)
    with pytest.raises(DeltaError, match="already exists"):
        apply(old, delta, old)
    apply(old, delta, old, force=True)
    assert old.read_bytes() == new.read_bytes()
    before = old.read_bytes()
    with pytest.raises(DeltaError, match="has other weights"):
        apply(old, delta, old, force=True)
    assert old.read_bytes() == before


def test_interrupted_writes_leave_nothing(tmp_path):
    for write, target in ((atomic_file, tmp_path / "file"), (atomic_directory, tmp_path / "directory")):
        with pytest.raises(KeyboardInterrupt), write(target):
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == []
    with atomic_file(tmp_path / "file") as file:
        file.write(b"all")
    assert (tmp_path / "file").read_bytes() == b"all"
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode


def test_a_delta_is_a_safetensors_file_and_never_much_above_the_new_tensors(tmp_path):
    first, second = weights(300, 300, dtype=torch.float32), random_bits(torch.float32, 300, 300)
    old, new = (save(tmp_path / f"{n}.safetensors", {"w": w}) for n, w in (("old", first), ("new", second)))
    delta = tmp_path / "delta.safetensors"
    found = diff(old, new, write=delta)
    assert found.delta_nbytes < second.nbytes + 2000
    assert set(load_file(delta)) == {"data", "digests", "manifest", "checksum"}
    # Two identical checkpoints: nothing to send.
    shutil.copy(old, new)
    assert diff(old, new, write=delta, force=True).delta_nbytes < 1500
    apply(old, delta, tmp_path / "made.safetensors")
    assert (tmp_path / "made.safetensors").read_bytes() == old.read_bytes()
