"""Sphinx's settings for the web edition; ``make book`` lays its sources out first (s2d.lab.book)."""

import s2d

project = "s2d"
author = "The s2d companion authors"
copyright = author
version = release = s2d.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "s2d.lab.book.mathml",
]

# The stored outputs are the book's: nothing is run, and nothing fetched for widgets that have stand-ins.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_render_image_options = {"align": "left"}
nb_mime_priority_overrides = [("html", "image/svg+xml", 5)]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["myst.header"]

html_math_renderer = "mathml"
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_custom_sections = ["Paper", "Cost"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

templates_path = []
html_theme = "furo"
html_title = "s2d"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = [("moving.js", {"defer": "defer"}), ("claims.js", {"defer": "defer"})]
html_show_sphinx = False
html_show_search_summary = False  # it fetches pages, which a browser refuses to a page opened from a folder
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
