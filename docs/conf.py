"""The site that ci/docs.sh builds: the Markdown files of the repository as they are, and two pages made from the code.

The source folder is the repository's own, so that one link works on GitHub and in the site.
"""

import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import reference_pages  # noqa: E402

project = "moe-conformance"
author = "the authors of moe-conformance"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/README.md"]
exclude_patterns = [".*", "site", "results", "dist", "build", "wheels"]  # not walked through
myst_heading_anchors = 4
highlight_language = "none"

html_theme = "alabaster"
html_theme_options = {
    "description": "Conformance of Mixture-of-Experts engines",
    "page_width": "1280px",
    "body_max_width": "none",
    "sidebar_width": "250px",
    "font_family": "system-ui, sans-serif",
    "font_size": "15px",
    "code_font_size": "13px",
}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
html_show_sourcelink = False
html_copy_source = False
html_use_index = False

NAVIGATION = {
    "Judging an engine": ["reading", "ci", "checkpoint", "routes", "tolerances", "trust", "stability", "migrating"],
    "Plugging in an engine": ["adapters", "tutorial"],
    "Changing the suite": ["../CONTRIBUTING", "architecture", "extending", "families", "kernels", "testing"],
    "Reference": ["contract", "commands", "glossary"],
    "What came out": ["vllm", "transformers", "torchtitan", "../RESULTS", "../benchmarks/README", "../CHANGELOG"],
}
# A page that is new and in no list above is still in the navigation.
listed = {name for names in NAVIGATION.values() for name in names}
if others := sorted({page.stem for page in (ROOT / "docs").glob("*.md")} - listed):
    NAVIGATION["More"] = others
# What a link to a source file leads to in the site.
PAGES = {"moe_conformance/catalogue/clauses.py": "docs/contract.md", "moe_conformance/cli.py": "docs/commands.md"}


def _write_pages(app: Sphinx) -> None:
    reference_pages.write(ROOT / "docs")


def _adapt(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to the generated pages; on the first page the navigation."""
    up, folder = ("../", "") if page.startswith("docs/") else ("", "docs/")
    for file, made in PAGES.items():
        source[0] = source[0].replace(f"]({up}{file})", f"]({folder}{Path(made).name})")
    if page == root_doc:
        for caption, names in NAVIGATION.items():
            pages = "\n".join(name.removeprefix("../") if name.startswith("../") else f"docs/{name}" for name in names)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def _give_an_index(app: Sphinx, error: Exception | None) -> None:
    """A server and a person at a folder look for index.html."""
    if error is None and app.builder.format == "html":
        shutil.copyfile(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", _write_pages)
    app.connect("source-read", _adapt)
    app.connect("build-finished", _give_an_index)
