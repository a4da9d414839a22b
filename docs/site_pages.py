"""A hook of mkdocs: pages beside docs/ become pages of the site, and links between all of them stay whole."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# a file of the repository -> its place in the site; files of docs/ lose that folder
ELSEWHERE = {
    "README.md": "index.md",
    **{name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/backgrounds.png")},
}
PLACES = {place: name for name, place in ELSEWHERE.items()}
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Files of the site, with those that are not in docs/."""
    for name, place in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page, with its links as they are in the site."""
    place = page.file.src_uri
    name = PLACES.get(place, f"docs/{place}")

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), match[1]))
        there = ELSEWHERE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(there, posixpath.dirname(place) or '.')}"

    return LINK.sub(link, markdown)
