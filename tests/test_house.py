"""ARCHITECTURE.md is true to the code: what a machine can compare is compared."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import latentprep
from latentprep.cache import names
from latentprep.cache.schema import LATENTS, LISTS, STRINGS, TEXT
from latentprep.prepare.engine import ENGINES
from latentprep.prepare.models.families import FAMILIES
from latentprep.prepare.models.vaes import VAES
from latentprep.prepare.source.sources import SOURCES
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
PACKAGE = Path(latentprep.__file__).parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def blocks(language=""):
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def tree():
    """Every path of the tree, with what is said of it."""
    (text,) = [block for block in blocks() if block.startswith("latentprep/\n")]
    folders: list[str] = []
    found = {}
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names_, _, says = re.match(r"\s*(\S+(?:  \S+/)*)(\s*)(.*)", line).groups()
        for name in names_.split():
            path = "/".join([*folders[:depth], name.rstrip("/")])
            assert path not in found, f"{path} stands twice"
            found[path] = says
            if name.endswith("/"):
                folders[depth:] = [name.rstrip("/")]
    return found


def test_the_tree_is_the_package():
    named = tree()
    for path in named:
        assert (PACKAGE.parent / path).exists(), path
    there = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py") if path.read_text().strip()}
    assert there <= named.keys(), sorted(there - named.keys())
    assert all(says for path, says in named.items() if path.endswith(".py"))


def test_the_main_path_is_that_of_the_code():
    code = (PACKAGE / "prepare" / "encode.py").read_text(encoding="utf-8")
    (block,) = [block for block in blocks("python") if "check_usable" in block]
    at = [code.index(f"    {line}\n") for line in block.splitlines()]
    assert at == sorted(at)


def test_the_table_of_fields_is_the_schema():
    def row(kind, field):
        dtypes = {STRINGS: "strings", LISTS: "lists"}.get(field.kind if isinstance(field.kind, str) else "")
        shape = ",".join(field.shape).replace("D", "16")
        dtypes = dtypes or ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in field.kind))
        return kind, field.name, dtypes, f"[{shape}]", field.is_optional

    found = re.findall(r"^\| (latents|text) \| `(\w+)` \| (.*?) \| (\[.*?\]) \| (.*) \|$", PAGE, re.MULTILINE)
    assert [(*cells[:4], cells[4].startswith("optional")) for cells in found] == [
        *(row("latents", field) for field in LATENTS), *(row("text", field) for field in TEXT),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("SOURCES", [opens.__name__ for opens in SOURCES]),
        ("VAES", [row.name for row in VAES]),
        ("FAMILIES", [row.name for row in FAMILIES]),
        ("ENGINES", list(ENGINES)),
    ],
)
def test_the_rows_of_doors_are_those_of_the_tables(table, rows):
    (line,) = re.findall(rf"^\| .* `{table}`: (.*) \|$", PAGE, re.MULTILINE)
    assert re.findall(r"`(.*?)`", line) == rows


def test_every_test_and_every_file_that_is_named_is_there():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(pages) > 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"(?:tests|examples|benchmarks|docs|templates)/[\w/-]*\.(?:py|txt|png|md)", text):
            assert (ROOT / name).exists(), (page, name)
    for name in re.findall(r"`((?:prepare|cache|read|look|cli|personalized)/[\w/]+\.py)`", PAGE):
        assert (PACKAGE / name).exists(), name


def test_every_promise_names_a_test():
    section = PAGE.partition("## Promises")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    assert all("`tests/test_" in row for row in rows)


def test_the_files_of_a_cache_are_those_that_have_names():
    (layout,) = [block for block in blocks() if block.startswith("cache.json")]
    said = layout.replace("<16 hex>", "0123456789abcdef").replace("<32 hex>", 2 * "0123456789abcdef")
    said = said.replace("<id>", "a1").replace("<rank>", "0")
    said = said.replace("<world size>", "2").replace("<name>", "cache.json").replace("<number>", "7")
    listed = [name for line in said.splitlines() for name in re.findall(r"^\S+(?:  \.\S+)*", line)[0].split()]
    ours = [name for name in listed if names.is_ours(name)]
    assert len(ours) == 7
    assert set(listed) - set(ours) == {
        "cache.json", "skipped.jsonl", ".lock", ".lock.0-of-2", ".readers", ".superseded.json",
    }  # fmt: skip


def test_what_tests_share_is_checked_by_mypy():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    shared = {f"tests.{path.stem}" for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")}
    assert shared == set(config["modules"])


def test_what_needs_cuda_is_marked():
    for path in (ROOT / "tests").glob("test_*.py"):
        if path != Path(__file__):
            assert "skipif(not torch.cuda" not in path.read_text(encoding="utf-8"), path


def test_headers_and_manifest_hold_what_the_page_names(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    manifest = json.loads((tmp_path / "c" / "cache.json").read_text())
    found = {*manifest, *manifest["shards"][0]}
    for path in [*(tmp_path / "c" / "shards").iterdir(), *(tmp_path / "c").glob("uncond.*")]:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        assert [*header] == ["latentprep"]
        found |= json.loads(header["latentprep"]).keys()
    section = PAGE.partition("## The cache on disk")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert found <= named, found - named
