"""Files of an item -> oriented, colour-managed, resized and cropped uint8 pixels, and the weight map."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image

from latentprep.cache.schema import CONTROLS
from latentprep.errors import UserError
from latentprep.geometry import Geometry
from latentprep.human import human_bytes
from latentprep.prepare.images.crops import choose_crops
from latentprep.prepare.images.decode import decode, load_mask, resize
from latentprep.prepare.images.pillow import DecodeError, describe, max_bytes, open_image, oriented_size
from latentprep.prepare.images.shrink import torch_has_lanczos
from latentprep.prepare.plan.buckets import Verdict, make_place, place_control, place_own_control
from latentprep.prepare.source.content import new_hash
from latentprep.prepare.source.door import NotRegularError, Source
from latentprep.prepare.source.partners import Partners
from latentprep.recipe import LatentsRecipe
from latentprep.records import NAMED_NOTES, Box, Item, Pixels, Placement, Size, Skip

LARGE_PIXELS = 32_000_000  # an image beyond this is decoded alone: it takes hundreds of MB
LARGE_BYTES = 128_000_000  # a file beyond this is decoded alone too, however few its pixels
one_large_control = Lock()  # held for a large control image: its size is known only here, so LoadAhead cannot bound it


@dataclass(frozen=True)
class LoadOptions:
    """All that decides how image files become pixels, other than their placement."""

    source: Source
    factor: int  # pixels of a latent pixel, each way
    masks: Partners | None
    filter: Image.Resampling
    crop: str
    crops: int
    seed: int
    background: str
    weights: str
    animated: str
    draft: bool
    by_torch: bool  # torch shrinks images, and not Pillow
    strict: bool  # damaged JPEGs are skips
    fit: str
    upscale: bool
    controls: tuple[Partners, ...] = ()
    control_geometry: Geometry | None = None  # for control images' own buckets; None: they have their targets'
    patch: int = 1  # latent pixels of a patch, each way

    def place_control(self, size: Size, target: Size, placement: Placement) -> Placement | Verdict:
        """Where a control image goes, whose target has `placement`."""
        if self.control_geometry is None:
            return place_control(size, target, placement, self.fit, self.upscale)
        return place_own_control(size, target, placement, make_place(self.control_geometry, self.factor * self.patch))

    @classmethod
    def from_recipe(
        cls,
        source: Source,
        factor: int,
        masks: Partners | None,
        recipe: LatentsRecipe,
        strict: bool = False,
        controls: tuple[Partners, ...] = (),
        patch: int = 1,
    ) -> "LoadOptions":
        """The options that the latents part of a recipe says; `strict` is --strict-images, which decides no numbers."""
        geometry = recipe.geometry
        return cls(
            source, factor, masks, strict=strict, controls=controls, fit=geometry.fit, upscale=geometry.upscale,
            filter=Image.Resampling[geometry.filter.upper()], by_torch=is_by_torch(recipe),
            crop=geometry.crop, crops=geometry.crops, seed=geometry.crop_seed or 0, patch=patch,
            control_geometry=geometry if recipe.control_size == "own" else None,
            **vars(recipe.images),
        )  # fmt: skip


def is_by_torch(recipe: LatentsRecipe) -> bool:
    """Whether torch shrinks images here. It is near Pillow, whose pixels --no-draft gives bit for bit."""
    return recipe.images.draft and recipe.geometry.filter == "lanczos" and torch_has_lanczos()


def is_large(item: Item) -> bool:
    """Whether decoding an item needs so much memory that it must be decoded alone."""
    return item.size[0] * item.size[1] > LARGE_PIXELS or item.nbytes > LARGE_BYTES


class ImageError(Exception):
    """Our own code failed on an image, which is named: a fault of this program, and no skip."""


class Part(NamedTuple):
    """One file of an item: of its image, its mask, or a control image."""

    option: str  # the option that names its source: SOURCE, --weights or --control
    source: Source
    key: str
    nbytes: int  # as it was listed
    where: str  # how messages about it begin; "" for the image itself
    data: bytes = b""


class Files(NamedTuple):
    """The files of an item, read."""

    image: Part
    mask: Part | None
    controls: list[Part]

    @property
    def parts(self) -> list[Part]:
        return [self.image, *([self.mask] if self.mask is not None else []), *self.controls]


def load_pixels(
    item: Item, placement: Placement, options: LoadOptions, crops: Sequence[Box] | None = None
) -> Pixels | Skip:
    """The pixels of an item as the VAE is to see them, or the Skip that says why not.

    `crops` are boxes that are known already: those of a row in a cache. Raises ImageError; UserError if the source is
    not there any more.
    """
    files = read_files(item, options)
    if isinstance(files, Skip):
        return files
    nbytes = sum(len(part.data) for part in files.parts)
    if nbytes != item.nbytes:
        return item.skip("changed", f"was {item.nbytes} bytes when listed, now {nbytes}: run again")
    where = ""
    try:
        pixels = make_pixels(files, item, placement, options, crops)
        controls = []
        for number, part in enumerate(files.controls):
            where = part.where
            controls.append(make_control(part.data, number, item, placement, options, pixels.crops))
    except Exception as error:
        if isinstance(error, DecodeError) and error.reason == "bad_mask":
            where = files.mask.where if files.mask is not None else ""
        return skip_undecoded(item, where, error)
    notes = dict.fromkeys((*pixels.notes, *(note for control in controls for note in control.notes)))
    return replace(pixels, notes=tuple(notes), controls=tuple(controls))


def load_controls(
    item: Item, placement: Placement, options: LoadOptions, encoded_key: str, digest: bytes
) -> list[np.ndarray] | Skip:
    """The pixels [H,W,3] of an item's control images as the VAE saw them, or the Skip that says why not.

    `placement`, `encoded_key` and `digest`, the content hash of all its files, are those of when it was encoded: a key
    decides random crops. Raises ImageError and UserError like load_pixels.
    """
    files = read_files(item, options)
    if isinstance(files, Skip):
        return files
    if digest_of(files) != digest:
        return item.skip("changed", "its content, or that of its mask or control images, is not what was encoded")
    where = ""
    try:
        controls = []
        for number, part in enumerate(files.controls):
            where = part.where
            then = replace(item, key=encoded_key)
            made = make_control(part.data, number, then, placement, options, (placement.crop,))
            controls.append(made.pixels[0])
    except Exception as error:
        return skip_undecoded(item, where, error)
    return controls


def skip_undecoded(item: Item, where: str, error: Exception) -> Skip:
    """The Skip of an item, one of whose files cannot be decoded. Raises ImageError for any other fault."""
    if isinstance(error, DecodeError):
        # it was an image when it was listed
        return item.skip("unreadable" if error.reason == "not_an_image" else error.reason, where + error.detail)
    if isinstance(error, MemoryError):
        return item.skip("out_of_memory", where + describe(error))
    raise ImageError(f"{item.key}: {where}{describe(error)}") from error  # whatever it is, it says which image it was


def digest_of(files: Files) -> bytes:
    """The content hash of an item."""
    digest = new_hash()
    for part in files.parts:
        digest.update(part.data)
    return digest.digest()


def read_files(item: Item, options: LoadOptions) -> Files | Skip:
    """The bytes of an item, of its mask if it has one, and of its control images. Raises UserError."""
    parts: list[Part] = []
    for part in list_parts(item, options):
        if isinstance(part, Skip):
            return part
        if part.where and (skip := check_bytes(part, item)) is not None:
            return skip
        parts.append(part)
    found: dict[str, list[Part]] = {"SOURCE": [], "--weights": [], "--control": []}
    for part in parts:
        where = part.where if part.option == "--control" else ""
        try:
            found[part.option].append(part._replace(data=part.source.read(part.key, max_bytes())))
        except (OSError, MemoryError) as error:
            return skip_unread(item, where, error, options)
    return Files(found["SOURCE"][0], next(iter(found["--weights"]), None), found["--control"])


def skip_unread(item: Item, where: str, error: OSError | MemoryError, options: LoadOptions) -> Skip:
    """The Skip of an item, one of whose files cannot be read. Raises UserError if its source is not there any more."""
    if isinstance(error, NotRegularError):
        return item.skip("unreadable", f"{where}{error}")
    if isinstance(error, MemoryError):
        return item.skip("out_of_memory", where + describe(error))
    check_there(options)
    return item.skip("io_error", where + describe(error))


def check_bytes(part: Part, item: Item) -> Skip | None:
    """The Skip of an item one of whose files is larger than any that is read."""
    if part.nbytes <= max_bytes():
        return None
    reason = "bad_mask" if part.option == "--weights" else "too_large"
    detail = f"{human_bytes(part.nbytes)}, expected at most {human_bytes(max_bytes())}"
    return item.skip(reason, part.where + detail)


def read_control_sizes(item: Item, options: LoadOptions) -> list[Size] | Skip:
    """The size of each control image of an item, by its header; or the Skip of what has none. Raises UserError."""
    sizes = []
    for part in list_parts(item, options):
        if isinstance(part, Skip):
            return part
        if part.option != "--control":
            continue
        if (skip := check_bytes(part, item)) is not None:
            return skip
        try:
            sizes.append(read_size(part))
        except DecodeError as error:
            reason = "unreadable" if error.reason in ("not_an_image", "truncated") else error.reason
            return item.skip(reason, part.where + error.detail)
        except (OSError, MemoryError) as error:
            return skip_unread(item, part.where, error, options)
    return sizes


def read_size(part: Part) -> Size:
    """The size of an image, of which as little is read as will do: an orientation may be its last bytes.

    Raises DecodeError, OSError.
    """
    with part.source.open(part.key, max_bytes()) as file, open_image(file) as image:
        return oriented_size(image)


def list_parts(item: Item, options: LoadOptions) -> Iterator[Part | Skip]:
    """The files of an item; a Skip if a control image is not there any more."""
    yield Part("SOURCE", options.source, item.key, item.nbytes, "")
    mask = options.masks.find(item.key) if options.masks is not None else None
    if options.masks is not None and mask is not None:
        where = f"{options.masks.locate(mask)}: "
        yield Part("--weights", options.masks.source, mask.key, mask.nbytes, where)
    for name, own in zip(CONTROLS, options.controls, strict=False):
        control = own.find(item.key)
        if control is None:
            yield item.skip("no_control", f"{name}: {own.why_none}")
        else:
            where = f"its control image {own.locate(control)}: "
            yield Part("--control", own.source, control.key, control.nbytes, where)


def check_there(options: LoadOptions) -> None:
    """Raise UserError if the source, or that of the masks or control images, is not there any more."""
    sources = [("SOURCE", options.source), *(("--control", own.source) for own in options.controls)]
    sources += [("--weights", options.masks.source)] if options.masks is not None else []
    for option, source in sources:
        if not source.is_there():
            raise UserError(
                f"{option} {source.where}: vanished while its images were read. What is encoded is kept: mount it "
                "again, and run the same command."
            ) from None


def make_pixels(
    files: Files, item: Item, placement: Placement, options: LoadOptions, crops: Sequence[Box] | None
) -> Pixels:
    """The pixels of an image file and its mask. Raises DecodeError."""
    notes: list[str] = []
    rgb, alpha = decode(files.image.data, item, placement, options, notes)
    weight = alpha if options.weights == "alpha" else None
    if files.mask is not None:
        weight = load_mask(files.mask.data, item.size, options.strict, notes)
        notes.append("mask")
    if placement.enlarges(item.size):
        notes.append("enlarged")
    placed = place_image(rgb, weight, item, placement, options, crops)
    return Pixels(
        placed.pixels,
        place_weight(weight, placement.resized_size, placed.part, placed.boxes, options.factor),
        placed.crops,
        digest_of(files),
        tuple(notes),
    )


def make_control(
    data: bytes, number: int, item: Item, placement: Placement, options: LoadOptions, crops: tuple[Box, ...]
) -> Pixels:
    """The pixels of a control image: `item`, `placement` and `crops` are those of its target. Raises DecodeError."""
    with open_image(BytesIO(data)) as image:
        size = oriented_size(image)
    own = options.place_control(size, item.size, placement)
    if not isinstance(own, Placement):
        raise DecodeError(*own)
    if own.bucket != (placement.controls[number] if placement.controls else placement.bucket):
        raise DecodeError("changed", "its shape is another than when it was listed: run again")
    control = replace(item, size=size, nbytes=len(data))
    notes: list[str] = []
    with one_large_control if is_large(control) else nullcontext():
        # what is transparent in it has no weight: it is laid over a background
        rgb, _ = decode(data, control, own, replace(options, weights="none"), notes)
        placed = place_image(rgb, None, control, own, options, crops if own is placement else None)
    kept = [note for note in notes if note in NAMED_NOTES]
    if own is not placement:
        kept.append("control_fitted" if options.control_geometry is None else "control_own_bucket")
    return Pixels(placed.pixels, None, placed.crops, notes=tuple(kept))


class Placed(NamedTuple):
    """An image in its bucket."""

    pixels: np.ndarray  # [K,H,W,3] uint8
    crops: tuple[Box, ...]  # K boxes in the resized image
    part: Box  # of the resized image: what was computed of it
    boxes: list[Box]  # the crops in that part


def place_image(
    rgb: Image.Image,
    weight: Image.Image | None,
    item: Item,
    placement: Placement,
    options: LoadOptions,
    crops: Sequence[Box] | None,
) -> Placed:
    """A decoded image resized and cropped; to `crops`, or if that is None to those that --crop chooses."""
    size = placement.resized_size
    part: Box = (0, 0, *size)
    if not placement.enlarges(item.size) and rgb.size != size[::-1]:
        rgb = resize(rgb, size, (rgb.height, rgb.width), options)
    if crops is None:
        crops = choose_crops(rgb, weight, placement, options.crop, options.crops, options.seed, item.key)
    if placement.enlarges(item.size):  # no more than what is kept: a strip of 30000x1 would be 7,680,000x256
        part = kept_part(crops, size)
        rgb = resize_part(rgb, size, part, options.filter)
    boxes = [(top - part[0], left - part[1], height, width) for top, left, height, width in crops]
    pixels = np.asarray(rgb)
    return Placed(np.stack([cut(pixels, box, mode="edge") for box in boxes]), tuple(crops), part, boxes)


def kept_part(crops: Sequence[Box], size: Size) -> Box:
    """The smallest box of an image of this size that holds all that lies in crops."""
    top, left = (max(0, min(box[n] for box in crops)) for n in (0, 1))
    bottom, right = (min(size[n], max(box[n] + box[n + 2] for box in crops)) for n in (0, 1))
    return top, left, bottom - top, right - left


def resize_part(image: Image.Image, size: Size, part: Box, resample: Image.Resampling) -> Image.Image:
    """A part of the image at `size`; what lies outside of it is not computed."""
    top, left, height, width = part
    if image.size == size[::-1] and part == (0, 0, *size):
        return image
    down, right = image.height / size[0], image.width / size[1]
    box = (left * right, top * down, min((left + width) * right, image.width), min((top + height) * down, image.height))
    return image.resize((width, height), resample, box=box)


def place_weight(
    alpha: Image.Image | None, size: Size, part: Box, boxes: Sequence[Box], factor: int
) -> np.ndarray | None:
    """[K,H/f,W/f] float32: alpha in 0..1, area-averaged to latent resolution; padding weighs 0. None: all ones.

    `boxes` lie in the `part` of the image at `size`.
    """
    _, _, box_height, box_width = boxes[0]
    is_padded = box_height > size[0] or box_width > size[1]
    if alpha is None and not is_padded:
        return None
    if alpha is None:
        plane: np.ndarray = np.full(part[2:], 255, np.uint8)
    else:
        # BOX averages areas when it shrinks, and has no overshoot as lanczos has
        plane = np.asarray(resize_part(alpha, size, part, Image.Resampling.BOX))
    planes = np.stack([cut(plane, box, mode="constant") for box in boxes]).astype(np.float32) / 255
    return planes.reshape(-1, box_height // factor, factor, box_width // factor, factor).mean(axis=(2, 4))


def cut(array: np.ndarray, box: Box, mode: str) -> np.ndarray:
    """The box of an array [H,W,...]; np.pad's `mode` fills what lies outside: "edge" repeats the border."""
    top, left, height, width = box
    down, right = top + height - array.shape[0], left + width - array.shape[1]
    margins = [(max(0, -top), max(0, down)), (max(0, -left), max(0, right))] + [(0, 0)] * (array.ndim - 2)
    if any(side for pair in margins for side in pair):
        array = np.pad(array, margins, mode=mode)  # type: ignore[call-overload]
    top, left = max(0, top), max(0, left)
    return array[top : top + height, left : left + width]
