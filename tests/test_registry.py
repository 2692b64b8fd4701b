"""Quantizers by name, and the messages for names that do not exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weightflip.quantizers
from weightflip import Codes, Quantizer, encode, formats, quantizer_names
from weightflip.formats import E3M4, E4M3, E5M2
from weightflip.quantizers import ElementwiseQuantizer, register, resolve
from weightflip.quantizers import registry as names
from weightflip.quantizers.adapt import FunctionQuantizer
from weightflip.quantizers.float8 import Float8Quantizer
from weightflip.quantizers.floatx import FloatxQuantizer
from weightflip.quantizers.native import CastQuantizer, NativeQuantizer


class Sign:
    """The smallest quantizer: an object with ``encode``."""

    def encode(self, weight: torch.Tensor) -> Codes:
        return Codes(weight.sign().to(torch.int8))

    def __str__(self) -> str:
        return "sign"


@pytest.fixture
def registry(monkeypatch):
    """A temporary registry, so that what a test registers is removed afterward."""
    monkeypatch.setattr(names, "_registry", list(names._registry))
    return names._registry


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(
    ("options", "granularity", "pow2"),
    [
        ("", "tensor", False),
        (":row", "row", False),
        (":pow2", "tensor", True),
        (":row:pow2", "row", True),
        (":pow2:row", "row", True),
    ],
)
def test_float8_names(element, options, granularity, pow2):
    quantizer = resolve(f"float8_{element.name}{options}")
    assert type(quantizer) is Float8Quantizer
    assert (quantizer.format, quantizer.granularity, quantizer.round_scales_to_power_of_2) == (
        element,
        granularity,
        pow2,
    )


@pytest.mark.parametrize("element", ["e0m7", "e3m4", "e4m3", "e2m1", "e5m10", "e8m7", "e15m0", "e0m1", "e1m0"])
@pytest.mark.parametrize(("options", "granularity"), [("", "tensor"), (":row", "row"), (":none", "none")])
def test_element_names(element, options, granularity):
    quantizer = resolve(element + options)
    assert type(quantizer) is FloatxQuantizer
    assert (quantizer.format, quantizer.granularity) == (formats.exmy(element), granularity)


def test_native_and_cast_names():
    assert type(resolve("native")) is NativeQuantizer
    for dtype in (torch.bfloat16, torch.float16):
        quantizer = resolve(str(dtype).removeprefix("torch."))
        assert type(quantizer) is CastQuantizer
        assert quantizer.dtype is dtype


@pytest.mark.parametrize(
    "name",
    ["float8_e4m3", "float8_e5m2:row:pow2", "e3m4", "e3m4:row", "e3m4:none", "e15m0", "native", "bfloat16", "float16"],
)
def test_a_quantizer_has_the_name_that_selects_it(name):
    assert str(resolve(name)) == name
    assert str(resolve(str(resolve(name)))) == name


def test_names_in_any_case_and_order():
    assert str(resolve("FLOAT8_E4M3:Row:POW2")) == "float8_e4m3:row:pow2"
    assert str(resolve("float8_e4m3:pow2:row")) == "float8_e4m3:row:pow2"
    assert str(resolve("E3M4:ROW")) == "e3m4:row"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("float8_e4m4", "float8_e4m3"),
        ("float8-e4m3", "float8_e4m3"),
        ("float8_e4m3fnu", "float8_e4m3"),
        ("float8_e5m3:row", "float8_e5m2"),
        ("bfloat", "bfloat16"),
        ("floot16", "float16"),
        ("nativ", "native"),
    ],
)
def test_unknown_names_with_a_hint(name, meant):
    with pytest.raises(ValueError, match=f"^unknown quantizer '{re.escape(name)}'; did you mean '{meant}'\\?") as error:
        resolve(name)
    for known in quantizer_names():
        assert known in str(error.value)


@pytest.mark.parametrize("name", ["", "quarter", "xyzzy:row", "auto!"])
def test_unknown_names_without_a_hint(name):
    with pytest.raises(ValueError, match=f"^unknown quantizer '{name}'; Expected one of") as error:
        resolve(name)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("float8_e4m3:col", "col"),
        ("float8_e4m3:row:pow3", "row:pow3"),
        ("float8_e4m3:none", "none"),
        ("float8_e4m3:row:row", "row:row"),
        ("float8_e5m2:pow2:row:pow2", "pow2:row:pow2"),
        ("float8_e5m2:", ""),
        ("e3m4:pow2", "pow2"),
        ("e3m4:tensor", "tensor"),
        ("e3m4:row:row", "row:row"),
        ("e3m4:row:none", "row:none"),
        ("e3m4:", ""),
        ("native:row", "row"),
        ("bfloat16:row", "row"),
        ("float16:pow2", "pow2"),
    ],
)
def test_unknown_and_repeated_options(name, got):
    family = name.partition(":")[0]
    with pytest.raises(ValueError, match=rf"^quantizer '{family}' (takes|has) .*, got '{got}'$"):
        resolve(name)


@pytest.mark.parametrize("name", ["e0m0", "e9m9", "e16m0", "e0m16:row"])
def test_elements_of_other_widths(name):
    with pytest.raises(ValueError, match="2 to 16 bits"):
        resolve(name)


@pytest.mark.parametrize("cls", [Sign, Float8Quantizer, NativeQuantizer, torch.nn.Linear])
def test_a_class_instead_of_an_instance(cls):
    with pytest.raises(TypeError, match=f"got the class {cls.__name__}; pass an instance"):
        resolve(cls)


@pytest.mark.parametrize("spec", [None, 8, 4.3, ["e4m3"], torch.zeros(2), torch.strided])
def test_objects_that_are_not_quantizers(spec):
    with pytest.raises(TypeError, match=f"expected a quantizer name .*, got {type(spec).__name__}$"):
        resolve(spec)


def test_objects_and_functions():
    sign = Sign()
    assert isinstance(sign, Quantizer)
    assert resolve(sign) is sign
    assert encode(torch.tensor([-2.0, 0.0, 3.0]), sign).ordinals.tolist() == [-1, 0, 1]
    assert type(resolve(torch.round)) is FunctionQuantizer
    assert str(resolve(torch.round)) == "round"
    unscaled = resolve(E3M4)
    assert (unscaled.format, unscaled.granularity, unscaled.fixed_scale) == (E3M4, "none", None)


@pytest.mark.parametrize("spec", ["native", Sign(), NativeQuantizer()], ids=str)
def test_scale_for_a_quantizer_that_does_not_take_one(spec):
    with pytest.raises(ValueError, match=f"^quantizer {spec} does not take scale="):
        resolve(spec, 0.5)


def test_scale_for_a_function():
    with pytest.raises(ValueError, match=r"a function .* does not take scale=; scale inside it"):
        resolve(torch.round, 0.5)


def test_quantizer_names():
    names = quantizer_names()
    assert {"float8_e4m3", "float8_e5m2", "e3m4", "native", "bfloat16", "float16"} <= set(names)
    assert names == sorted(set(names))
    for name in names:
        assert isinstance(resolve(name), Quantizer)


def test_register(registry):
    calls = []

    @register(r"sign\d*", examples=("sign", "sign2"))
    def factory(name, options):
        calls.append((name, options))
        return Sign()

    assert {"sign", "sign2"} <= set(quantizer_names())
    assert isinstance(resolve("sign"), Sign)
    assert encode(torch.tensor([-1.5, 2.0]), "SIGN7:a:b").ordinals.tolist() == [-1, 1]
    assert calls == [("sign", ()), ("sign7", ("a", "b"))]
    # The pattern must match the full name.
    with pytest.raises(ValueError, match="unknown quantizer 'sign7x'; did you mean 'sign'"):
        resolve("sign7x")
    with pytest.raises(ValueError, match="unknown quantizer 'asign'"):
        resolve("asign")


def test_what_a_test_registers_is_removed_afterwards():
    assert "sign" not in quantizer_names()


def test_a_new_file_in_the_package_is_found(registry, monkeypatch, tmp_path):
    (tmp_path / "halves.py").write_text(
        "from weightflip.quantizers.registry import register\n"
        "from weightflip.quantizers.native import CastQuantizer\n"
        "import torch\n"
        "@register('halves', examples=('halves',))\n"
        "def _halves(name, options):\n"
        "    return CastQuantizer(torch.float16)\n"
    )
    package = weightflip.quantizers
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    try:
        assert "halves" in quantizer_names()
        assert type(resolve("halves")) is CastQuantizer
    finally:
        sys.modules.pop("weightflip.quantizers.halves", None)
        vars(package).pop("halves", None)


def test_every_module_of_the_package_is_imported_at_the_first_lookup():
    script = """
import json, sys
from weightflip.quantizers import resolve
resolve("native")
print(json.dumps([name for name in sys.modules if name.split(".")[0] in ("weightflip", "torchao", "tensorboard")]))
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    loaded = set(json.loads(output))
    folder = Path(weightflip.quantizers.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {"protocol", "registry", "float8", "floatx", "native"} <= files
    assert {f"weightflip.quantizers.{name}" for name in files} <= loaded
    assert not {name for name in loaded if not name.startswith("weightflip")}


def test_importing_twice_registers_once():
    quantizer_names()
    before = list(names._registry)
    quantizer_names()
    resolve("native")
    assert names._registry == before


def test_elementwise_quantizers_know_the_code_dtype_before_encoding():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for name in quantizer_names():
        quantizer = resolve(name)
        if isinstance(quantizer, ElementwiseQuantizer):
            assert quantizer.encode(weight).ordinals.dtype is quantizer.code_dtype(weight)
