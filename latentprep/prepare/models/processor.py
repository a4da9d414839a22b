"""The processor of a text encoder that sees images: prompts with images -> what the encoder takes.

It stands in the place of transformers' Qwen2VLProcessor, which also needs a processor of videos, and so torchvision.
Images are resized by Pillow, whether torchvision is there or not: so cond does not depend on that.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from math import isclose, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.files import blame, class_of, read_json
from latentprep.prepare.models.load_text import known_class

if TYPE_CHECKING:
    from PIL import Image

IMAGE_TOKEN = "<|image_pad|>"
MAX_PIXELS = 2**25  # of an image as the encoder is to see it; those of models known here are 12,845,056
# what its config may call what resizes images, by torch or by Pillow
IMAGE_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
BY_PILLOW = ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")  # its names from transformers 5 on, and up to 4
# what it does in any case; a config that says something else is of another processor
ALWAYS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}


def read_processor(folder: Path, vision: Any, option: str) -> dict[str, Any]:
    """What the config of an image processor says, checked: arguments of its class.

    `vision` is the part of the encoder's config that is about images. Raises UserError for what does not go with it,
    and for what would make huge images.
    """
    path, found = find_config(folder, option)
    kind = found.get("image_processor_type", IMAGE_PROCESSORS[0])
    if kind not in IMAGE_PROCESSORS:
        raise UserError(
            f"{option}: {path} says that it is a {shortened(str(kind))}, expected {' or '.join(IMAGE_PROCESSORS)}. "
            "Other classes are never loaded."
        )
    own = {
        "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }  # fmt: skip
    for name, value in own.items():
        check(folder.parent, f"vision_config.{name}", value, is_count(value), f"1 to {MAX_PIXELS:,}", option)
    for name, wanted in {**own, **ALWAYS}.items():
        check(path, name, found.get(name), found.get(name) in (None, wanted), str(wanted), option)
    scale = found.get("rescale_factor")
    is_known = scale is None or (type(scale) is float and isclose(scale, 1 / 255, rel_tol=1e-6))
    check(path, "rescale_factor", scale, is_known, "1/255", option)
    size = found["size"] if isinstance(found.get("size"), dict) else {}
    least = found.get("min_pixels") or size.get("shortest_edge")
    most = found.get("max_pixels") or size.get("longest_edge")
    for name, value in (("min_pixels", least), ("max_pixels", most)):
        check(path, name, value, is_count(value), f"1 to {MAX_PIXELS:,}", option)
        own[name] = value
    check(path, "max_pixels", most, own["min_pixels"] <= own["max_pixels"], f"{least:,} or more", option)
    for name in ("image_mean", "image_std"):
        if found.get(name) is not None:
            check(path, name, found[name], is_color(found[name]), "three numbers above 0", option)
            own[name] = found[name]
    return own


def find_config(folder: Path, option: str) -> tuple[Path, dict[str, Any]]:
    """The config of an image processor: a file of its own, or from transformers 5 on a part of the processor's."""
    whole = folder / "processor_config.json"
    if whole.is_file() and not (folder / "preprocessor_config.json").is_file():
        part = read_json(whole, option).get("image_processor")
        check(whole, "image_processor", part, isinstance(part, dict), "an object", option)
        return whole, part  # type: ignore[return-value]  # it was checked
    path = folder / "preprocessor_config.json"
    return path, read_json(path, option)


def is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_PIXELS


def is_color(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(part) in (int, float) and isfinite(part) and part > 0 for part in value)
    )


def check(path: Path, name: str, value: object, is_right: bool, expected: str, option: str) -> None:
    """Raise UserError for what a config says, unless it is right."""
    if not is_right:
        raise UserError(
            f"{option}: {path} says {name} is {shortened(repr(value))}, expected {expected}. Download it again."
        )


def check_image_token(tokenizer: Any, wanted: object, where: str) -> None:
    """Raise UserError where a tokenizer does not know the token that its text encoder takes for an image."""
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found != wanted:
        raise UserError(
            f"{where}: its tokenizer has {IMAGE_TOKEN} as number {found}, but its text encoder knows images by "
            f"{shortened(repr(wanted))}. Download it again."
        )


class Processor:
    """Prompts and their images as a Qwen2.5-VL takes them: an image token for every patch of an image."""

    def __init__(self, tokenizer: Any, config: Mapping[str, Any], where: str) -> None:
        """config: as read_processor gives it. Raises UserError if these make no processor."""
        self.tokenizer = tokenizer
        self.size = ImageSize(config)
        with blame(f"{where}: its files make no processor of images"):
            self.image_processor = self.size.kind(**config)

    def __call__(self, text: list[str], images: "Image.Image | Sequence[Image.Image]", **options: Any) -> Any:
        """input_ids, attention_mask, pixel_values and image_grid_thw, of all prompts and of all their images."""
        seen = self.image_processor(images=images, return_tensors="pt")
        counts = iter((seen["image_grid_thw"].prod(1) // self.size.merged).tolist())
        parts = [prompt.split(IMAGE_TOKEN) for prompt in text]
        whole = [own[0] + "".join(IMAGE_TOKEN * next(counts) + part for part in own[1:]) for own in parts]
        inputs = self.tokenizer(whole, **options)
        inputs.update(seen)
        return inputs


class ImageSize:
    """How many tokens an image takes, by its size alone."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.kind = known_image_processor()
        self.merged = config["merge_size"] ** 2  # patches that are one token
        self.factor = config["patch_size"] * config["merge_size"]  # pixels of a token, each way
        self.limits = {name: config[name] for name in ("min_pixels", "max_pixels")}

    def count(self, height: int, width: int) -> int:
        """Tokens of an image. Raises UserError for one that the encoder does not take."""
        with blame(f"--model: an image of {width}x{height} does not do for its processor"):
            resize = import_module(self.kind.__module__).smart_resize
            height, width = resize(height, width, factor=self.factor, **self.limits)
        return (height // self.factor) * (width // self.factor)


def known_image_processor() -> Any:
    """transformers' class of an image processor that resizes by Pillow. Raises UserError if it has none."""
    import transformers

    return class_of(transformers, BY_PILLOW[0]) or known_class(BY_PILLOW[1])
