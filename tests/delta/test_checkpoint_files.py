"""Checkpoints that cannot be read: each error says what was expected, what was found, and what to do."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from conftest import case
from delta_cases import save, save_sharded, weights

from weightflip.delta import DeltaError
from weightflip.delta.checkpoint import open_checkpoint


class NotPlain:
    pass


def refused(path, message):
    with case(path.name, message), pytest.raises(DeltaError, match=message) as raised:
        open_checkpoint(path)
    # A single readable line.
    assert "\n" not in str(raised.value)


def test_files_that_are_not_checkpoints(tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    refused(tmp_path / "text.txt", "is not a supported checkpoint; expected .*torch 1.6")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused(tmp_path / "empty.safetensors", "is not a valid safetensors file")
    whole = save(tmp_path / "whole.safetensors", {"a": weights(100)}).read_bytes()
    for count in (7, 40, len(whole) - 1):
        (tmp_path / "short.safetensors").write_bytes(whole[:count])
        refused(tmp_path / "short.safetensors", "is truncated, modified")
    torch.save(weights(4), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "legacy.pt", "load it and save it again")


def test_directories(tmp_path):
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "no .safetensors files")
    several = tmp_path / "several"
    several.mkdir()
    for name in "ab":
        save(several / f"{name}.safetensors", {name: weights(2)})
    refused(several, "a.safetensors, b.safetensors; expected one index")
    single = tmp_path / "single"
    single.mkdir()
    save(single / "model.safetensors", {"a": weights(2)})
    assert list(open_checkpoint(single).tensors) == ["a"]


def test_shards_that_do_not_fit_their_index(tmp_path):
    path = save_sharded(tmp_path / "model", [{"a": weights(2)}, {"b": weights(3)}])
    index = path / "model.safetensors.index.json"
    text = index.read_text()
    first, second = sorted(path.glob("*.safetensors"))
    for weight_map, message in (
        ({"a": first.name}, None),
        ({"a": first.name, "b": second.name, "c": second.name}, "lists tensor 'c' in model-00002.*does not contain it"),
        ({"a": second.name, "b": second.name}, "lists tensor 'a' in model-00002.*does not contain it"),
        ({"x": first.name}, "tensor 'a' is in model-00001.*belong to different checkpoints"),
        ({"a": "../model/" + first.name, "b": second.name}, "does not exist in its directory"),
        ({"a": "none.safetensors", "b": second.name}, "copy all shards"),
        ({"a": 3}, "is not an index of a sharded checkpoint"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        if message is not None:
            refused(path, message)
    for broken in ("", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(broken)
        refused(path, "is not an index of a sharded checkpoint")
    index.write_text(text)
    assert list(open_checkpoint(index).tensors) == ["a", "b"]


def test_files_of_torch_save_that_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    for content, message in (
        ({"a": NotPlain()}, r"weights_only=True.*Save only these.*Unsupported global.*NotPlain"),
        ({"a": weights(4, 4).to_sparse()}, "layout torch.sparse_coo"),
        ({"a": torch.ones(3, dtype=torch.complex128)}, "'a' of .* is of torch.complex128"),
        ({"a": torch.ones(3, dtype=torch.complex64).conj()}, "and a view"),
        ({"a.b": weights(1), "a": {"b": weights(2)}}, "two tensors named 'a.b'"),
        ({"__metadata__": weights(1)}, "which safetensors reserves"),
    ):
        torch.save(content, path)
        refused(path, message)
    torch.save({"a": weights(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, "is not a supported checkpoint")
    path.write_bytes(pickle.dumps(3))
    refused(path, "is not a supported checkpoint")


def test_a_tensor_alone_and_an_empty_checkpoint(tmp_path):
    torch.save(weights(4), tmp_path / "one.pt")
    assert list(open_checkpoint(tmp_path / "one.pt").tensors) == ["tensor"]
    assert open_checkpoint(save(tmp_path / "none.safetensors", {})).tensors == {}
