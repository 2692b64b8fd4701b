"""Wrong calls raise understandable errors, and near misses are accepted."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from weightflip import (
    Alert,
    BitStallDetector,
    FlipTrackingOptimizer,
    WeightFlipTracker,
    compute_flip_rate,
    compute_stall_ratio,
    decode,
    encode,
    quantize,
    track_flips,
)
from weightflip.formats import E4M3
from weightflip.quantizers import resolve
from weightflip.session.options import Options

W = torch.ones(2, 32)


def wrapped(**options):
    model = nn.Linear(32, 2)
    return FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, **{"sinks": [], **options})


def hooked(**options):
    model = nn.Linear(32, 2)
    return track_flips(torch.optim.SGD(model.parameters(), 0.1), model, **{"sinks": [], **options})


def snapshot(name, weight, **options):
    WeightFlipTracker().snapshot_pre_step(name, weight, "e3m4", **options)


def counted(name, weight):
    tracker = WeightFlipTracker()
    tracker.snapshot_pre_step("x", W, "e3m4")
    tracker.compute_flips_post_step(name, weight, "e3m4")


def before(weights):
    WeightFlipTracker().before_step(weights)


class Odd:
    """Neither a string nor a number."""


# Wrong options of both forms, and the errors.
OPTIONS = [
    ({"include": []}, ValueError, r"include= is empty, so nothing would be tracked; leave it out"),
    ({"include": 5}, TypeError, r"include= must be a glob over names or a sequence of globs.*got int 5"),
    ({"include": {"weight": 1}}, TypeError, r"include= must be a glob .*got \{'weight': 1\}"),
    ({"include": b"weight"}, TypeError, r"include= must be a glob .*got bytes b'weight'"),
    ({"include": ["weight", 3]}, TypeError, r"include= must be a glob .*got \['weight', 3\]"),
    ({"exclude": nn.Linear}, TypeError, r"exclude= must be a glob .*got the class Linear"),
    ({"exclude": nn.Linear(2, 2)}, TypeError, r"exclude= must be a glob .*got Linear"),
    ({"log_dir": 5, "sinks": None}, TypeError, r"log_dir= must be a path, as a string or pathlib.Path.*got int 5"),
    ({"log_dir": b"runs", "sinks": None}, TypeError, r"log_dir= must be a path.*got bytes b'runs'"),
    ({"log_dir": "a\0b", "sinks": None}, ValueError, r"log_dir= must be a path without null characters, got 'a\\x00b'"),
    (
        {"sinks": ["a\0b.jsonl"]},
        ValueError,
        r"a path in sinks= must be a path without null characters, got 'a\\x00b.jsonl'",
    ),
    ({"groups": 5}, TypeError, r"groups= must be 'type', 'blocks', or a mapping .*got 5"),
    ({"groups": {"a": 5}}, TypeError, r"groups\['a'\]= must be a glob .*got int 5"),
    ({"groups": {5: "*"}}, TypeError, r"groups= must be 'type', 'blocks', or a mapping"),
    ({"groups": "types"}, TypeError, r"groups= must be 'type', 'blocks', or a mapping .*got 'types'"),
    ({"quantizer": 5}, TypeError, r"expected a quantizer name .*got int"),
    ({"quantizer": None}, TypeError, r"expected a quantizer name .*got NoneType"),
    ({"quantizer": {5: "e3m4"}}, TypeError, r"quantizer= must map globs over names.*got the key int 5"),
    ({"quantizer": {}}, ValueError, r"quantizer= must map globs .*got an empty mapping"),
    ({"quantizer": []}, ValueError, r"a list of different quantizers, got \[\]"),
    ({"quantizer": "fp8"}, ValueError, r"unknown quantizer 'fp8'; did you mean 'float8_e4m3' or 'float8_e5m2'\?"),
    ({"quantizer": "mxfp8"}, ValueError, r"unknown quantizer 'mxfp8'; did you mean 'mxfp8_e4m3' or 'mxfp8_e5m2'\?"),
    ({"quantizer": "mxfp8:rceil"}, ValueError, r"unknown quantizer 'mxfp8:rceil'; did you mean 'mxfp8_e4m3' or"),
    ({"quantizer": "mxfp6"}, ValueError, r"unknown quantizer 'mxfp6'; did you mean 'mxfp6_e2m3' or 'mxfp6_e3m2'\?"),
    ({"quantizer": "fp4"}, ValueError, r"unknown quantizer 'fp4'; did you mean 'mxfp4' or 'nvfp4'\?"),
    ({"quantizer": "float32"}, ValueError, r"unknown quantizer 'float32'; did you mean 'native'\?"),
    ({"quantizer": torch.float32}, ValueError, r"no single format belongs to torch.float32.*torch.bfloat16.*'native'"),
    ({"quantizer": torch.uint8}, ValueError, r"no single format belongs to torch.uint8"),
    ({"quantizer": torch.float8_e4m3fnuz}, ValueError, r"no single format belongs to torch.float8_e4m3fnuz"),
    ({"metrics": 5}, ValueError, r"metrics= must be a sequence that contains 'flips'.*got 5"),
    ({"metrics": "flips"}, ValueError, r"metrics= must be a sequence that contains 'flips'.*got 'flips'"),
    ({"metrics": ["flip"]}, ValueError, r"did you mean 'flips'\?.*got \['flip'\]"),
    ({"metrics": ["flips", "stall"]}, ValueError, r"unknown group 'stall' in metrics=; did you mean 'stalls'\?"),
    ({"metrics": ["flips", "Travel"]}, ValueError, r"unknown group 'Travel' in metrics=; did you mean 'travel'\?"),
    ({"metrics": ["flips", ["travel"]]}, ValueError, r"metrics= must be a sequence .*got \['flips', \['travel'\]\]"),
    ({"metrics": {"flips": 1, "travel": 1.5}}, ValueError, r"metrics=\{'travel': n\}.*integer.*got 1.5"),
    ({"metrics": {"flips": 1, "travel": True}}, ValueError, r"metrics=\{'travel': n\}.*integer.*got True"),
    ({"oscillation_ema": "x", "metrics": ["flips", "oscillation"]}, ValueError, r"oscillation_ema= .*got 'x'"),
    ({"oscillation_ema": (), "metrics": ["flips", "oscillation"]}, ValueError, r"oscillation_ema= .*got \(\)"),
    ({"oscillation_ema": True, "metrics": ["flips", "oscillation"]}, ValueError, r"oscillation_ema= .*got True"),
    ({"oscillation_ema": (0.1, "x"), "metrics": ["flips", "oscillation"]}, ValueError, r"threshold .*got 'x'"),
    ({"backend": "Numba"}, ValueError, r"backend= is one of .*got 'Numba'; did you mean 'numba'\?"),
    ({"backend": 5}, ValueError, r"backend= is one of .*got 5"),
    ({"backend": np.zeros(3)}, ValueError, r"backend= is one of .*got array"),
    ({"low_memory": "no"}, TypeError, r"low_memory= must be True or False, got 'no'"),
    ({"low_memory": None}, TypeError, r"low_memory= must be True or False, got None"),
    ({"fresh_snapshots": 1}, TypeError, r"fresh_snapshots= must be True or False, got 1"),
    ({"log_every": "10"}, ValueError, r"log_every= must be an integer of at least 1, got '10'; for no output"),
    ({"log_every": 2.0}, ValueError, r"log_every= must be an integer of at least 1, got 2.0"),
    ({"log_every": True}, ValueError, r"log_every= must be an integer of at least 1, got True"),
    ({"log_every": np.bool_(True)}, ValueError, r"log_every= must be an integer of at least 1"),
    ({"log_every": torch.tensor(2.0)}, ValueError, r"log_every= must be an integer of at least 1, got tensor"),
    ({"track_every": None}, ValueError, r"track_every= must be an integer of at least 1, got None"),
    ({"start_step": -1}, ValueError, r"start_step= must be an integer of at least 0, got -1"),
    ({"start_step": 5, "end_step": 5}, ValueError, r"end_step= must be an integer of at least 6, got 5"),
    ({"end_step": Odd}, ValueError, r"end_step= must be an integer of at least 1, got <class"),
    ({"sinks": 5}, TypeError, r"sinks= must be a list, got int"),
    ({"sinks": [b"x.jsonl"]}, TypeError, r"sinks= expects .*got bytes"),
    ({"sinks": [None]}, TypeError, r"sinks= expects .*got NoneType"),
    ({"alerts": 5}, TypeError, r"alerts= must be a list of rules.*got int 5"),
    ({"alerts": "stall_ratio > 1"}, TypeError, r"alerts= must be a list, got str; put it in brackets"),
    ({"alerts": [5]}, TypeError, r"a rule in alerts= must be a string such as .*got int"),
    (
        {"alerts": {"stall_ratio > 1": print}},
        TypeError,
        r"alerts= must be a list of rules.*got \{.*Alert\(rule, callback=",
    ),
    ({"alerts": ["stal_ratio > 1"]}, ValueError, r"about 'stal_ratio'.*did you mean 'stall_ratio'\?"),
    ({"layer_values": 5}, TypeError, r"layer_values= must be 'all' or a sequence of value names.*got int 5"),
    (
        {"layer_values": ["flip_rat"]},
        ValueError,
        r"unknown value 'flip_rat' in layer_values=; did you mean 'flip_rate'\?",
    ),
    ({"layer_values": "every"}, ValueError, r"unknown value 'every' in layer_values=; .*'all'.*flip_rate"),
    ({"layer_values": ["travel_ratio"]}, ValueError, r"unknown value 'travel_ratio'.*metrics= adds more"),
    ({"inclde": "*"}, TypeError, r"got an unexpected keyword argument 'inclde'; did you mean 'include='\?"),
    ({"everything": 5}, TypeError, r"got an unexpected keyword argument 'everything'; expected .*quantizer.*backend"),
]


@pytest.mark.parametrize("call", [wrapped, hooked])
def test_options(call):
    for options, error, message in OPTIONS:
        with pytest.raises(error) as caught:
            call(**options)
        assert type(caught.value) is error, options
        assert re.search(message, str(caught.value), re.DOTALL), (options, str(caught.value))


CALLS = [
    (
        lambda: setattr(WeightFlipTracker(), "track_every", 0),
        ValueError,
        "track_every= must be an integer of at least 1",
    ),
    (
        lambda: setattr(WeightFlipTracker(), "start_step", -1),
        ValueError,
        "start_step= must be an integer of at least 0",
    ),
    (lambda: setattr(WeightFlipTracker(), "end_step", "x"), ValueError, "end_step= must be an integer .*got 'x'"),
    (
        lambda: encode([1.0], "e3m4"),
        TypeError,
        r"weight must be a torch.Tensor, got \[1.0\]; convert it with torch.tensor",
    ),
    (lambda: encode(np.ones(3), "e3m4"), TypeError, r"weight must be a torch.Tensor, got ndarray; .*torch.from_numpy"),
    (lambda: encode("e3m4", W), TypeError, r"weight must be a torch.Tensor, got str 'e3m4'"),
    (lambda: encode(nn.Linear(2, 2), "e3m4"), TypeError, r"weight must be a torch.Tensor, got Linear; pass its weight"),
    (lambda: encode(None, "e3m4"), TypeError, r"weight must be a torch.Tensor, got NoneType None"),
    (lambda: encode(W, W), TypeError, r"expected a quantizer name .*got Tensor"),
    (lambda: encode(W, "e3m4", "big"), TypeError, r"scale= must be a number or a torch.Tensor, got str 'big'"),
    (
        lambda: encode(W, "e3m4", [1.0]),
        TypeError,
        r"scale= must be a number or a torch.Tensor, got \[1.0\]; .*torch.tensor",
    ),
    (lambda: encode(W, "e3m4", True), TypeError, r"scale= must be a number or a torch.Tensor, got bool True"),
    (lambda: encode(W, "e3m4", 1j), TypeError, r"scale= must be a number or a torch.Tensor, got complex"),
    (lambda: encode(W, "e3m4", np.float32(-1)), ValueError, r"scale= .*positive and finite, .*got -1.0"),
    (
        lambda: encode(W, "e3m4", torch.ones(1) * 1j),
        TypeError,
        r"scale= must be a number or a .*got a complex64 tensor",
    ),
    (lambda: encode(W, "e3m4", 10**400), ValueError, r"scale= .*positive and finite, .*got inf"),
    (
        lambda: encode(W.to_sparse(), "e3m4"),
        TypeError,
        r"weight must be a dense tensor, got .*sparse_coo; .*to_dense\(\)",
    ),
    (lambda: quantize(W.to_sparse(), "int4"), TypeError, r"weight must be a dense tensor, got .*sparse_coo"),
    (lambda: encode(W, E4M3, Odd()), TypeError, r"scale= must be a number or a torch.Tensor, got Odd"),
    (lambda: quantize([1.0], "e3m4"), TypeError, r"weight must be a torch.Tensor, got \[1.0\]"),
    (
        lambda: decode(W, "e3m4"),
        TypeError,
        r"codes are the result of encode\(\), got Tensor; .*Codes\(ordinals, scale\)",
    ),
    (lambda: decode(5), TypeError, r"codes are the result of encode\(\), got int 5"),
    (lambda: compute_flip_rate([1.0], [1.0]), TypeError, r"prev_quantized must be a torch.Tensor, got \[1.0\]"),
    (lambda: compute_flip_rate(W, np.ones((2, 32))), TypeError, r"curr_quantized must be a torch.Tensor, got ndarray"),
    (lambda: compute_stall_ratio("a", 5), TypeError, r"flips must be a number, got str 'a'"),
    (lambda: compute_stall_ratio(5, None), TypeError, r"updates must be a number, got NoneType None"),
    (lambda: BitStallDetector(5), TypeError, r"expected a quantizer name .*got int"),
    (lambda: BitStallDetector("fp16").update([1.0], W), TypeError, r"weight must be a torch.Tensor, got \[1.0\]"),
    (lambda: BitStallDetector("fp16").update(W, 0.1), TypeError, r"update must be a torch.Tensor, got float 0.1"),
    (lambda: Alert("stall_ratio > 1", layers=5), TypeError, r"layers= must be a glob .*got int 5"),
    (
        lambda: Alert("stall_ratio > 1", callback=5),
        TypeError,
        r"callback= must be a function of an AlertEvent.*got int 5",
    ),
    (lambda: WeightFlipTracker(low_memory="no"), TypeError, r"low_memory= must be True or False, got 'no'"),
    (lambda: WeightFlipTracker(track_every=2.5), ValueError, r"track_every= must be an integer"),
    (lambda: snapshot(W, "x"), TypeError, r"weight must be a torch.Tensor, got str 'x'"),
    (lambda: snapshot("x", [1.0]), TypeError, r"weight must be a torch.Tensor, got \[1.0\]; .*torch.tensor"),
    (lambda: snapshot("x", W.to_sparse()), TypeError, r"weight must be a dense tensor, got .*sparse_coo"),
    (lambda: snapshot("x", W, grad=[1]), TypeError, r"grad must be a torch.Tensor, got \[1\]; .*torch.tensor"),
    (lambda: counted(W, "x"), TypeError, r"weight must be a torch.Tensor, got str 'x'"),
    (lambda: counted("x", [1.0]), TypeError, r"weight must be a torch.Tensor, got \[1.0\]"),
    (lambda: before(5), TypeError, r"weights are TrackedWeight objects, got int 5; make .*TrackedWeight\(name, "),
    (lambda: before(nn.Linear(2, 2).parameters()), TypeError, r"weights are TrackedWeight objects, got Parameter"),
    (lambda: before([("x", W)]), TypeError, r"weights are TrackedWeight objects, got .*'x'"),
]


def test_functions():
    for call, error, message in CALLS:
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error, message
        assert re.search(message, str(caught.value), re.DOTALL), (message, str(caught.value))


def test_paths(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.csv").mkdir()
    for name in ("x.jsonl", "x.csv"):
        with pytest.raises(
            IsADirectoryError,
            match=rf"expected a file in sinks=, got the directory .*{name}'; name a file in it, such as",
        ):
            wrapped(sinks=[tmp_path / name])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"is not writable.*choose another directory"):
        wrapped(sinks=None, log_dir=tmp_path / "file")


def test_whole_numbers_of_any_type():
    for two in (np.int64(2), np.uint8(2), torch.tensor(2)):
        optimizer = wrapped(
            log_every=two, track_every=two, start_step=two, end_step=np.int64(9), metrics={"flips": 1, "travel": two}
        )
        tracker = optimizer.tracker
        assert (tracker.track_every, tracker.start_step, tracker.end_step) == (2, 2, 9)
        assert {type(n) for n in (tracker.track_every, tracker.start_step, tracker.end_step)} == {int}
        assert optimizer.info.settings["log_every"] == "2"
    assert wrapped(low_memory=np.bool_(True), fresh_snapshots=np.True_).tracker.low_memory is True
    assert wrapped(oscillation_ema=np.float32(0.5), metrics=["flips", "oscillation"]).tracker is not None


def test_globs_from_an_iterator():
    """Globs are matched more than once, so an iterator must be kept."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        include=(glob for glob in ["0.weight"]),
        groups={"first": (glob for glob in ["0.*"])},
        alerts=(rule for rule in ["flip_rate < 0"]),
        sinks=[],
    )
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    assert list(optimizer.info.tracked) == ["0.weight"]
    assert optimizer.info.groups == {"first": ("0.weight",)}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (torch.float8_e4m3fn, "float8_e4m3"),
        (torch.float8_e5m2, "float8_e5m2"),
        (torch.int8, "int8"),
        (torch.bfloat16, "bfloat16"),
        (torch.half, "float16"),
        ("float8_e4m3fn", "float8_e4m3"),
        ("Float8_E4M3FN:row:pow2", "float8_e4m3:row:pow2"),
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        ("e4m3fn", "e4m3"),
        ("e4m3fn:none", "e4m3:none"),
    ],
)
def test_other_names_for_one_format(given, name):
    assert str(resolve(given)) == name
    torch.manual_seed(0)
    weight = torch.randn(4, 32)
    assert torch.equal(encode(weight, given).ordinals, encode(weight, name).ordinals)
    assert {row[-1] for row in wrapped(quantizer=given).info.tracked.values()} == {name}
    with pytest.raises(ValueError, match="a list of different quantizers"):
        wrapped(quantizer=[given, name])


def test_the_options_are_those_of_the_signature():
    parameters = list(inspect.signature(FlipTrackingOptimizer).parameters.values())
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {field.name: field.default for field in fields(Options)}
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters), "help() and the documents list only what is accepted"
    with pytest.raises(AttributeError):
        Options().include = "x"
    assert copy.deepcopy(Options(include="0.*")) == Options(include=["0.*"])
