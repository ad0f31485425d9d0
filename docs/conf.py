"""The documentation site, which ``make docs`` builds offline: pages in Markdown, a reference from docstrings."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs" / "_ext"), str(ROOT)]  # the benchmarks are read where they lie

project = "msformer"
author = "The msformer developers"
version = release = installed_version("msformer")
project_copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "mathml",
    "units",
    "site_checks",
]
exclude_patterns = ["_ext"]
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "py:obj"
python_maximum_signature_line_length = 100

public_modules = [
    "msformer_kernels",
    "msformer_kernels.nn",
    "msformer",
    "msformer.data",
    "msformer.medical",
    "msformer.runs",
]
"""All that their ``__all__`` names must stand in the reference, with a docstring."""

html_theme = "furo"
html_title = f"msformer {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
