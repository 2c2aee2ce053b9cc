"""Sphinx over the pages where they stand: docs/, notebooks/ and the table of objectives in rl/."""

from sphinx.errors import ExtensionError

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


# A notebook that fails, a cell that takes longer than the timeout and notebooks that take more than
# 90 s together stop the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 60
nb_execution_show_tb = True
NOTEBOOKS_SECONDS = 90

html_theme = "furo"
html_title = "tether"
html_show_sphinx = False
html_copy_source = False


def check_time_of_notebooks(app, error):
    runs = {name: data.get("exec_data") for name, data in app.env.nb_metadata.items()}
    seconds = {name: run["runtime"] for name, run in runs.items() if run}
    total = sum(seconds.values())
    if error is None and total > NOTEBOOKS_SECONDS:
        raise ExtensionError(
            f"notebooks must take at most {NOTEBOOKS_SECONDS} s together, got {seconds}"
        )


def setup(app):
    app.connect("build-finished", check_time_of_notebooks)
