"""Documents name files that exist, and link to files and headings that exist."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
MADE_UP = {
    # Examples of extensions, and names of a benchmark or configuration to fill in.
    "CONTRIBUTING.md": {
        "kernels/entropy.py",
        "mpl_fast/algorithms/entropy.py",
        "mpl_fast/data/synthetic.py",
        "tools/bench/NAME.py",
    },
}
FOLDERS = "mpl_fast|kernels|tests|tools|configs|docs|docker"
NAMED = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w/.-]*\.(?:py|md|yaml|json|png)\b(?!\*)")


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def broken(document: Path) -> list[str]:
    """Links of a document to nothing, and files that it names and that do not exist."""
    text = document.read_text()
    wrong = []
    for place, anchor in LINK.findall(text):
        target = document.parent / place if place else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{place}#{anchor}")
    return wrong + [name for name in NAMED.findall(text) if not (ROOT / name).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_of_a_document_exist(document: Path) -> None:
    missing = set(broken(document)) - MADE_UP.get(document.name, set())
    assert not missing


RESULTS = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.name)
def test_a_published_result_is_linked_beside_the_commit_that_it_names(file: Path) -> None:
    commit = json.loads(file.read_text())["machine"]["commit"]
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    (section,) = (
        part for part in re.split(r"^##+ ", text, flags=re.MULTILINE) if file.name in part
    )
    assert re.search(rf"commit\s{commit}(?![\w-])", section, re.IGNORECASE)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# A `b`, c\n[1](page.md#a-b-c) [2](#a-b-d) [3](no.md) `tools/none.py`\n")
    assert broken(document) == ["#a-b-d", "no.md#", "tools/none.py"]
