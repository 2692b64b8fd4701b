"""Every Python block of the documents runs and prints what is shown below it; every relative link leads somewhere."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import digits_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import weightflip
from weightflip import FlipTrackingOptimizer, quantizer_names
from weightflip.quantizers import registry
from weightflip.version import __version__

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RUNNABLE = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
LANGUAGES = {"python", "text", "sh"}

FENCE = re.compile(r"^```(?P<language>[^\n`]*)\n(?P<body>.*?)^```$\n*(?P<table>(?:^\|[^\n]*\n)*)", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(\s*([^)\s]+)[^)]*\)")


class Block(NamedTuple):
    """A fenced block, with the line of its first character and the table that follows it without text in between."""

    language: str
    body: str
    line: int
    start: int
    end: int
    table: str


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        end = match.start("table") if match["table"] else match.end()
        yield Block(match["language"], match["body"], line, match.start(), end, match["table"])


def prose(text: str) -> str:
    """The text without its fenced blocks and code spans."""
    return re.sub(r"(`+).+?\1", "", FENCE.sub(r"\g<table>", text))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and lose a lot where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_there_are_documents():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/metrics.md", "docs/formats.md"} <= {
        name_of(path) for path in DOCUMENTS
    }


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
@pytest.mark.filterwarnings("error:weightflip")
def test_python_blocks_run(path, digits, one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What a document registers is forgotten after it; what the library has is registered first.
    quantizer_names()
    monkeypatch.setattr(registry, "_registry", list(registry._registry))
    namespace: dict[str, object] = {"__name__": "document"}
    if path.name == "README.md":
        # What a reader's script has before weightflip comes in.
        images, labels = digits
        namespace["torch"] = torch
        namespace["model"] = digits_model()
        namespace["loader"] = list(zip(images.split(64), labels.split(64), strict=True))

    text = path.read_text(encoding="utf-8")
    found = list(blocks(text))
    assert any(block.language == "python" for block in found)
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # With the document's own line numbers in tracebacks.
            exec(compile("\n" * (block.line - 1) + block.body, str(path), "exec"), namespace)
        if block.table:
            assert printed.getvalue() == block.table, f"{name_of(path)}:{block.line}"
        elif following is not None and following.language == "text" and block.end == following.start:
            assert printed.getvalue() == following.body, f"{name_of(path)}:{following.line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_blocks_say_their_language(path):
    text = path.read_text(encoding="utf-8")
    assert {block.language for block in blocks(text)} <= LANGUAGES
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(list(blocks(text)))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_lead_somewhere(path):
    for link in LINK.findall(prose(path.read_text(encoding="utf-8"))):
        target = urllib.parse.urlsplit(link)
        if target.scheme:
            assert target.scheme == "https", link
            continue
        file = path.parent / urllib.parse.unquote(target.path) if target.path else path
        assert file.is_file(), f"{name_of(path)} links to {link}, which is not there"
        if target.fragment:
            assert target.fragment in anchors(file.read_text(encoding="utf-8")), f"{name_of(path)}: no heading {link}"


def first_column(document: str, table: str) -> set[str]:
    """The code spans in the first column of the document's table that starts with these cells."""
    text = (ROOT / document).read_text(encoding="utf-8")
    rows = text[text.index(table) :].split("\n\n")[0].splitlines()
    return {span for row in rows for span in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_options_have_every_option():
    parameters = inspect.signature(FlipTrackingOptimizer).parameters.values()
    options = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert first_column("docs/options.md", "| option |") == options
    assert first_column("README.md", "| option |") < options


def test_formats_have_every_family_of_quantizers():
    # Not those that the documents and other tests register.
    quantizer_names()
    ours = [entry for entry in registry._registry if entry.factory.__module__.startswith("weightflip.")]
    assert first_column("docs/formats.md", "| name | format |") - {"e2m1", "eXmY"} == {
        name for entry in ours for name in entry.examples
    }


def test_tensorboard_page_has_every_tag(tmp_path):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        quantizer="mxfp8_e4m3",
        include="0.weight",
        log_dir=tmp_path,
        log_every=1,
    )
    model[0].weight.grad = torch.ones_like(model[0].weight).index_fill_(0, torch.tensor(0), 0)
    optimizer.step()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    optimizer.step()
    optimizer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = {tag.replace("/0.weight", "/<layer>") for tag in events.Tags()["scalars"]}
    assert first_column("docs/tensorboard.md", "| tag |") == tags


def test_citation_has_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_reference_lists_every_public_name():
    overview = (ROOT / "docs/api.rst").read_text(encoding="utf-8")
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.rst"))
    names = [name for name in weightflip.__all__ if name != "formats"]
    assert len(names) > 15
    for name in names:
        assert re.search(rf"^   {name}$", overview, re.MULTILINE), name
        assert f" weightflip.{name}\n" in pages, name
