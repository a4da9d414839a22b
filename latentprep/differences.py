"""What diff() returns: what differs between two caches, and how it is said."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from latentprep.human import counted, printable, shortened
from latentprep.records import Problem

if TYPE_CHECKING:
    import numpy as np

NUM_SHOWN = 3  # keys of each kind
NUM_LINES = 12  # of each part
NUM_WORST = 5  # images or prompts with the largest distances
LATENT_UNITS = "root mean square of an image, in standard deviations of A's channels; of weights as they are"
COND_UNITS = "root mean square of a prompt's worst token, in standard deviations of the prompt's cond in A"


@dataclass(frozen=True)
class Distance:
    """How far numbers of A are from those of B, over several images or prompts. 0: all are the same to the bit."""

    num: int  # images, or prompts
    mean: float
    worst: float
    most: tuple[tuple[str, float], ...]  # keys or prompts with the largest distances above 0, the worst first

    @property
    def is_zero(self) -> bool:
        return self.worst == 0  # NaN is not

    def to_json(self) -> dict[str, Any]:
        most = [[name, number_or_none(value)] for name, value in self.most]
        return {"num": self.num, "mean": number_or_none(self.mean), "worst": number_or_none(self.worst), "most": most}


@dataclass(frozen=True)
class Distances:
    """The distances of what both caches have: of images with the same content, or of prompts."""

    num_shared: int  # images or prompts that both caches have
    num_compared: int = 0  # of these, how many were compared
    num_unlike: int = 0  # could not be compared: images of another bucket, crop or view; prompts with other cond shapes
    unlike: tuple[str, ...] = ()  # the first of them
    why_not: str = ""  # why none can be compared
    resized: Mapping[str, int] = field(default_factory=dict)  # control_1, ... -> images that have it in another size
    distances: Mapping[str, Distance] = field(default_factory=dict)  # latent_mean, latent_std, weight, ...; cond

    @property
    def is_zero(self) -> bool:
        is_alike = not self.num_unlike and not self.resized
        return is_alike and all(distance.is_zero for distance in self.distances.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "shared": self.num_shared, "compared": self.num_compared, "unlike": self.num_unlike,
            "unlike_examples": list(self.unlike), "why_not": self.why_not, "resized": dict(self.resized),
            "distances": {name: distance.to_json() for name, distance in self.distances.items()},
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Compared:
    """What diff() found. Keys are sorted."""

    a: str  # where the caches are: folders, or URLs
    b: str
    num_images: tuple[int, int]  # in A, in B
    only_a: tuple[str, ...]  # keys
    only_b: tuple[str, ...]
    changed: tuple[str, ...]  # in both, with other content
    renamed: tuple[tuple[str, str], ...]  # the same content under another key: in A, in B
    captions: tuple[str, ...]  # keys in A of images whose captions differ
    captions_shown: tuple[tuple[str, str, str], ...]  # of the first of them: key, captions in A, in B
    num_prompts: tuple[int, int]  # only in A, only in B
    recipe: tuple[str, ...]  # what differs, in the words of options
    latent: tuple[str, ...]  # what else readers know of latents: normalization, factor, channels
    sets: tuple[str, ...]
    buckets: tuple[tuple[str, int, int], ...]  # WxH, images in A, in B, if these differ
    skips: tuple[tuple[str, str, str], ...]  # key, reason in A, in B; "": not skipped
    libraries: str  # versions of the libraries that made the caches, if they differ; is_same ignores this
    latents: Distances
    cond: Distances
    problems: tuple[tuple[str, Problem], ...]  # "A" or "B", and which of its files cannot be read

    @property
    def is_same(self) -> bool:
        """Whether nothing that was compared differs, and all files could be read."""
        return not self.problems and not self._differs()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `latentprep diff --json` prints them; a distance that is no number is None."""
        return {
            "a": self.a, "b": self.b, "same": self.is_same,
            "images": dict(zip("ab", self.num_images, strict=True)),
            "only_a": list(self.only_a), "only_b": list(self.only_b), "changed": list(self.changed),
            "renamed": [{"a": old, "b": new} for old, new in self.renamed], "captions": list(self.captions),
            "captions_shown": [{"key": key, "a": old, "b": new} for key, old, new in self.captions_shown],
            "prompts_only": dict(zip("ab", self.num_prompts, strict=True)),
            "recipe": list(self.recipe), "latent": list(self.latent), "sets": list(self.sets),
            "buckets": {size: {"a": old, "b": new} for size, old, new in self.buckets},
            "skips": [{"key": key, "a": old or None, "b": new or None} for key, old, new in self.skips],
            "libraries": self.libraries, "latents": self.latents.to_json(), "cond": self.cond.to_json(),
            "problems": [{"cache": which, **asdict(problem)} for which, problem in self.problems],
        }  # fmt: skip

    def list_keys(self) -> Iterator[str]:
        """A line for each image that differs: how, its key, and if it was renamed the key in B; with tabs between."""
        for name, keys in self._keys().items():
            for key in keys:
                yield "\t".join([name, *map(printable, (key,) if isinstance(key, str) else key)])

    def __repr__(self) -> str:
        lines = [f"A  {printable(self.a)}: {counted(self.num_images[0], 'image')}"]
        lines += [f"B  {printable(self.b)}: {counted(self.num_images[1], 'image')}"]
        lines += [line for part in (self._images(), self._facts(), self._numbers()) for line in part]
        lines += [f"unreadable in {which}: {printable(problem.detail)}" for which, problem in self.problems[:NUM_LINES]]
        if len(self.problems) > NUM_LINES:
            lines.append(f"and {len(self.problems) - NUM_LINES:,} more that cannot be read")
        return "\n".join([*lines, f"{printable(self.a)} and {printable(self.b)}: {self._verdict()}"])

    def _differs(self) -> bool:
        found = (
            self.only_a, self.only_b, self.changed, self.renamed, self.captions, self.recipe, self.latent, self.sets,
            self.buckets, self.skips, any(self.num_prompts),
        )  # fmt: skip
        return any(found) or not (self.latents.is_zero and self.cond.is_zero)

    def _verdict(self) -> str:
        if self._differs():
            return "they differ"
        is_part = any(own.num_compared < own.num_shared and not own.why_not for own in (self.latents, self.cond))
        return "nothing differs" + " in what was compared" * (is_part or bool(self.problems))

    def _keys(self) -> dict[str, Sequence[str | tuple[str, ...]]]:
        return {
            "only in A": self.only_a, "only in B": self.only_b, "changed": self.changed, "renamed": self.renamed,
            "caption": self.captions,
        }  # fmt: skip

    def _images(self) -> Iterator[str]:
        for name, keys in self._keys().items():
            if keys:
                shown = [
                    " -> ".join(map(shortened, [key] if isinstance(key, str) else key)) for key in keys[:NUM_SHOWN]
                ]
                yield f"{name:<16} {listed(shown, len(keys))}"
        for key, old, new in self.captions_shown:
            yield f"  {shortened(key)}: {shortened(old)!r} -> {shortened(new)!r}"
        if any(self.num_prompts):
            yield f"{'prompts':<16} {self.num_prompts[0]:,} only in A, {self.num_prompts[1]:,} only in B"
        if self.skips:
            shown = [
                f"{shortened(key)} ({old or 'not skipped'} -> {new or 'not skipped'})" for key, old, new in self.skips
            ]
            yield f"{'skips':<16} {listed(shown[:NUM_SHOWN], len(shown))}"
        if self.buckets:
            shown = [f"{size} {old:,} -> {new:,}" for size, old, new in self.buckets]
            yield f"{'buckets':<16} {listed(shown[:NUM_SHOWN], len(shown))}"

    def _facts(self) -> Iterator[str]:
        for name, lines in (("recipe", self.recipe), ("latents", self.latent), ("sets", self.sets)):
            for line in lines[:NUM_LINES]:
                yield f"{name:<16} {shortened(line, 150)}"
            if len(lines) > NUM_LINES:
                yield f"{name:<16} and {len(lines) - NUM_LINES:,} more"
        if self.libraries:
            yield f"{'made by':<16} {shortened(self.libraries, 150)}"

    def _numbers(self) -> Iterator[str]:
        for found, one, name_of in (
            (self.latents, "image of the same content", shortened), (self.cond, "prompt", quoted),
        ):  # fmt: skip
            ending = one.replace("image", "images").replace("prompt", "prompts")
            what = f"{found.num_shared:,} {one if found.num_shared == 1 else ending} in both"
            if found.why_not:
                yield f"{what}: not compared, {found.why_not}"
                continue
            has_empty = "cond" in found.distances and found.distances["cond"].num > found.num_compared
            yield f"{what}, {found.num_compared:,} compared" + ", and the empty one" * has_empty
            if found.num_unlike:
                how = (
                    "of another bucket, crop or view" if found is self.latents else "with cond of other names or shapes"
                )
                shown = [name_of(name) for name in found.unlike[:NUM_SHOWN]]
                yield f"  {how}: {listed(shown, found.num_unlike)}"
            for name, distance in found.distances.items():
                yield f"  {name:<14} {say_distance(distance, name_of)}"
            for name, count in sorted(found.resized.items()):
                yield f"  {name:<14} of another size in {counted(count, 'image')}: not compared"
            if not all(distance.is_zero for distance in found.distances.values()):
                yield f"  ({LATENT_UNITS if found is self.latents else COND_UNITS})"


