"""All that a report says of a cache, but its pictures."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentprep.cache.manifest import Manifest, read_skips
from latentprep.cache.storage import Storage
from latentprep.look.cards import Card, list_cards
from latentprep.look.findings import Findings, find_all, list_warnings
from latentprep.look.measures import MOST_LOOKED, Images, Looked, list_all, look_at
from latentprep.look.summary import summarize
from latentprep.look.words import Words, count_words
from latentprep.records import Skip

NUM_SKIPS, NUM_REASONS = 4, 50  # of each reason that are shown, and reasons
TEXT_BYTES = 4_000_000  # of captions and prompts in a page


@dataclass(frozen=True, eq=False)
class Report:
    summary: dict[str, Any]
    images: Images
    looked: Looked
    words: Words
    found: Findings
    warnings: list[tuple[str, str]]  # what is unusual, and the part of the page that says more
    num: int  # images that chance has chosen
    seed: int
    cards: list[Card]  # these, and the images that are named
    skips: list[tuple[int, list[Skip]]]  # of each reason: how many files, and the first of them
    patched: bool  # whether the denoiser sees patches


def make_report(storage: Storage, manifest: Manifest, num: int, seed: int, progress: Callable[[int], object]) -> Report:
    """`num`: images in the gallery, chosen by chance. Raises UserError."""
    summary = summarize(storage, 0)
    images = list_all(storage, manifest)
    order = np.random.default_rng(seed % 2**64).permutation(len(images))
    looked = look_at(storage, manifest, images, np.sort(order[:MOST_LOOKED]), progress)
    words = count_words(storage, manifest)
    found = find_all(storage, manifest, images, looked)
    chosen = sorted(found.images().union(order[:num].tolist()))
    return Report(
        summary=summary,
        images=images,
        looked=looked,
        words=words,
        found=found,
        warnings=list(list_warnings(summary, images, looked, words, found)),
        num=min(num, len(images)),
        seed=seed,
        cards=list(list_cards(storage, manifest, images, looked, chosen, TEXT_BYTES // max(1, len(chosen)))),
        skips=group_skips(read_skips(storage)),
        patched=manifest.latent.normalization.patch > 1,
    )


def num_looked(manifest: Manifest) -> int:
    """How many images' latents a report reads; its gallery has fewer at most."""
    return min(manifest.num_images, MOST_LOOKED)


def group_skips(skips: list[Skip]) -> list[tuple[int, list[Skip]]]:
    """Skips by their reason, the most frequent first: how many there are, and the first of them."""
    counts, first = Counter[str](), defaultdict[str, list[Skip]](list)
    for skip in skips:
        counts[skip.reason] += 1
        if counts[skip.reason] <= NUM_SKIPS:
            first[skip.reason].append(skip)
    return [(count, first[reason]) for reason, count in counts.most_common(NUM_REASONS)]
