"""LatentDataset: a latent cache as a map-style PyTorch dataset."""

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypedDict, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Unpack

from latentprep.cache.int8 import scales_in
from latentprep.cache.leftovers import find_missing
from latentprep.cache.manifest import Manifest, open_manifest
from latentprep.cache.normalization import Normalization
from latentprep.cache.ragged import Ragged
from latentprep.cache.readers import Reading
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import counted, shortened
from latentprep.prompts import load_template
from latentprep.read.arguments import (
    SamplingMethod,
    UseWeight,
    check_at_least_0,
    check_flags,
    check_index,
    check_indices,
    check_int,
    check_location,
    check_sampling_method,
    check_share,
    check_use_weight,
)
from latentprep.read.batch import Cond, CondModel, CondT, LatentBatch, WeightT, cond_model_elsewhere
from latentprep.read.cond import StoredCond, finish_cond
from latentprep.read.describe import show_bucket, show_cond
from latentprep.read.index import Index, Shape
from latentprep.read.order import Batches, EpochIndices
from latentprep.read.parts import Chosen, choose_keys, choose_sets, groups_of, split_by_content
from latentprep.read.prompts import Prompts, Wording, check_cond_model
from latentprep.read.reader import SampleReader, Sampling
from latentprep.read.shards import OpenShards, promised_by
from latentprep.records import MAX_REPEATS

MANY_ROWS = 2**24  # if cache.json names more rows, the sizes of its files are checked before an index is allocated


class Keywords(TypedDict, total=False):
    """The keywords of LatentDataset that no type depends on."""

    latent_sampling_method: SamplingMethod
    repeats: int
    flip_p: float
    caption_dropout: float | None
    template: str | Path | None
    placeholder_token: str
    shuffle_tags: bool
    keep_tags: int
    tag_drop_out: float
    wildcards: bool
    cond_model: CondModel | None
    sample_weight: float
    seed: int


