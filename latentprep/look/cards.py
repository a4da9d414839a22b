"""Samples of a cache in the words of a page: what it shows of one image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from latentprep.cache.borrowed import CondFiles
from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.look.measures import Images, Looked
from latentprep.look.samples import say_distance
from latentprep.records import Box, Size, set_of

MOST_KEY = 300  # bytes of a key that are shown: its end
MOST_WORDS = 2000  # bytes of a sample's captions and prompts, at most


@dataclass(frozen=True)
class Window:
    """A part of a resized image, as shares of a frame in percent: left and top edge, width, height."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Frame:
    """How a picture lies in a frame: twice, cut to its crop, and whole with the box of the crop in it."""

    ratio: float  # width over height of the crop
    cut: Window  # the picture in a frame of the crop
    whole_ratio: float
    whole: Window  # the picture in a frame that has room for the image and the crop
    crop: Window  # the crop in the same frame


@dataclass(frozen=True)
class Card:
    """One image."""

    number: int  # in the cache
    key: str
    set: str  # "" if there are none
    bucket: str
    loss: float  # share that its crop cuts away
    weight: float  # mean of its loss weight
    score: float | None  # how far its latents are from the usual; None: they were not read
    captions: Sequence[str]  # cut, if they are long
    prompts: Sequence[str]  # cut; those that are no captions
    tokens: Sequence[int] | None
    facts: Sequence[tuple[str, str]]
    resized: Size
    crop: Box


def list_cards(
    storage: Storage, manifest: Manifest, images: Images, looked: Looked, chosen: Sequence[int], limit: int
) -> Iterator[Card]:
    """Cards of images by their numbers, rising. `limit`: bytes of captions and prompts of each. Raises UserError."""
    scores = dict(zip(looked.images.tolist(), looked.scores.tolist(), strict=True))
    cond_files, opened = CondFiles(storage), -1
    for image in chosen:
        shard, number, row = images.place(image)
        if opened != shard:
            entry, opened = manifest.shards[shard], shard
            text, latents = entry.open_text(storage), entry.open_latents(storage)
            num_tokens = cond_files.of(text).num_tokens
        words, group = text.groups[number], latents.groups[number]
        chosen_prompts = words.prompt_of[row].tolist()
        height, width = images.buckets[images.bucket_of[image]]
        captions = words.caption[row]
        prompts = [text.prompt[n] for n in dict.fromkeys(chosen_prompts) if text.prompt[n] not in captions]
        key, score = words.key[row], scores.get(image)
        yield Card(
            number=image,
            key=cut_start(key, MOST_KEY),
            set=set_of(key) if manifest.sets else "",
            bucket=f"{width}x{height}",
            loss=float(images.losses[image]),
            weight=mean_weight(group, row),
            score=score,
            captions=cut_all(captions, min(limit, MOST_WORDS) // 2),
            prompts=cut_all(prompts, min(limit, MOST_WORDS) // 2),
            tokens=[int(num_tokens[n]) for n in chosen_prompts] if num_tokens is not None else None,
            facts=list(list_facts(group, row, score)),
            resized=(int(group.resized_size[row, 0, 0]), int(group.resized_size[row, 0, 1])),
            crop=box_of(group, row),
        )


def mean_weight(group: LatentGroup, row: int) -> float:
    return 1.0 if group.weight is None else float(group.weight[row, 0].double().mean())


def box_of(group: LatentGroup, row: int) -> Box:
    top, left, height, width = group.crop[row, 0].tolist()
    return top, left, height, width


def list_facts(group: LatentGroup, row: int, score: float | None) -> Iterator[tuple[str, str]]:
    """What is said of an image when its card is open."""
    height, width = group.original_size[row].tolist()
    resized_height, resized_width = group.resized_size[row, 0].tolist()
    top, left, crop_height, crop_width = group.crop[row, 0].tolist()
    mean = group.latent_mean[row, 0].float()
    yield "own size", f"{width}x{height}"
    yield "resized to", f"{resized_width}x{resized_height}"
    yield "crop", f"{crop_width}x{crop_height} at left {left}, top {top}"
    if len(group.flipped) > 1:
        yield "views", f"{len(group.flipped)}, of which this is the first"
    yield "latents", f"{'x'.join(map(str, mean.shape))}, mean {float(mean.mean()):.3f}, std {float(mean.std()):.3f}"
    if group.latent_std is not None:
        yield "posterior std", f"{float(group.latent_std[row, 0].float().mean()):.4f}"
    yield "outlier score", "not read" if score is None else say_distance(score)
    yield "content hash", bytes(group.digest[row].tolist()).hex()


def cut_all(texts: Sequence[str], limit: int) -> list[str]:
    """Texts of at most so many bytes together; what is left out is said."""
    found: list[str] = []
    for n, text in enumerate(texts):
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > limit:
            shown = text.encode("utf-8", "surrogatepass")[:limit].decode("utf-8", "ignore").rstrip()
            more = f" (and {len(texts) - n - 1:,} more)" if n + 1 < len(texts) else ""
            return [*found, f"{shown}... ({len(text):,} characters){more}"]
        found.append(text)
        limit -= size
    return found


def cut_start(text: str, limit: int) -> str:
    """The end of a text, of a path its name."""
    data = text.encode("utf-8", "surrogatepass")
    return text if len(data) <= limit else "..." + data[-limit:].decode("utf-8", "ignore")


def frame_of(resized: Size, crop: Box, shown: Box) -> Frame | None:
    """Where a picture that shows a box of the resized image lies; None if the numbers fit no image.

    Boxes are (top, left, height, width); the crop reaches beyond the image where padding adds to it.
    """
    top, left, height, width = crop
    lies_outside = any(not -crop[n + 2] < crop[n] < resized[n] for n in (0, 1))
    if min(*resized, height, width, *shown[2:]) < 1 or lies_outside or max(resized) > 1e6 * min(resized):
        return None
    upper, leftmost = min(0, top), min(0, left)
    whole = (
        upper, leftmost, max(resized[0], top + height) - upper, max(resized[1], left + width) - leftmost,
    )  # fmt: skip
    return Frame(
        width / height, window(shown, crop), whole[3] / whole[2], window(shown, whole), window(crop, whole)
    )  # fmt: skip


def window(box: Box, frame: Box) -> Window:
    """A box in a frame, both in pixels of the resized image."""
    across, down = 100 / frame[3], 100 / frame[2]
    return Window(
        *np.round(
            [(box[1] - frame[1]) * across, (box[0] - frame[0]) * down, box[3] * across, box[2] * down], 2
        ).tolist()
    )
