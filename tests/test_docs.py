"""The Python snippets of the README and of docs/ run as they stand, in order, page by page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_SNIPPETS = [page for page in PAGES if SNIPPET.search(page.read_text("utf-8"))]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if SNIPPET.search(page.read_text("utf-8"))], ids=lambda p: p.name
)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for snippet in SNIPPET.findall(page.read_text("utf-8")):
        exec(compile(snippet, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_installing_more_leaves_an_editable_install_editable(page):
    for line in re.findall(r"pip install .*?\.\[", page.read_text("utf-8")):
        assert line.endswith("-e '.["), line
