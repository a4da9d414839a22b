"""The frozen records that flow between the stages. Sizes are (height, width) everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Size = tuple[int, int]  # (height, width) in pixels
MAX_REPEATS = 2**20  # of an image in an epoch
MAX_CONTROLS = 4  # control images of an image
SET_NAME, MAX_SET_NAME = r"(?!\.\.?$)[^/\\\x00]+", 255  # of a set: it begins keys
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def set_of(key: str) -> str:
    """The name of the set of an image, in a cache of several sets."""
    return key.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, before decoding."""

    key: str  # path in the source, with / and extension; in a tar: path of the tar, a slash, the name in the tar
    size: Size  # after EXIF orientation
    nbytes: int  # with its mask and its control images
    version: int  # joined with those of its mask and its control images
    captions: tuple[str, ...] = ()  # empty until captions are searched; then one or more, "" if there is no caption
    caption_origin: str = ""  # where they came from: txt, caption, json, metadata, filename

    def skip(self, reason: str, detail: str) -> "Skip":
        return Skip(self.key, reason, detail, self.nbytes, self.version)

    @property
    def fingerprint(self) -> tuple[str, int, int]:
        """That of its row."""
        return self.key, self.nbytes, self.version

    @property
    def row(self) -> "Row":
        return Row(self.key, self.nbytes, self.version, self.captions)


@dataclass(frozen=True, slots=True)
class Row:
    """What a text file says of one image. All of this may change while the pixels stay the same."""

    key: str
    nbytes: int
    version: int
    captions: tuple[str, ...]

    @property
    def fingerprint(self) -> tuple[str, int, int]:
        """What tells, without reading an image, that it is the one that was encoded."""
        return self.key, self.nbytes, self.version


CHANGES = {
    "new": "not in the cache",
    "changed": "its content is another than the one that was encoded",
    "renamed": "the same content under another name: only the text file is written",
    "touched": "another time, the same content: only the text file is written",
    "returned": "was gone, and is back with the same content",
    "caption": "another caption: only the text file is written",
    "prompt": "prompts are made otherwise, or by another text encoder: only the text file is written",
    "gone": "no longer in the folder: left out, its latents stay until latentprep compact",
}


@dataclass(frozen=True, slots=True)
class Change:
    """Why a run has something to do for an image: `what` is one of CHANGES."""

    key: str
    what: str
    detail: str = ""


# reason -> (one of CONDITIONS: what has to change before the item is tried again, the reason in words)
REASONS = {
    "not_an_image": ("decoder", "its bytes are of no image format that Pillow knows"),
    "unreadable": ("decoder", "its header cannot be read, or its pixels cannot be decoded"),
    "truncated": ("decoder", "the file ends before its pixels do"),
    "damaged": ("limits", "a JPEG that gave a warning when it was decoded; skipped only with --strict-images"),
    "unsupported_mode": ("decoder", "its values have no known range (floats outside 0 to 1, 32-bit integers)"),
    "animated": ("decoder", "it has several frames; skipped only with --animated skip"),
    "bad_caption": (
        "machine",
        "its caption file cannot be read, is too long, or is not text in its encoding (--caption-encoding)",
    ),
    "bad_mask": ("decoder", "its mask cannot be read, or has another shape"),
    "no_control": ("decoder", "a folder of --control, or a column of --control-column, has no control image for it"),
    "too_small": ("decoder", "too small for a bucket without enlarging it (--no-upscale), or below --min-side"),
    "too_large": ("limits", "more pixels than --max-megapixels, or beyond --max-side"),
    "extreme_aspect": ("decoder", "its bucket would keep less than a fiftieth of it"),
    "non_finite": ("encoder", "the VAE overflows on it even in float32"),
    "unreadable_folder": ("machine", "not all files of this folder or tar can be listed; the next run tries again"),
    "io_error": ("machine", "the file cannot be read; the next run tries again"),
    "changed": ("machine", "the file changed between listing and encoding; the next run tries again"),
    "out_of_memory": ("machine", "the device, or this machine, cannot hold this one image; the next run tries again"),
}

# A skip stays valid while the value of its condition is unchanged. "machine" always counts as changed.
CONDITIONS = ("machine", "decoder", "limits", "encoder")


