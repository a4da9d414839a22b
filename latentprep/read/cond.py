"""Stored cond of a batch. Dropped samples get that of the empty prompt; shorter prompts are padded to one length."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.borrowed import Kind
from latentprep.cache.cond import open_uncond
from latentprep.cache.int8 import POSITIONS, SCALE, scales_of, unpack_all
from latentprep.cache.manifest import Manifest
from latentprep.cache.names import uncond_name
from latentprep.cache.ragged import REPEAT, Conds, mask_of, pad, row_shape
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.read.rows import OpenRows

Rows = Tensor | list[Tensor]  # [B,...], or B tensors [T,...], each with its own T


class StoredCond:
    """The cond of a cache: that of its prompts, and that of the empty prompt, which is read when first needed."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage, self.manifest = storage, manifest
        # how shorter prompts are padded, and to how many tokens at least, as the family has it
        self.fill, self.pad_to = manifest.recipe.text.fill or REPEAT, manifest.recipe.text.pad_to or {}
        self._empty: Conds | None = None

    @property
    def is_there(self) -> bool:
        return self.manifest.has_cond

    @property
    def sees_images(self) -> bool:
        """Whether each image has cond of its own for each prompt."""
        return self.manifest.recipe.text.sees_images

    @property
    def has_empty(self) -> bool:
        """Whether there is cond of the empty prompt, one or of each image."""
        return self.manifest.uncond is not None or bool(self.manifest.recipe.text.image_uncond)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_empty": None}  # memory maps are opened anew in each process

    def empty(self) -> Conds:
        """Cond of the empty prompt, name -> [1,...], as stored. Raises UserError."""
        if self._empty is None:
            self._empty = open_uncond(self.storage, self._name)[1]
        return self._empty

    @property
    def _name(self) -> str:
        """The id in the name of the empty prompt's file."""
        assert self.manifest.uncond is not None
        return self.manifest.uncond.id

    def take(
        self, rows: OpenRows, prompts: np.ndarray, is_dropped: np.ndarray | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cond of a batch as stored, name -> [B,...]; and the lengths before padding, name -> [B] int64, if padded.

        prompts [B]: the number of each sample's prompt in its shard. is_dropped [B] bool: the samples that get the cond
        of the empty prompt; None: no sample does. Raises UserError if that cond cannot be read or does not fit.
        """
        cond: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        kinds = rows.one.cond.kinds if rows.one.cond is not None else {}
        scales = scales_of({name: dtype for name, (dtype, _) in kinds.items()})
        for name, kind in kinds.items():
            own = rows.list_cond(name, prompts) if None in kind[1] else rows.take_cond(name, prompts)
            if is_dropped is not None:
                put_empty(own, is_dropped, self._empty_row(name, kind))
            if isinstance(own, Tensor):
                cond[name] = own
            else:
                least = self.pad_to.get(name.removesuffix(SCALE) if name in scales else name, 1)
                cond[name], lengths[name] = pad(own, self.fill, least)
        return cond, {name: own for name, own in lengths.items() if name not in scales}

    def _empty_row(self, name: str, kind: Kind) -> Tensor:
        """[T,...] or [D]: the empty prompt's cond of this name.

        Raises UserError if there is none, if its shape is not that of the prompts', or if only one of them is int8.
        """
        empty, (dtype, shape) = self.empty().get(name), kind
        is_packed = torch.int8 in (dtype, None if empty is None else empty.dtype)
        if empty is None or row_shape(empty) != shape or (is_packed and empty.dtype != dtype):
            raise UserError(
                f"{self.storage.locate(uncond_name(self._name))}: its {name} does not fit that of the "
                "shards. Run latentprep verify."
            )
        return empty[0]


def put_empty(rows: Rows, is_dropped: np.ndarray, empty: Tensor) -> None:
    """Put the empty prompt's [T,...] in the place of dropped rows."""
    if isinstance(rows, Tensor):
        rows[torch.from_numpy(is_dropped)] = empty.to(rows.dtype)
    else:
        rows[:] = [empty.to(row.dtype) if drop else row for row, drop in zip(rows, is_dropped, strict=True)]


def finish_cond(
    stored: dict[str, Tensor], lengths: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Cond as a training loop takes it: name -> [B,...] in a dtype, and <name>_mask [B,T] bool if it has lengths.

    A mask is true for the tokens of the prompt and false for padding. If the cache has a mask of that name, it is used
    instead. Positions stay float32, since 16-bit floats cannot hold all of them; they get no mask of their own.
    """
    cond = unpack_all(stored, dtype)
    for name, own in lengths.items():
        if not name.endswith(POSITIONS):
            cond.setdefault(f"{name}_mask", mask_of(own, stored[name].shape[1]))
    return cond
