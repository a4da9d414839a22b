"""README.md and docs/ as pages: short enough, links lead somewhere, and errors stand there by their words."""

import ast
import re

import pytest
import yaml

from latentprep.cli.foreign import HINTS
from latentprep.kohya.keys import NO_EQUIVALENT, OF_DATASET, OF_SUBSET, OF_SUBSET_ALONE
from tests.test_readme import NAMES, PAGES, ROOT

BESIDE = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/diffusers/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*NAMES, *BESIDE)}
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_readme_has_less_than_150_lines():
    assert len(PAGES["README.md"].splitlines()) < 150


def test_every_page_is_named():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md"} == set(NAMES)
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", PAGES["README.md"]))
    assert linked == set(NAMES) - {"README.md"}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_a_file_and_a_heading(name):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCE.sub("", TEXTS[name])):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", NAMES)
def test_headings_of_a_page_have_anchors_of_their_own(name):
    found = anchors(PAGES[name])
    assert found[0]
    assert len(found) == len(set(found)), [anchor for anchor in found if found.count(anchor) > 1]


def test_the_preview_is_small():
    assert (ROOT / "docs" / "images" / "preview.png").stat().st_size < 400_000


def test_the_site_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w-]+\.md)$", str(yaml.safe_dump(yaml.safe_load(text)["nav"])), re.MULTILINE)
    pages = {name.removeprefix("docs/").replace("README.md", "index.md") for name in NAMES}
    assert sorted(listed) == sorted(pages | set(BESIDE[:3]))


def words_of_the_code():
    """Every text in the package; what is put into a text when it is made stands as a line break."""
    for path in (ROOT / "latentprep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_errors_stand_on_the_page_by_their_words():
    said = list(words_of_the_code())
    named = re.findall(r"\*\*`([^`]+)`\*\*", PAGES["docs/troubleshooting.md"])
    assert len(named) > 70
    for error in named:
        parts = [part.strip() for part in error.split("…")]
        pattern = re.compile(r"[^\n]*\n[^\n]*".join(map(re.escape, parts)))
        assert any(pattern.search(text) for text in said), error


def test_an_error_that_no_code_has_would_be_found():
    assert not any("expected a folder of cats" in text for text in words_of_the_code())


def test_options_of_other_programs_stand_with_what_they_are_here():
    """Those that latentprep answers, and the keys of a dataset.toml."""
    page = PAGES["docs/coming-from.md"].partition("\n## SimpleTuner")[0]
    lines = [line for line in page.splitlines() if line.startswith(("| ", "- ", "  "))]
    known = {**NO_EQUIVALENT, **OF_DATASET, **OF_SUBSET, **OF_SUBSET_ALONE}
    hints = {**dict.fromkeys(known, ""), **HINTS}
    for name, hint in hints.items():
        named = [line for line in lines if f"`{name}`" in line]
        assert named, name
        for option in re.findall(r"--[a-z-]+", hint):
            assert any(option in line for line in named), (name, option)
