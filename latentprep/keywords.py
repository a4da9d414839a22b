"""Options of the command line in the words of Python: `--bucket-step 20` is `bucket_step=20` there."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NUMBER = r"-?\d+(?:\.\d+)?(?![\w.]*\w)"
QUOTED = r'"[^"]*"'


@dataclass(frozen=True)
class Keywords:
    """What options are called by somebody who gives them as arguments of a function.

    `names` has the word for each option, such as `--out` or SOURCE. If an option is in `values`, a value that follows
    it is joined to it by "=". These are the values that are known: numbers, quoted texts, and the option's own choices.
    """

    names: Mapping[str, str]
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def translate(self, text: str, given: Mapping[str, Any] | None = None) -> str:
        """The text with keywords in place of options. `given` has the arguments of the call, of which it may speak."""
        given = given or {}
        options = "|".join(sorted(map(re.escape, self.names), key=len, reverse=True))
        # neither part of a path nor of a longer word: --out, and not /a/--out.b
        pattern = re.compile(rf"(?<![\w/.-])({options})(?![\w/-]|\.\w)")
        parts, end = [], 0
        for found in pattern.finditer(text):
            if found.start() < end:
                continue  # within the value of the option before
            parts.append(text[end : found.start()])
            word, end = self._word(found[1], text, found.end(), given)
            parts.append(word)
        return "".join([*parts, text[end:]])

    def _word(self, option: str, text: str, end: int, given: Mapping[str, Any]) -> tuple[str, int]:
        """What stands for an option, and where the text goes on behind it and its value."""
        name = self.names[option]
        if option not in self.values or not text.startswith(" ", end):
            return name, end
        start = end + 1
        said = str(given.get(name, ""))
        if said and re.compile(rf"{re.escape(said)}(?!\w)").match(text, start):
            return f"{name}={given[name]!r}", start + len(said)
        for choice in self.values[option]:
            if choice and re.compile(rf"{re.escape(choice)}(?![\w-])").match(text, start):
                return f"{name}={choice if choice.isupper() else repr(choice)}", start + len(choice)
        found = re.compile(f"{NUMBER}|{QUOTED}").match(text, start)
        return (f"{name}={found[0]}", found.end()) if found else (name, end)
