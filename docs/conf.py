"""Sphinx over the pages where they stand: docs/, notebooks/ and the table of objectives in rl/."""

project = "tether"
copyright = "the authors of tether"
root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "examples/text2sql/README.md",
    "notebooks/*.md",
    "rl/README.md",
    "tests/peers/DEVELOPERS.md",
]
exclude_patterns = ["build", ".venv"]

extensions = ["myst_nb"]
myst_heading_anchors = 3


# A notebook that fails, or takes too long, stops the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 60
nb_execution_show_tb = True

html_theme = "furo"
html_title = "tether"
html_show_sphinx = False
html_copy_source = False
