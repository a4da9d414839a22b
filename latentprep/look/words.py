"""The words of a cache: how long captions and prompts are, and which tags are frequent."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from latentprep.cache.borrowed import CondFiles, TextCond
from latentprep.cache.manifest import Manifest
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text

NUM_TAGS = 40  # that are shown
MOST_TAGS = 200_000  # distinct ones that are counted at once
MOST_LETTERS = 80  # of a tag


@dataclass(frozen=True, eq=False)
class Words:
    letters: np.ndarray  # characters of each caption
    tokens: np.ndarray | None  # of each distinct prompt, before any is cut; None: they were not counted
    max_tokens: int | None  # longer prompts are cut
    tags: list[tuple[str, int]]  # the most frequent ones, and how many captions have each; none that is there once
    is_rough: bool  # whether there are so many tags that those which are rare at first are counted too low


def list_texts(storage: Storage, manifest: Manifest) -> Iterator[tuple[Shard, Text, TextCond, list[int]]]:
    """Text files with images that count, their cond, and the numbers of the prompts that no text before it borrows too.

    Raises UserError.
    """
    cond_files, seen = CondFiles(storage), set[tuple[str, int]]()
    for shard in manifest.shards:
        if not shard.num_images:
            continue
        text = shard.open_text(storage)
        of_text = cond_files.of(text)
        new = [n for n, place in enumerate(of_text.places()) if place not in seen]
        seen.update(place for place in of_text.places() if place is not None)
        yield shard, text, of_text, new


def count_words(storage: Storage, manifest: Manifest) -> Words:
    """Lengths and tags of all captions and prompts. Raises UserError."""
    letters: list[int] = []
    lengths: list[np.ndarray] = []
    max_tokens, tags, is_rough = None, Counter[str](), False
    for shard, text, of_text, new in list_texts(storage, manifest):
        for group, live in zip(text.groups, shard.live_rows(), strict=True):
            for row in live.tolist():
                captions = group.caption[row]
                letters += map(len, captions)
                tags.update({tag for caption in captions for tag in split_tags(caption)})
        if len(tags) > MOST_TAGS:
            tags, is_rough = Counter({tag: count for tag, count in tags.items() if count > 1}), True
        num_tokens = of_text.num_tokens
        if num_tokens is not None:
            lengths.append(num_tokens[new])
            max_tokens = of_text.max_tokens
    return Words(
        np.array(letters, np.int64),
        np.concatenate(lengths).astype(np.int64) if lengths else None,
        max_tokens,
        [(tag, count) for tag, count in tags.most_common(NUM_TAGS) if count > 1],
        is_rough,
    )


def split_tags(caption: str) -> Iterator[str]:
    """The parts of a caption between commas; long ones are no tags."""
    for part in caption.split(","):
        tag = part.strip()
        if 0 < len(tag) <= MOST_LETTERS:
            yield tag
