"""Cond that other text files of the cache have: each file is checked as it is opened, and kept open."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from latentprep.cache.seal import check_stamp
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text, open_text
from latentprep.errors import UserError
from latentprep.prepare.plan.tasks import Home
from latentprep.prepare.work.cond import is_of_recipe
from latentprep.recipe import TextRecipe

MOST_OPEN = 64  # files, which are mapped and not read; one that is opened again is hashed again


@dataclass(frozen=True, eq=False)
class Indexed:
    """A text, and where it has which prompt."""

    text: Text
    index: Mapping[str, int]

    @classmethod
    def of(cls, text: Text) -> Self:
        return cls(text, {prompt: n for n, prompt in enumerate(text.prompt[: text.num_own])})


class StoredCond:
    """Text files of a local cache, by their names."""

    def __init__(self, storage: Storage, recipe: TextRecipe) -> None:
        self.storage, self.recipe = storage, recipe
        self.opened: OrderedDict[str, Indexed] = OrderedDict()

    def find(self, home: Home) -> Indexed | None:
        """The text at a prompt's home; None if it is gone or damaged, or its cond is of another recipe."""
        if home.name not in self.opened:
            text = self._open(home)
            if text is None:
                return None
            self.opened[home.name] = Indexed.of(text)
            if len(self.opened) > MOST_OPEN:
                self.opened.popitem(last=False)
        self.opened.move_to_end(home.name)
        return self.opened[home.name]

    def _open(self, home: Home) -> Text | None:
        try:
            check_stamp(self.storage, home.name, home.stamp)
            text = open_text(self.storage, home.shard, home.text_id)
        except (UserError, FileNotFoundError):
            return None
        return text if text.cond and is_of_recipe(text, self.recipe) else None