class LatentDataset(Dataset[LatentBatch[CondT, WeightT]], Generic[CondT, WeightT]):
    """A latent cache. An index stands for one image (with repeats, for one of its repetitions).

    cache: folder or URL.
    latent_sampling_method: "once": one draw for each image, the same in every epoch and process; "deterministic": the
        mean; "random": a fresh draw every epoch, which the seed decides.
    repeats: how often an epoch has each image, times the repeats of its set. If an image has several crops or prompts,
        its repetitions use them in turn.
    flip_p: how often the mirrored view is taken, 0..1; the cache needs `encode --flip`.
    include_cond: whether batches hold text embeddings.
    use_weight: True rescales each weight map to a minimum of 0 and a mean of 1, so that losses stay comparable, as the
        web UI did (a constant map becomes ones); "raw" gives alpha or mask as stored, 0..1; a float such as 0.1 is the
        same with this minimum. Images without alpha or mask get ones.
    caption_dropout: how often a sample gets the empty prompt and its cond, 0..1, for classifier-free guidance. None:
        as the sets of the cache say; never, if it has no sets.
    sample_weight: how much the loss of each sample counts, times what its set says; batch.sample_weight has it.
    seed: decides noise, flips and prompts.

    By default a batch has the stored prompts with their stored cond. The following arguments make new prompts from the
    stored captions, for every sample and epoch. If an image has several captions, one of them is used:

    template, placeholder_token: as in `encode`: a shipped name or a file, with [filewords] and [name].
    shuffle_tags, keep_tags: shuffle the comma-separated tags of the caption, all but the first `keep_tags`.
    tag_drop_out: how often each of those tags is left out, 0..1.
    wildcards: {a|b|c} in captions and templates becomes one of its parts.
    cond_model: makes the cond of new prompts, or of stored ones if the cache has no cond: a callable from a list of B
        prompts to [B,T,D], or to a dict of name -> [B,...]. It is called in the training process, when batch.cond is
        used. New prompts without a cond_model need include_cond=False.

    Fields of the cache that have no name of their own in a batch are in batch.fields, name -> [B,...].

    `data[i]` and `data.__getitems__(indices)` give a LatentBatch. All indices of one batch must be of one bucket;
    BucketBatchSampler gives such batches. Raises UserError if the cache is missing, or has not what the arguments need.
    """

    # fmt: off
    # what is in a batch, as types: cond with include_cond, a weight with use_weight
    @overload
    def __init__(
        self: "LatentDataset[Cond, None]", cache: str | Path, *, include_cond: Literal[True] = True,
        use_weight: Literal[False] = False, **keywords: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "LatentDataset[Cond, Tensor]", cache: str | Path, *, include_cond: Literal[True] = True,
        use_weight: Literal[True, "raw"], **keywords: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "LatentDataset[None, None]", cache: str | Path, *, include_cond: Literal[False],
        use_weight: Literal[False] = False, **keywords: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "LatentDataset[None, Tensor]", cache: str | Path, *, include_cond: Literal[False],
        use_weight: Literal[True, "raw"], **keywords: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "LatentDataset[Cond | None, Tensor | None]", cache: str | Path, *, include_cond: bool = True,
        use_weight: bool = False, **keywords: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "LatentDataset[Cond, Tensor]", cache: str | Path, *, include_cond: Literal[True] = True,
        use_weight: float, **keywords: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "LatentDataset[Cond | None, Tensor | None]", cache: str | Path, *, include_cond: bool = True,
        use_weight: UseWeight = False, **keywords: Unpack[Keywords],
    ) -> None: ...
    # fmt: on
    def __init__(  # type: ignore[misc]  # its types are those above
        self,
        cache: str | Path,
        *,
        latent_sampling_method: SamplingMethod = "once",
        repeats: int = 1,
        flip_p: float = 0.0,
        include_cond: bool = True,
        use_weight: UseWeight = False,
        caption_dropout: float | None = None,
        template: str | Path | None = None,
        placeholder_token: str = "",
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        tag_drop_out: float = 0.0,
        wildcards: bool = False,
        cond_model: CondModel | None = None,
        sample_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_location(cache)
        check_flags(include_cond=include_cond)
        sampling = Sampling(
            check_sampling_method(latent_sampling_method), check_share("flip_p", flip_p), check_use_weight(use_weight),
            check_at_least_0("sample_weight", sample_weight),
        )  # fmt: skip
        self.repeats, self.seed = check_int("repeats", repeats, 1, MAX_REPEATS), check_int("seed", seed)
        self.include_cond, self.cond_model = include_cond, cond_model
        lines = load_template(str(template)) if template is not None else None
        wording = Wording(lines, placeholder_token, shuffle_tags, keep_tags, tag_drop_out, wildcards)
        self.storage = Storage(cache)
        self._reading = Reading(self.storage)  # before the manifest is read, so that no file that it names is deleted
        self.manifest = open_manifest(self.storage)
        check_sizes(self.storage, self.manifest)
        self._index = Index(self.manifest.shards, self.repeats, sets=self.manifest.sets)
        stored = StoredCond(self.storage, self.manifest)
        check_cond_model(cond_model, wording, include_cond=include_cond, is_stored=stored.is_there)
        self._prompts = Prompts(wording, stored, include_cond=include_cond, caption_dropout=caption_dropout)
        self._shards = OpenShards(self.storage, self.manifest, self._index.groups, needs_cond=include_cond)
        self._reader = SampleReader(self.manifest, self._shards, self._prompts, sampling)
        self._epoch = make_epoch()
        self._split: dict[int, tuple[float, float]] = {}  # seed -> range of hashes, 0 to 1, of the images in this part
        self._check()

    def _check(self) -> None:
        """Raise UserError if the cache lacks what is asked for."""
        method, root = self.latent_sampling_method, self.storage.root
        if method != "deterministic" and not promised_by(self.manifest).has_std:
            raise UserError(
                f"latent_sampling_method={method!r}: {root} holds means only. "
                "Use 'deterministic'; or encode with --store mean+std, if its VAE gives a std."
            )
        if self.flip_p and not self._reader.has_mirrored:
            raise UserError(f"flip_p={self.flip_p}: {root} holds no mirrored views. Encode with --flip.")
        self._check_dropout()
        if self._index.num_images == 0:
            raise UserError(f"{root}: the cache is empty, there is nothing to train on.")

    def _check_dropout(self) -> None:
        """Raise UserError if captions are to be dropped, and no image has cond of the empty prompt."""
        stored, share = self._prompts.stored, self._prompts.caption_dropout
        is_asked = share > 0 if share is not None else any(own.caption_dropout > 0 for own in self.manifest.sets)
        is_stored = self.include_cond and stored.is_there and not self._prompts.wording.makes_prompts
        if is_asked and is_stored and not stored.has_empty:
            raise UserError(
                f"caption_dropout: {self.storage.root} has no cond of the empty prompt, which depends on control "
                "images here. Encode with --image-uncond, or give caption_dropout=0."
            )

    @property
    def latent_sampling_method(self) -> SamplingMethod:
        return self._reader.sampling.method

    @property
    def flip_p(self) -> float:
        return self._reader.sampling.flip_p

    @property
    def use_weight(self) -> UseWeight:
        return self._reader.sampling.use_weight

    @property
    def sample_weight(self) -> float:
        return self._reader.sampling.sample_weight

    @property
    def normalization(self) -> Normalization:
        """How stored latents become what the denoiser sees: patch, shift and scale."""
        return self.manifest.latent.normalization

    @property
    def num_images(self) -> int:
        return self._index.num_images

    @property
    def num_controls(self) -> int:
        """Control images of each image: batch.control has their latents."""
        return self._reader.num_controls

    @property
    def buckets(self) -> list[Shape]:
        """[C,h,w] of the latents of each bucket; and [h,w] of each control image, if they have sizes of their own."""
        return self._index.buckets

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        sizes = [show_bucket(shape) for shape in self.buckets[:4]] + ["..."] * (len(self.buckets) > 4)
        shown = [shortened(name, 20) for name in self.sets[:4]] + ["..."] * (len(self.sets) > 4)
        parts = [
            counted(self.num_images, "image") + (f" x {self.repeats} repeats" if self.repeats > 1 else ""),
            *([f"{counted(len(self.sets), 'set')} {' '.join(shown)}"] if self.sets else []),
            f"{counted(len(self.buckets), 'bucket')} {' '.join(sizes)}",
            counted(self._reader.num_views, "view"),
            *([counted(self.num_controls, "control image")] if self.num_controls else []),
            self.latent_sampling_method,
        ]
        return f"LatentDataset({shortened(self.storage.root, 200)}: {', '.join(parts)}, {self._describe_cond()})"

    def _describe_cond(self) -> str:
        """Names and shapes of the cond, as far as a shard was opened."""
        if not self.include_cond or not (self._prompts.stored.is_there or self.cond_model is not None):
            return "no cond"
        if self.cond_model is not None:
            return "cond by cond_model"
        return f"cond {show_cond(self._shards.cond or {}) or 'stored'}"

    def set_epoch(self, epoch: int) -> None:
        """The epoch that flips and random draws depend on; LatentLoader sets it."""
        self._epoch.fill_(check_int("epoch", epoch, 0) % 2**63)

    def sizes_of_buckets(self) -> list[int]:
        """Samples of each bucket, in the order of `buckets`."""
        return self._index.sizes_of_buckets()

    def counts_at_most(self) -> list[np.ndarray]:
        """[buckets] int64, in a list of one array: samples that every epoch takes of each bucket."""
        return [np.array(self.sizes_of_buckets(), np.int64)]

    def samples_before(self, epoch: int) -> list[int]:
        """How many samples of each bucket all earlier epochs have taken: each epoch takes all of them."""
        return [size * epoch for size in self.sizes_of_buckets()]

    def samples_of_bucket(self, bucket: int, numbers: np.ndarray) -> np.ndarray:
        """Indices [B] of samples given by their numbers in a bucket: round after round, image after image."""
        return self._index.samples_of_bucket(bucket, numbers)

    def describe_state(self) -> dict[str, Any]:
        """Name -> JSON value of all that decides the order, noise and prompts of an epoch; state_dict stores it."""
        return {
            "dataset_seed": self.seed, "repeats": self.repeats, "flip_p": self.flip_p,
            "latent_sampling_method": self.latent_sampling_method, **self._prompts.describe_state(),
            "cache": self._index.digest,
            **({"sets": self._reader.sets.describe_state()} if self.sets else {}),
        }  # fmt: skip

    @property
    def sets(self) -> list[str]:
        """Names of the sets of the cache; none, if all its images are of one source."""
        return list(self._reader.sets.names)

    def select(
        self,
        keys: str | Iterable[str] | Callable[[str], object] | None = None,
        *,
        set: str | Iterable[str] | None = None,  # noqa: A002
    ) -> Self:
        """The part of the data whose keys fit, as a dataset that reads the same files.

        keys: a pattern ("birds/*.png"; * is any text, / too), a list of keys, or a function from a key to True or
        False. set: the name of a set, or several. Raises UserError if none is left, or a key of the list is not there.
        """
        if set is None:
            return self._part(choose_keys(self._index, self._shards, keys))
        part = self._part(choose_sets(self._index, self.sets, set))
        return part if keys is None else part.select(keys)

    def split(self, share: float, *, seed: int = 0) -> tuple[Self, Self]:
        """(train, val) for `train, val = data.split(0.05)`: val has about this share of the images, train the rest.

        Only the content of an image decides its side. So it stays there when images are added, removed or renamed;
        equal images are on the same side; and another dataset of the same images is split in the same way. A side can
        be split again. Another seed gives another split. The content hashes of all images are read. Raises UserError
        if a side would have no image.
        """
        check_share("share", share)
        low, high = self._split.get(check_int("seed", seed), (0.0, 1.0))  # the hashes of the images in this part
        edge, seed = low + share * (high - low), int(seed)
        rest, part = split_by_content(self._index, self._shards, edge, int(seed))
        sides = self._part(rest), self._part(part)
        sides[0]._split, sides[1]._split = (
            {**self._split, int(seed): (edge, high)},
            {**self._split, int(seed): (low, edge)},
        )
        return sides

    def digests(self) -> np.ndarray:
        """[n] uint64: half of the content hash of each image, in the order of the dataset."""
        found = [group.digest[rows] for _, rows, group in groups_of(self._index, self._shards)]
        return np.concatenate(found)

    def choose(self, is_chosen: np.ndarray) -> Self:
        """The images for which is_chosen is true, as a dataset. is_chosen: [n] bool, one for each image, in order."""
        parts = zip(self._index.rows(), self._index.split(is_chosen), strict=True)
        return self._part({group: rows[own] for (group, rows), own in parts})

    def samples_in(self, whole: Self, images: np.ndarray) -> np.ndarray:
        """[n] int64: the index in `whole` of each sample of this dataset, which is a part of it.

        images: the numbers in `whole` of the images of this part, ascending.
        """
        own, repetitions = self._index.split_samples(np.arange(len(self)))
        return whole._index.join_samples(images[own], repetitions)

    def _part(self, chosen: Chosen) -> Self:
        part = copy(self)
        part._index, part._epoch = self._index.choose(chosen), make_epoch()
        return part

    def __copy__(self) -> Self:
        """The same process keeps the cond_model, unlike another one (__getstate__)."""
        new = object.__new__(type(self))
        new.__dict__ = {**self.__dict__}
        return new

    def key(self, index: int) -> str:
        """Key of an image: its path in the source; in a cache of several sets it begins with the name of the set."""
        (number,), (row,) = self._index.find(np.array([index]))
        return self._shards[int(number)].key[int(row)]

    def caption(self, index: int) -> list[str]:
        """The captions of an image."""
        (number,), (row,) = self._index.find(np.array([index]))
        return self._shards[int(number)].caption[int(row)]

    def uncond(self) -> dict[str, Tensor] | None:
        """Cond of the empty prompt, name -> [1,T,D] float32, for classifier-free guidance; None with --no-cond.

        It has the names of batch.cond, masks too. None also if it depends on control images: then caption_dropout
        takes that of each image, if there is any.
        """
        stored = self._prompts.stored
        if not stored.is_there or stored.sees_images:
            return None
        with torch.device("cpu"):
            rows = {name: value[0][None] for name, value in stored.empty().items()}
            scales = scales_in(stored.empty())
            ragged = [n for n, value in stored.empty().items() if isinstance(value, Ragged) and n not in scales]
            return finish_cond(rows, {name: torch.tensor([rows[name].shape[1]]) for name in ragged})

    def __getitem__(self, index: int) -> LatentBatch[CondT, WeightT]:
        return self.__getitems__([check_index(index)])

    def __getitems__(self, indices: list[int]) -> LatentBatch[CondT, WeightT]:
        """The batch of these samples. The epoch comes with the sampler's indices, or else from set_epoch."""
        epoch = indices.epoch if isinstance(indices, EpochIndices) else int(self._epoch)
        return self.read(indices, epoch)

    def read(self, indices: list[int], epoch: int) -> LatentBatch[CondT, WeightT]:
        """The batch of these samples in this epoch. Raises IndexError for an index out of range, else UserError."""
        samples = check_indices(indices)
        (batch,) = self.read_many(Batches(self._index.check(samples), np.array([0, len(samples)])), epoch)
        return batch

    def read_many(self, batches: Batches, epoch: int) -> Iterator[LatentBatch[CondT, WeightT]]:
        """An iterator over several batches of an epoch; each batch is read when the iterator reaches it."""
        for batch in self._reader.read(self._index, batches, self.seed, epoch):
            self.give_cond_model(batch)
            yield batch  # type: ignore[misc]  # of the types that the arguments say

    def give_cond_model(self, batch: LatentBatch) -> None:
        """Put the cond_model into a batch that comes from another process."""
        batch.cond_model = self.cond_model if self.include_cond else None

    @staticmethod
    def collate(batch: "LatentBatch | list[LatentBatch]") -> LatentBatch:
        """For DataLoader's collate_fn: __getitems__ has made the batch already."""
        if isinstance(batch, LatentBatch):
            return batch
        if len(batch) == 1:
            return batch[0]
        raise UserError("collate: DataLoader did not fetch a whole batch at once. Use LatentLoader.")

    def __getstate__(self) -> dict[str, Any]:
        # a text encoder stays where it is; LatentLoader gives it to the batches that come back
        return {**self.__dict__, "cond_model": None if self.cond_model is None else cond_model_elsewhere}


def check_sizes(storage: Storage, manifest: Manifest) -> None:
    """Raise UserError if a large cache has a file that is missing or of another size than the manifest says.

    Otherwise a manifest that lies about its rows would make the index take all memory.
    """
    num_rows = sum(shard.num_rows for shard in manifest.shards)
    if num_rows > MANY_ROWS and (missing := find_missing(storage, manifest.shards)):
        raise UserError(f"{storage.root}: {next(iter(missing.values()))}.")


def make_epoch() -> Tensor:
    """The number of an epoch, [] int64, seen by workers that are kept between epochs."""
    return torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
