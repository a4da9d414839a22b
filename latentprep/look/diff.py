"""`latentprep diff`: what differs between two caches: images, captions, recipes, and the numbers of what both have."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np

from latentprep.cache.manifest import Manifest, open_manifest, read_skips
from latentprep.cache.names import SKIPPED
from latentprep.cache.storage import Storage
from latentprep.differences import NUM_SHOWN, Compared
from latentprep.errors import UserError
from latentprep.look.catalog import UNKNOWN, Catalog, Problems, add_problem, make_catalog, pair_up, without
from latentprep.look.cond_distances import measure_cond
from latentprep.look.latent_distances import measure_latents
from latentprep.look.summary import count_buckets
from latentprep.progress import Progress
from latentprep.recipe import tell_changes
from latentprep.recipe_words import describe_changes, describe_set_changes, describe_text_changes


def compare(a: Storage, b: Storage, samples: int | None, seed: int, progress: Progress) -> Compared:
    """What differs between two caches. Latents and cond are compared for `samples` random images and prompts that both
    have; None: for all.

    Raises UserError if one of them is no cache. A file that cannot be read is a problem, and the rest is compared.
    """
    problems: Problems = {}
    before, after = open_manifest(a), open_manifest(b)
    with progress.bar(before.num_images + after.num_images, "rows") as bar:
        one = make_catalog("A", a, before, problems, bar.update)
        other = make_catalog("B", b, after, problems, bar.update)
    match = match_rows(one, other)
    captions, captions_shown = compare_captions(one, other, match.pairs)
    prompts = pair_up(one.prompt, other.prompt)
    chosen = choose(match.alike, samples, seed)
    with progress.bar(len(chosen), "latents") as bar:
        latents = measure_latents(one, other, chosen, len(match.alike), problems, bar.update)
    chosen = choose(prompts, samples, seed)
    with progress.bar(len(chosen), "cond", "prompt") as bar:
        cond = measure_cond(one, other, chosen, len(prompts), problems, bar.update)
    return Compared(
        a=a.root,
        b=b.root,
        num_images=(before.num_images, after.num_images),
        only_a=keys_of(one, match.only_a),
        only_b=keys_of(other, match.only_b),
        changed=keys_of(one, match.changed[:, 0]),
        renamed=tuple(sorted((one.keys[i], other.keys[j]) for i, j in match.renamed.tolist())),
        captions=captions,
        captions_shown=captions_shown,
        num_prompts=(len(one.prompt) - len(prompts), len(other.prompt) - len(prompts)),
        recipe=tuple(compare_recipes(before, after)),
        latent=tuple(compare_facts(before, after)),
        sets=tuple(compare_sets(before, after)),
        buckets=tuple(compare_buckets(before, after)),
        skips=tuple(compare_skips(read_reasons(one, problems), read_reasons(other, problems))),
        libraries=tell_changes(before.recipe.libraries, after.recipe.libraries),
        latents=latents,
        cond=cond,
        problems=tuple((name, problem) for (name, _), problem in sorted(problems.items(), key=lambda item: item[0])),
    )


@dataclass(frozen=True, eq=False)
class Match:
    """Which rows of A are which of B; pairs are [K,2] numbers of rows."""

    pairs: np.ndarray  # the same key, or the same content under another
    alike: np.ndarray  # of the pairs, those of the same content
    changed: np.ndarray  # those of other content
    renamed: np.ndarray  # those of another key
    only_a: np.ndarray  # [n]
    only_b: np.ndarray


def match_rows(one: Catalog, other: Catalog) -> Match:
    """Rows belong together by their keys; those that are left, by their content."""
    same_key = pair_up(one.key, other.key)
    rest_a, rest_b = without(len(one.key), same_key[:, 0]), without(len(other.key), same_key[:, 1])
    known_a, known_b = rest_a[one.content[rest_a] != UNKNOWN], rest_b[other.content[rest_b] != UNKNOWN]
    found = pair_up(one.content[known_a], other.content[known_b])
    renamed = np.stack([known_a[found[:, 0]], known_b[found[:, 1]]], axis=1)
    pairs = np.concatenate([same_key, renamed])
    content_a, content_b = one.content[pairs[:, 0]], other.content[pairs[:, 1]]
    is_known = (content_a != UNKNOWN) & (content_b != UNKNOWN)
    return Match(
        pairs,
        alike=pairs[is_known & (content_a == content_b)],
        changed=pairs[is_known & (content_a != content_b)],
        renamed=renamed,
        only_a=np.setdiff1d(rest_a, renamed[:, 0]),
        only_b=np.setdiff1d(rest_b, renamed[:, 1]),
    )


def choose(pairs: np.ndarray, samples: int | None, seed: int) -> np.ndarray:
    """`samples` random ones of the pairs, in their order; None: all."""
    if samples is None or samples >= len(pairs):
        return pairs
    return pairs[np.sort(np.random.default_rng(seed % 2**64).permutation(len(pairs))[:samples])]


def keys_of(cache: Catalog, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(sorted(cache.keys[row] for row in rows.tolist()))


def compare_captions(
    one: Catalog, other: Catalog, pairs: np.ndarray
) -> tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]:
    """Keys in A of pairs with other captions; and of the first of them key, captions in A, in B."""
    mine, theirs = one.caption[pairs[:, 0]], other.caption[pairs[:, 1]]
    differ = pairs[(mine != theirs) & (mine != UNKNOWN) & (theirs != UNKNOWN)].tolist()
    differ.sort(key=lambda pair: one.keys[pair[0]])
    shown = tuple((one.keys[i], caption_at(one, i), caption_at(other, j)) for i, j in differ[:NUM_SHOWN])
    return tuple(one.keys[row] for row, _ in differ), shown


def caption_at(cache: Catalog, row: int) -> str:
    """The captions of a row, with | between; "" if they cannot be read any more."""
    shard, group, place = cache.spot[row].tolist()
    with suppress(UserError):
        return " | ".join(cache.manifest.shards[shard].open_text(cache.storage).groups[group].caption[place])
    return ""


def compare_recipes(before: Manifest, after: Manifest) -> Iterator[str]:
    yield from describe_changes(before.recipe.latents.to_json(), after.recipe.latents.to_json())
    yield from describe_text_changes(before.recipe.text.to_json(), after.recipe.text.to_json())


def compare_facts(before: Manifest, after: Manifest) -> Iterator[str]:
    """What readers know of latents; views are part of the recipe."""
    facts = [{name: value for name, value in m.latent.to_json().items() if name != "views"} for m in (before, after)]
    if changes := tell_changes(*facts):
        yield from changes.split("; ")


def compare_sets(before: Manifest, after: Manifest) -> Iterator[str]:
    mine, theirs = ({facts.name: asdict(facts) for facts in manifest.sets} for manifest in (before, after))
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            yield f"{name}: only in {'A' if name in mine else 'B'}"
        elif changes := "; ".join(describe_set_changes(mine[name], theirs[name])):
            yield f"{name}: {changes}"


def compare_buckets(before: Manifest, after: Manifest) -> Iterator[tuple[str, int, int]]:
    """WxH and the number of images in A and in B, of each bucket for which these differ."""
    mine, theirs = count_buckets(before), count_buckets(after)
    for height, width in sorted(mine.keys() | theirs.keys()):
        if mine[height, width] != theirs[height, width]:
            yield f"{width}x{height}", mine[height, width], theirs[height, width]


def read_reasons(cache: Catalog, problems: Problems) -> dict[str, str]:
    """Key -> why it was skipped. A file that cannot be read is a problem."""
    try:
        return {skip.key: skip.reason for skip in read_skips(cache.storage)}
    except UserError as error:
        add_problem(problems, cache.name, SKIPPED, str(error))
        return {}


def compare_skips(before: dict[str, str], after: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, ""), after.get(key, "")
        if old != new:
            yield key, old, new