# What had to be done to an image, other than resizing and cropping it; said as "12 images <words>".
NOTES = {
    "enlarged": "enlarged to fill the bucket (latentprep inspect CACHE --list --enlarged; --no-upscale keeps pixels)",
    "oriented": "turned upright by the EXIF orientation",
    "icc_to_srgb": "converted to sRGB from an embedded colour profile",
    "icc_unusable": "with a colour profile that cannot be used, taken as if it were not there",
    "cmyk_without_profile": "in CMYK without a profile, converted by Pillow's plain formula",
    "scaled_to_8_bits": "of 16-bit or float grey, scaled to 8 bits",
    "high_byte": "of more than 8 bits a channel, of which Pillow keeps the upper 8",
    "cicp_to_srgb": "converted to sRGB from the colour space that a PNG's cICP names",
    "cicp_unusable": "with a cICP colour space that is not converted (HDR, and rare ones), taken as sRGB",
    "damaged": "with damage in the JPEG data, so that parts may be wrong (--strict-images leaves them out)",
    "first_frame": "with several frames, of which the first was taken (--animated skip leaves them out)",
    "whitened": "with white in place of a filling below full transparency (--background keep leaves it)",
    "laid_over_background": "with transparency, laid over the background",
    "draft": "decoded at a fraction of the size (--no-draft decodes in full)",
    "mask": "weighted by a mask",
    "control_fitted": "with a control image of another shape, which is fitted to the bucket by itself",
    "control_own_bucket": "with a control image of another shape, which has a bucket of its own",
}
NAMED_NOTES = ("damaged",)  # those that call for a look at the images themselves


@dataclass(frozen=True, slots=True)
class Skip:
    """An item that is not in the cache, and why. `reason` is one of REASONS, for machines; `detail` is for people."""

    key: str
    reason: str
    detail: str
    nbytes: int = -1
    version: int = -1
    condition: str = ""  # the value of its condition when it was skipped; "": every run tries the item again

    def under(self, conditions: Mapping[str, str]) -> "Skip":
        """The skip with the value of its condition. conditions: name -> value in this run, for each of CONDITIONS."""
        return replace(self, condition=conditions[REASONS[self.reason][0]])


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `latentprep verify` found; `problem` is one word for machines, `detail` is for people."""

    name: str  # of the file, or the key of the image
    problem: str
    detail: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of a cache, in one of its views: what a preview shows."""

    shard: int  # its place in the manifest
    group: int
    row: int
    view: int
    note: str = ""  # why it was chosen, for people


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image becomes its bucket: it is resized to `resized_size`, then the box `crop` of it is kept.

    The box has the bucket's size and is in the middle, unless --crop says otherwise. With --fit pad it reaches beyond
    the resized image: then top or left is negative.
    """

    bucket: Size
    resized_size: Size
    crop: Box
    controls: tuple[Size, ...] = ()  # buckets of its control images; (): they are all that of the image

    @property
    def buckets(self) -> tuple[Size, ...]:
        """Its bucket and those of its control images. Images with equal ones are encoded and read together."""
        return self.bucket, *self.controls

    def enlarges(self, size: Size) -> bool:
        """Whether an image of this size gets more pixels than it has."""
        return self.resized_size[0] > size[0] or self.resized_size[1] > size[1]


def list_views(crops: int, flip: bool) -> list[str]:
    """Names of the views of an image, in their order: crop after crop, each as it is and then mirrored."""
    plain = ["plain"] if crops == 1 else [f"crop{k}" for k in range(crops)]
    mirrored = ["flipped"] if crops == 1 else [f"{name}-flipped" for name in plain]
    return [name for pair in zip(plain, mirrored, strict=True) for name in pair[: 1 + flip]]


def is_flipped(view: str) -> bool:
    return view.endswith("flipped")


@dataclass(frozen=True, slots=True)
class Unit:
    """A deterministic list of items that becomes one shard, sorted by (bucket, key)."""

    id: str
    items: tuple[Item, ...]
    placements: tuple[Placement, ...]
    number: int = 0  # in its plan


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """One decoded image, ready for the VAE. A control image is one too.

    It has no weight and no digest. Its notes are kept with those of its target.
    """

    pixels: "np.ndarray"  # [K,H,W,3] uint8, sRGB; K crops
    weight: "np.ndarray | None"  # [K,H/f,W/f] float32 in 0..1; None: all of it weighs 1
    crops: tuple[Box, ...]  # K boxes in the resized image
    digest: bytes = b""  # 16 bytes: content hash of the source file, its mask and its control images
    notes: tuple[str, ...] = ()  # what had to be done to it: some of NOTES
    controls: "tuple[Pixels, ...]" = ()  # its control images, each with as many crops
