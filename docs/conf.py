"""The documentation site: `make docs` writes it to build/docs/html, without a network and with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

import gdopt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "gdopt"
author = "the gdopt authors"
project_copyright = author
version = release = gdopt.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    # in _ext
    "accessible",
    "interactive",
    "names",
    "repository_links",
    "site_links",
]
exclude_patterns = [
    "_ext",
    "gallery",
    "jupyter_execute",
    "auto_gallery/**.ipynb",
    "sg_execution_times.rst",
    "**/sg_execution_times.rst",
    "**.ipynb_checkpoints",
]
templates_path = ["_templates"]
nitpicky = True

# Pages are Markdown. tests/test_docs.py runs their blocks, so the build shows them as they are; it executes notebooks.
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120

# The reference comes from docstrings in Google's style. `name` in them is a link.
default_role = "py:obj"
add_module_names = False
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes_style")]

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"plot_",
    "abort_on_example_error": True,
    "capture_repr": ("_repr_html_", "__repr__"),
    "ignore_repr_types": r"matplotlib",
    "image_scrapers": ("gallery_tools.figures", "matplotlib"),  # the second one closes its figures
    "reset_modules": ("matplotlib", "gallery_tools.reset"),
    "show_signature": False,
    "within_subsection_order": "FileNameSortKey",
    "min_reported_time": 5,
    "remove_config_comments": True,
    "show_memory": False,
    "parallel": 2,
}

html_theme = "sphinx_book_theme"
html_title = "gdopt"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css", "interactive/descent.css"]
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}  # light or dark, as the browser prefers
html_theme_options = {
    "repository_url": "https://github.com/gdopt/gdopt",
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_edit_page_button": False,
    "use_download_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has the field for searching
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
