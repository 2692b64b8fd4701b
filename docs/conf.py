"""Sphinx: the documents of this repository as a site. `make docs` builds it, without network access."""

from __future__ import annotations

from weightflip.version import __version__

project = "weightflip"
version = release = __version__
copyright = "the weightflip maintainers"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

# The source is the repository itself, so that a link between any two files is the same here and on a Git host.
root_doc = "docs/index"
include_patterns = ["docs/**", "CONTRIBUTING.md", "CHANGELOG.md"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]

myst_heading_anchors = 4  # the names that GitHub gives to headings

# Only tables: the entries are in docs/api.
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"weightflip {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "native"