def say_distance(distance: Distance, name_of: Callable[[str], str]) -> str:
    if distance.is_zero:
        return "the same"
    most = ", ".join(name_of(key) for key, _ in distance.most[:NUM_SHOWN])
    return f"mean {distance.mean:.2g}, worst {distance.worst:.2g}: {most}"


def quoted(prompt: str) -> str:
    return repr(shortened(prompt, 40)) if prompt else "the empty prompt"


def listed(shown: Sequence[str], count: int) -> str:
    """5: a.png, b.png, c.png, ..."""
    return f"{count:,}: {', '.join(map(printable, shown))}" + (", ..." if count > len(shown) else "")


def distance_of(values: "np.ndarray", name_of: Callable[[int], str]) -> Distance:
    """Mean and worst of the distances [n] of images or prompts; n is 1 or more. NaN counts as the largest.

    name_of: number of an image or prompt -> its key or text.
    """
    import numpy as np

    worst_first = np.argsort(-np.nan_to_num(values, nan=np.inf), kind="stable")[:NUM_WORST].tolist()
    most = tuple((name_of(n), float(values[n])) for n in worst_first if values[n] != 0)
    return Distance(len(values), float(values.mean(dtype=np.float64)), float(values[worst_first[0]]), most)


def number_or_none(value: float) -> float | None:
    return value if isfinite(value) else None  # JSON knows no NaN
