"""OpenShards: groups of shards, memory-mapped when first used, and checked against what the manifest promises."""

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.borrowed import CondFiles, Kind, TextCond
from latentprep.cache.group import LatentGroup, TextGroup
from latentprep.cache.manifest import Manifest
from latentprep.cache.schema import CONTROLS
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text
from latentprep.errors import UserError
from latentprep.read.describe import show_dtype
from latentprep.read.rows import Addresses, OpenRows

MAX_OPEN = 16_000  # groups, of two memory maps each: Linux allows a process 65,530 maps
# fields that do not go into batch.fields
KNOWN = frozenset({
    "latent_mean", "latent_std", "weight", "original_size", "resized_size", "crop", "flipped", "digest",
    "prompt_of", "uncond_of", "nbytes", "version", *CONTROLS,
})  # fmt: skip


def list_columns(group: LatentGroup, words: TextGroup) -> Iterator[tuple[str, str, Tensor]]:
    """(name, shape in letters as in schema.py, values) of each field of numbers of a group, in both files."""
    for part in (group, words):
        for field in part.table():
            value = part.columns.get(field.name)
            if value is not None and isinstance(field.kind, frozenset):
                yield field.name, field.shape, torch.as_tensor(value)


class OpenGroup:
    """One group of a shard, memory-mapped: N images in V views. View v of image n is row n * V + v."""

    def __init__(self, group: LatentGroup, words: TextGroup, text: Text, cond: TextCond | None) -> None:
        """cond: of all prompts; None: it is not needed."""
        count, self.num_views = group.latent_mean.shape[:2]
        self.shape = tuple(group.latent_mean.shape[2:])
        self.of_view: dict[str, Tensor] = {}  # field -> [N*V,...]
        self.of_image: dict[str, Tensor] = {}  # field -> [N,...]
        for name, letters, value in list_columns(group, words):
            if not letters.startswith("N"):  # one for all images
                value, letters = value.expand(count, *value.shape), f"N{letters}"
            if letters.startswith("NV"):
                self.of_view[name] = value.flatten(0, 1)
            else:
                self.of_image[name] = value
        self.others = [name for name in (*self.of_view, *self.of_image) if name not in KNOWN]
        self.mean, self.std = self.of_view["latent_mean"], self.of_view.get("latent_std")
        self.controls = group.controls
        if "weight" not in self.of_view:  # all of the group weighs 1
            ones = torch.ones((), dtype=torch.float16)
            self.of_view["weight"] = ones.expand(count * self.num_views, *self.shape[1:])
        self.digest = group.digest.numpy().view(np.uint64)[:, 0]  # [N]: half of each image's content hash
        self.key, self.caption, self.prompt_of = words.key, words.caption, words.prompt_of
        self.prompt, self.cond = text.prompt, cond
        # the cond of the text file, if no prompt of it borrows from another file; else empty
        self.own_cond = text.cond if cond is not None and not cond.is_borrowed else {}


