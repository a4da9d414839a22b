"""What in a cache calls for a look: images that stand out, and lines that say what is unusual."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.human import counted
from latentprep.look.alike import find_near, num_compared
from latentprep.look.measures import Channels, Images, Looked
from latentprep.look.rows import group_duplicates
from latentprep.look.words import Words

NUM_WORST, NUM_PAIRS = 12, 12  # that are shown
NUM_GROUPS, NUM_EACH = 6, 6  # of duplicates
LARGE_LOSS = 0.25  # share of an image
MEANS, STDS = 1.0, (0.5, 2.0)  # a channel is unusual if its mean is beyond the one, or its std outside of the other


@dataclass(frozen=True, eq=False)
class Findings:
    """Images that stand out, by their numbers in the cache."""

    cropped: list[int]  # those that lose most, the worst first
    outliers: list[int]  # those with the most unusual latents
    num_double: int  # images of equal content
    num_double_groups: int
    doubles: list[tuple[int, list[int]]]  # of the first groups: how many images each has, and the first of them
    near: list[tuple[float, int, int]]  # distance of the nearest pairs, and their two images
    num_near: int  # images that have an earlier one near
    num_compared: int

    def images(self) -> set[int]:
        """All that are named."""
        pairs = {image for _, *pair in self.near for image in pair}
        return {*self.cropped, *self.outliers, *(image for _, own in self.doubles for image in own), *pairs}


def find_all(storage: Storage, manifest: Manifest, images: Images, looked: Looked) -> Findings:
    """Images that stand out, of all kinds. Raises UserError."""
    num_double, num_groups, groups = group_duplicates(storage, manifest, NUM_GROUPS, NUM_EACH)
    doubles = [(count, [number_of(images, place) for place in places]) for count, places in groups]
    count = num_compared(len(looked.images), looked.averaged.shape[1])
    part = np.linspace(0, len(looked.images) - 1, count).round().astype(int)  # evenly spread; all of them if they fit
    pairs, away = find_near(looked.averaged[part], looked.digests[part])
    numbers = looked.images[part]
    near = [(float(d), int(numbers[a]), int(numbers[b])) for d, (a, b) in zip(away, pairs, strict=True)]
    return Findings(
        cropped=[n for n in most(images.losses) if images.losses[n] > 0],
        outliers=[int(looked.images[n]) for n in most(looked.scores) if looked.scores[n] > 0],
        num_double=num_double,
        num_double_groups=num_groups,
        doubles=doubles,
        near=near[:NUM_PAIRS],
        num_near=len(near),
        num_compared=count,
    )


def most(values: np.ndarray) -> list[int]:
    """Numbers of the largest values, the largest first, of equals the first."""
    found: list[int] = np.argsort(-values, kind="stable")[:NUM_WORST].tolist()
    return found


def number_of(images: Images, place: tuple[int, int, int]) -> int:
    """The number of the image at a place."""
    return int(np.flatnonzero((images.places == place).all(axis=1))[0])


def list_warnings(
    summary: dict[str, Any], images: Images, looked: Looked, words: Words, found: Findings
) -> Iterator[tuple[str, str]]:
    """What is unusual, in a line each, and the part of the page that says more."""
    skipped = sum(summary["skipped"].values())
    if skipped:
        yield f"{counted(skipped, 'file')} of the source {'is' if skipped == 1 else 'are'} not in the cache.", "skipped"
    lost = int((images.losses > LARGE_LOSS).sum())
    if lost:
        yield f"{tell(lost)} more than a quarter to {'its' if lost == 1 else 'their'} crop.", "crops"
    bad = len(looked.images) - looked.channels.num_rows
    if bad:
        yield (
            f"{counted(bad, 'image')} with latents that are not finite: encode again, or run latentprep verify.",
            "latents",
        )
    unusual = list_unusual(looked.channels)
    if unusual:
        some = ", ".join(map(str, unusual[:8])) + (", ..." if len(unusual) > 8 else "")
        yield f"Far from a unit normal: latents of channel {some}.", "latents"
    if found.num_double:
        groups = counted(found.num_double_groups, "group")
        yield f"{counted(found.num_double, 'image')} in {groups} have the same content.", "duplicates"
    if found.num_near:
        are = "is" if found.num_near == 1 else "are"
        yield f"{counted(found.num_near, 'image')} {are} nearly the same as another.", "duplicates"
    empty = int((words.letters == 0).sum())
    if empty:
        yield f"{counted(empty, 'caption')} {'is' if empty == 1 else 'are'} empty.", "captions"
    cut = summary["text"]["truncated_prompts"]
    if cut:
        window = summary["text"]["max_tokens"]
        yield f"{counted(cut, 'prompt')} {'is' if cut == 1 else 'are'} cut: longer than {window} tokens.", "captions"


def tell(count: int) -> str:
    return f"{counted(count, 'image')} {'loses' if count == 1 else 'lose'}"


def list_unusual(channels: Channels) -> list[int]:
    """Channels that are far from a unit normal."""
    if not channels.num_rows:
        return []
    is_far = (np.abs(channels.mean) > MEANS) | (channels.std < STDS[0]) | (channels.std > STDS[1])
    found: list[int] = np.flatnonzero(is_far).tolist()
    return found
