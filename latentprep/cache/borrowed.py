"""Where the cond of a text's prompts is: in its own file, or in cond files that it borrows from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.cond import CondFile, open_cond
from latentprep.cache.files import damaged
from latentprep.cache.names import COND_NAME, FOLDER, cond_name
from latentprep.cache.ragged import Conds, row_shape
from latentprep.cache.seal import check_seal
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.text import Text
from latentprep.errors import UnreadableError, UserError

# dtype and shape of one prompt's cond; None in the shape: this length differs from prompt to prompt
Kind = tuple[torch.dtype, tuple[int | None, ...]]


class CondFiles:
    """The cond files of a cache, each opened when it is first asked for; each process opens its own."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._opened: dict[str, CondFile] = {}

    def __getitem__(self, cond_file: str) -> CondFile:
        """Raises UserError for a file that is missing or damaged."""
        if cond_file not in self._opened:
            self._opened[cond_file] = open_cond(self.storage, cond_file)
        return self._opened[cond_file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # memory maps are opened anew in each process

    def of(self, text: Text) -> "TextCond":
        """The cond of the prompts of a text file.

        Raises UserError if a cond file is missing or damaged, has no such row, or does not fit the text file.
        """
        lenders = [self[cond_file] for cond_file in text.cond_files]
        for number, row in text.borrowed:
            if row >= len(lenders[number].prompt):
                raise self._damaged(text.cond_files[number], f"a text borrows row {row}, which it does not have")
        kinds = kinds_of(text.cond or (lenders[0].cond if lenders else {}))
        for cond_file, lender in zip(text.cond_files, lenders, strict=True):
            if kinds_of(lender.cond) != kinds:
                raise self._damaged(cond_file, "its cond does not fit that of a text that borrows it")
        return TextCond(text, lenders, kinds)

    def _damaged(self, cond_file: str, what: str) -> UserError:
        return damaged(self.storage, cond_name(cond_file), ValueError(what))


def kinds_of(cond: Conds) -> dict[str, Kind]:
    return {name: (value.dtype, row_shape(value)) for name, value in cond.items()}


class TextCond:
    """The cond of the P prompts of a text, wherever it stands."""

    def __init__(self, text: Text, lenders: list[CondFile], kinds: Mapping[str, Kind]) -> None:
        self.text, self.lenders = text, lenders
        self._own, self._borrowed = text.num_own, text.borrowed.tolist()  # lists: a loop reads them one by one
        self.kinds = kinds  # name -> what a row is; empty: there is no cond

    @property
    def is_borrowed(self) -> bool:
        """Whether some of it stands in other files."""
        return bool(self.lenders)

    def row(self, name: str, prompt: int) -> Tensor:
        """[...] or [T,...]: the cond of a prompt, by its number in the text."""
        if prompt < self._own:
            return self.text.cond[name][prompt]
        number, row = self._borrowed[prompt - self._own]
        return self.lenders[number].cond[name][row]

    def rows(self, prompt: int) -> dict[str, Tensor]:
        """All cond of a prompt, name -> [...]."""
        return {name: self.row(name, prompt) for name in self.kinds}

    def places(self) -> list[tuple[str, int] | None]:
        """For each prompt: (cond file, row in it) if its cond is borrowed; None if the text file has it."""
        names = self.text.cond_files
        return [*[None] * self._own, *((names[number], row) for number, row in self._borrowed)]

    @property
    def max_tokens(self) -> int | None:
        found = [self.text.max_tokens, *(lender.max_tokens for lender in self.lenders)]
        return next((window for window in found if window is not None), None)

    @property
    def num_tokens(self) -> np.ndarray | None:
        """[P] int32: tokens of each prompt; None: they were not counted."""
        own, lent = self.text.num_tokens, [lender.num_tokens for lender in self.lenders]
        if (own is None and self._own) or any(part is None for part in lent) or not self.kinds:
            return None
        borrowed = [lent[number][row] for number, row in self._borrowed]  # type: ignore[index]
        return np.array([*(own if own is not None else ()), *borrowed], np.int32)


def find_cond_files(storage: Storage, named: Mapping[str, Stamp], others: bool) -> dict[str, Stamp]:
    """id -> stamp of the cond files that exist: those of `named` (the manifest's), if they have the right size.

    With `others`, also those that an unfinished run left, if their seal fits. Raises UnreadableError if one of these
    cannot be read.
    """
    sizes = storage.sizes(FOLDER)
    found = {name: stamp for name, stamp in named.items() if sizes.get(cond_name(name)) == stamp.nbytes}
    for match in map(COND_NAME.fullmatch, sizes if others else ()):
        if match is not None and match[1] not in named:
            try:
                found[match[1]] = check_seal(storage, match[0])
            except UnreadableError:
                raise  # the file may be intact, so it must not count as missing
            except (UserError, FileNotFoundError):
                continue
    return found