class OpenShards:
    """The groups of a cache by number, opened when they are first asked for; each process opens its own."""

    def __init__(self, storage: Storage, manifest: Manifest, groups: list[tuple[int, int]], needs_cond: bool) -> None:
        """groups: for each, the number of its shard and its number in it. needs_cond: whether cond is opened."""
        self.storage, self.manifest, self.groups, self.needs_cond = storage, manifest, groups, needs_cond
        self.cond_files = CondFiles(storage)
        self.opened: dict[int, OpenGroup] = {}
        self.addresses: dict[str, Addresses] = {}  # of the fields of open groups
        self.is_open = np.zeros(len(groups), bool)
        self._lock = threading.RLock()  # several threads may read
        # name -> dtype and shape of a row. The first group that is opened decides; None: none was opened yet
        self.cond: dict[str, Kind] | None = None

    def __getitem__(self, number: int) -> OpenGroup:
        """Raises UserError for files that are missing, damaged, or not what the manifest promises."""
        with self._lock:
            group = self.opened.get(number)
            if group is not None:
                return group
            with torch.device("cpu"):  # whatever the training loop has made the default
                group = self._open(number)
            if len(self.opened) >= MAX_OPEN:
                first = next(iter(self.opened))  # the one that was opened first
                del self.opened[first]
                self.is_open[first] = False
                for addresses in self.addresses.values():
                    addresses.put(first, None)
            self.opened[number], self.is_open[number] = group, True
            self._note_addresses(number, group)
            return group

    def _note_addresses(self, number: int, group: OpenGroup) -> None:
        fields = {**group.of_view, **group.of_image}
        fields |= {f"cond/{name}": cond for name, cond in group.own_cond.items() if isinstance(cond, Tensor)}
        for name, tensor in fields.items():
            if name not in self.addresses:
                self.addresses[name] = Addresses(len(self.groups))
            self.addresses[name].put(number, tensor)

    def rows(self, groups: np.ndarray, image_rows: np.ndarray, views: np.ndarray) -> OpenRows:
        """The rows of n samples; their groups are opened. For each sample [n]: its group, row in the group, and view.

        Raises UserError like __getitem__.
        """
        with self._lock:  # so that the addresses are those of the groups that it holds
            opened = {number: self[number] for number in np.unique(groups).tolist()}
            addresses = {name: known.of(groups) for name, known in self.addresses.items()}
        whole = slice(0, len(groups))
        view_rows = image_rows * len(self.manifest.latent.views) + views
        return OpenRows(opened, addresses, whole, groups, image_rows, view_rows)

    def __getstate__(self) -> dict[str, Any]:
        nothing = {"opened": {}, "addresses": {}, "is_open": np.zeros(len(self.groups), bool), "_lock": None}
        return {**self.__dict__, **nothing}  # memory maps are opened anew in each process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": threading.RLock()}

    def _open(self, number: int) -> OpenGroup:
        shard, own = self.groups[number]
        entry = self.manifest.shards[shard]
        latents = entry.open_latents(self.storage)
        text = entry.open_text(self.storage)
        cond = self.cond_files.of(text) if self.needs_cond else None
        group = OpenGroup(latents.groups[own], text.groups[own], text, cond)
        self._check(group, self.storage.locate(entry.latents_name))
        return group

    def _check(self, group: OpenGroup, where: str) -> None:
        """Raise UserError if a group is not what the manifest promises, or if its cond differs from groups read before.

        The first group that is checked decides what cond the others must have (self.cond).
        """
        is_promised = kept_by(group) == promised_by(self.manifest)
        cond = dict(group.cond.kinds) if group.cond is not None else {}
        if not self.needs_cond:
            self.cond = {}
        has_cond = self.manifest.has_cond
        if self.cond is None and bool(cond) == has_cond:
            self.cond = cond
        if self.needs_cond and is_promised and has_cond and not cond:
            raise UserError(
                f"{where}: its images have no cond yet, as encode --only latents leaves them. "
                "Run the same latentprep encode with --only text."
            )
        if not is_promised or cond != self.cond:
            raise UserError(
                f"{where}: this shard and its text do not fit the others, or cache.json "
                "(views, dtype, std, control images or cond). Run latentprep verify."
            )


class Promise(NamedTuple):
    """What every group of a cache must have."""

    num_views: int
    dtype: str
    has_std: bool
    controls: tuple[str, ...]  # fields


def promised_by(manifest: Manifest) -> Promise:
    recipe = manifest.recipe.latents
    controls = CONTROLS[: recipe.num_controls or 0]
    return Promise(len(manifest.latent.views), recipe.store_dtype, recipe.store != "mean", controls)


def kept_by(group: OpenGroup) -> Promise:
    dtypes = {value.dtype for value in (group.mean, group.std, *group.controls.values()) if value is not None}
    dtype = show_dtype(group.mean.dtype) if len(dtypes) == 1 else "several"
    return Promise(group.num_views, dtype, group.std is not None, tuple(group.controls))
