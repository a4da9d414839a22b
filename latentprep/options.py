"""What a run was told: images, text, models and engine, checked once, where it enters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from latentprep.errors import UserError, check_choice
from latentprep.geometry import Geometry
from latentprep.human import shortened
from latentprep.records import set_of

Animated = Literal["first", "skip"]
Only = Literal["latents", "text"]
Store = Literal["mean+std", "mean"]
ControlSize = Literal["target", "own"]
Dtype = Literal["float32", "float16", "bfloat16"]
CondDtype = Literal["float32", "float16", "bfloat16", "int8"]
CaptionFrom = Literal["auto", "file", "name", "folder", "none"]
Folders = Literal["auto", "kohya", "plain"]
Show = Literal["random", "crop", "weight", "outliers"]  # which images a preview shows
ANIMATED, ONLY, STORES, DTYPES, COND_DTYPES, CAPTIONS_FROM, SHOWS, CONTROL_SIZES = (
    get_args(choices) for choices in (Animated, Only, Store, Dtype, CondDtype, CaptionFrom, Show, ControlSize)
)
CAPTION_COLUMN = "text"  # as in the Hub's imagefolder layout and in diffusers' training scripts
CAPTION_ENCODING = "utf-8"
DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def count_pixels(megapixels: float) -> int:
    """--max-megapixels in pixels. Raises UserError."""
    if not 0 < megapixels < math.inf:
        raise UserError(f"--max-megapixels {megapixels:g}: expected a number of more than 0.")
    if not math.isfinite(megapixels * 1e6):
        raise UserError(f"--max-megapixels {megapixels:g}: expected a number that is no more than 1e300.")
    return max(1, int(megapixels * 1e6))


def default_out(source: Path) -> str:
    """SOURCE.latents, beside it. Raises UserError for the root of a disk."""
    if source.name in ("", ".."):  # of the folder that one is in
        source = source.resolve()
    if not source.name:
        raise UserError(f"SOURCE {source}: the cache cannot lie beside it. Say where it goes: --out DIR.")
    return f"{source}.latents"


@dataclass(frozen=True)
class ImageOptions:
    """How the file of an image becomes pixels and a weight map, sizes aside."""

    background: str = "auto"  # auto, keep or #rrggbb: what stands below transparency (alpha.fill_background)
    weights: str = "alpha"  # alpha, masks or none: where weight maps come from
    animated: str = "first"  # first: the first frame of several; skip: none
    draft: bool = True  # much larger JPEGs are decoded at a fraction of their size, and torch computes LANCZOS

    @classmethod
    def from_options(cls, *, background: str, weights: str, animated: str, draft: bool) -> "ImageOptions":
        """What the options of the command line ask for; a folder of masks as `weights` is "masks". Raises UserError."""
        from PIL import ImageColor

        check_choice("--animated", animated, ANIMATED)
        if background not in ("auto", "keep"):
            try:
                background = "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(background)[:3])
            except ValueError:
                raise UserError(
                    f"--background {background}: expected auto, keep or a colour such as white or '#7f7f7f'."
                ) from None
        return cls(background, weights if weights in ("alpha", "none") else "masks", animated, draft)


@dataclass(frozen=True)
class TextOptions:
    """How captions are found and become prompts."""

    template: tuple[str, ...] | None = None  # the lines of a template; None: the prompt is the caption
    placeholder: str = ""  # for [name]
    word_regex: str = ""  # for captions from file names
    joiner: str = " "
    include_cond: bool = True
    cond_dtype: str | None = None  # that cond is stored in; None: as latents are
    prompts_per_image: int = 1
    shuffle_tags: bool = False  # tags: the comma-separated parts of a caption
    tag_drop_out: float = 0.0  # how often a tag is left out
    keep_tags: int = 0  # the first tags, which are neither shuffled nor left out
    wildcards: bool = False  # whether {a|b|c} becomes one of its parts
    caption_lines: bool = False  # whether each line of a caption file is a caption
    caption_columns: tuple[str, ...] = (CAPTION_COLUMN,)  # of metadata files
    caption_from: str = "auto"  # file: caption and metadata files; auto: else the image's name
    caption_extension: str = ""  # of caption files; "": those that the source says
    caption_encoding: str = CAPTION_ENCODING  # of caption and metadata files that have no byte order mark
    caption_prefix: str = ""  # put before each caption, and the suffix behind it
    caption_suffix: str = ""
    default_caption: tuple[str, ...] = ()  # of images that have none; where that is none, the file name is it
    first_line: bool = False  # of a caption file its first line is the caption, as kohya's sd-scripts have it
    captions_file: Path | None = None  # of kohya's sd-scripts: image -> caption and tags; other images are left out
    trigger: str = ""  # words that begin each caption
    max_tokens: int | None = None  # of a prompt, that are kept; None: the family's default (families.py)
    clip_skip: int = 1  # as the web UI and kohya count: 1 is the last layer
    image_uncond: bool = False  # of prompts that see images, the cond of the empty one for each image
    emphasis: bool = False  # (text), [text] and (text:1.3) weigh their tokens, as in the web UI
    sets: Mapping[str, "TextOptions"] = field(default_factory=dict)  # name of a set -> its own; then those count

    def of(self, key: str) -> "TextOptions":
        """What counts for an image: the options of its set."""
        return self.sets.get(set_of(key), self) if self.sets else self

    def __post_init__(self) -> None:
        check_choice("--caption-from", self.caption_from, CAPTIONS_FROM)
        if self.cond_dtype is not None:
            check_choice("--cond-dtype", self.cond_dtype, COND_DTYPES)
        if self.caption_from not in ("auto", "name") and self.word_regex:
            raise UserError(
                f"--word-regex {self.word_regex}: with --caption-from {self.caption_from} no caption comes from a file "
                "name. Leave one of the two out."
            )
        check_encoding(self.caption_encoding)
        for option, is_given in (
            ("--caption-extension", bool(self.caption_extension)),
            ("--caption-encoding", self.caption_encoding != CAPTION_ENCODING),
            ("--caption-column", self.caption_columns != (CAPTION_COLUMN,)),
            ("--caption-lines", self.caption_lines),
            ("--default-caption", bool(self.default_caption)),
        ):
            if is_given and self.caption_from not in ("auto", "file"):
                raise UserError(
                    f"{option} with --caption-from {self.caption_from}: no caption file is read. Leave one of them out."
                )
        if self.prompts_per_image < 1:
            raise UserError(f"--prompts-per-image {self.prompts_per_image}: must be at least 1.")
        if not 0 <= self.tag_drop_out <= 1:
            raise UserError(f"--tag-drop-out {self.tag_drop_out:g}: a probability, expected 0 to 1.")
        if self.keep_tags < 0:
            raise UserError(f"--keep-tags {self.keep_tags}: must be at least 0.")
        if self.keep_tags and not (self.shuffle_tags or self.tag_drop_out):
            raise UserError(
                f"--keep-tags {self.keep_tags}: nothing is shuffled or dropped. Give --shuffle-tags or --tag-drop-out."
            )

        if any("[name]" in line for line in self.template or ()) and not self.placeholder:
            raise UserError(
                '--template uses [name], without a --placeholder. Say what [name] stands for: --placeholder "sks dog".'
            )

    @property
    def num_kept_tags(self) -> int:
        """The first tags that are neither shuffled nor left out: those of the trigger, and keep_tags more."""
        if not (self.trigger and (self.shuffle_tags or self.tag_drop_out)):
            return self.keep_tags
        return self.keep_tags + len([tag for tag in self.trigger.split(",") if tag.strip()])

    @property
    def has_choices(self) -> bool:
        """Whether prompts depend on the seed."""
        if self.sets:
            return any(own.has_choices for own in self.sets.values())
        return self.template is not None or self.shuffle_tags or self.tag_drop_out > 0 or self.wildcards


def check_encoding(name: str) -> None:
    """Raise UserError unless Python knows an encoding of text by this name."""
    try:
        b"text".decode(name)
    except UnicodeDecodeError:
        pass  # an encoding, in which these bytes are no text
    except (LookupError, ValueError):  # no such encoding, or one that decodes no text; a name with a NUL
        raise UserError(
            f"--caption-encoding {shortened(name)}: no encoding of text that Python knows. Expected one such as utf-8, "
            "cp1252, latin-1, shift_jis or gb18030."
        ) from None


@dataclass(frozen=True)
class ImageSet:
    """One source with its own captions and weight. A cache may hold several."""

    name: str  # "": the only one
    source: Path
    text: TextOptions
    exclude: tuple[str, ...] = ()  # patterns of files and folders that are left out
    masks: Path | None = None  # folder of mask images
    controls: tuple[Path, ...] = ()  # folders of control images, in the order of control_1, control_2, ...
    control_columns: tuple[str, ...] = ()  # of metadata files, which name the control images that come next
    repeats: int | None = 1  # how often each image stands in an epoch; None: so that it has as many samples as others
    sample_weight: float = 1.0  # how much the loss of its images counts
    caption_dropout: float = 0.0  # how often a reader leaves captions out
    flip: bool = True  # whether its mirrored views may be taken

    @property
    def num_controls(self) -> int:
        """Control images of each image."""
        return len(self.controls) + len(self.control_columns)

    @property
    def partners(self) -> tuple[Path, ...]:
        """The folders of images that are none of the source."""
        return (*([self.masks] if self.masks is not None else []), *self.controls)


@dataclass(frozen=True)
class EncodeOptions:
    """Everything that `latentprep encode` was told."""

    source: Path  # of several sets the file that names them, or the folder that holds them
    out: str
    geometry: Geometry
    text: TextOptions
    images: ImageOptions = ImageOptions()
    exclude: tuple[str, ...] = ()  # patterns of files and folders that are left out
    masks: Path | None = None  # folder of mask images, with images.weights "masks"
    controls: tuple[Path, ...] = ()  # folders of control images
    control_columns: tuple[str, ...] = ()  # columns of metadata files that name control images
    control_size: str = "target"  # of control images of another shape than their target's: its bucket, or their own
    sets: tuple[ImageSet, ...] = ()  # then exclude, masks and controls are theirs, and text.sets has their captions
    notes: tuple[str, ...] = ()  # what a person is to be told before the run
    remembered: Mapping[str, Any] = field(default_factory=dict)  # the arguments that ask for all of this once more
    model: str = DEFAULT_MODEL
    vae: str | None = None
    text_encoders: tuple[str, ...] = ()  # where the weights of text encoders are, if not in the model's folder
    config: str | None = None  # folder of configs for models in a single file
    revision: str | None = None  # branch, tag or commit of a hub model
    flip: bool = False
    store: str = "mean+std"
    store_dtype: str = "float16"
    device: str = "auto"
    devices: str | None = None  # several of this machine: cuda:0,cuda:1 or all; None: `device` alone
    text_device: str | None = None  # of the text encoders; None: that of the VAE, or those
    rank: int | None = None  # which share of the units this process takes, counted from 0; None: of torchrun or SLURM
    world_size: int | None = None  # how many processes share the units
    dtype: str = "auto"
    tiling: int | None = None  # larger images are encoded in tiles of this side in pixels; None: none are
    compile: bool = False  # torch.compile the VAE's encoder
    batch_size: int | None = None
    workers: int | None = None
    shard_bytes: int | None = None  # None: devices.default_shard_bytes
    max_pixels: int = 180_000_000  # of an image file; a little more than Pillow's own limit
    seed: int = 0
    only: str | None = None  # latents, text; None: both
    overwrite: bool = False
    strict: bool = False
    strict_images: bool = False  # JPEGs that decode with a warning are skipped
    check_content: bool = False  # compare the content of every image, whatever its size and time say
    allow_gone: bool = False  # most of what the cache holds may be gone from the source
    retry_skipped: bool = False  # try again what was skipped, whatever the reason

    def __post_init__(self) -> None:
        check_choice("--store", self.store, STORES)
        check_choice("--store-dtype", self.store_dtype, DTYPES)
        check_choice("--dtype", self.dtype, ("auto", *DTYPES))
        check_choice("--only", self.only or "latents", ONLY)
        check_choice("--control-size", self.control_size, CONTROL_SIZES)
        if self.control_size == "own" and not self.num_controls:
            raise UserError("--control-size own: there are no control images. Give them with --control.")
        if self.control_size == "own" and self.geometry.mode == "fixed":
            raise UserError("--control-size own with --width and --height: all images have one size. Leave it out.")
        if self.only == "text" and (self.overwrite or not self.text.include_cond):
            other = "--overwrite" if self.overwrite else "--no-cond"
            raise UserError(f"--only text with {other}: one wants cond for the latents that are there, the other none.")
        for option, value in (("--batch-size", self.batch_size), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise UserError(f"{option} {value}: must be at least 1.")
        for pattern in (pattern for own in self.list_sets() for pattern in own.exclude):
            if not pattern.strip("/"):
                raise UserError(f"--exclude {pattern!r}: expected a pattern such as '*_mask.png' or 'raw/*'.")
        check_devices(self.device, self.devices)
        check_rank(self.rank, self.world_size)
        if self.max_pixels < 1:
            raise UserError("--max-megapixels: must be more than 0.")

    def list_sets(self) -> tuple[ImageSet, ...]:
        """Where images come from, one or more; a single source is a set without a name."""
        return self.sets or (
            ImageSet("", self.source, self.text, self.exclude, self.masks, self.controls, self.control_columns),
        )

    @property
    def num_controls(self) -> int:
        """Control images of each image."""
        return self.list_sets()[0].num_controls

    @property
    def needs_text_encoder(self) -> bool:
        return self.text.include_cond and self.only != "latents"

    def check_tiling(self, factor: int) -> None:
        """Raise UserError where tiles of a VAE of this factor cannot have that side, or no image would be cut."""
        if self.tiling is None:
            return
        step = 4 * factor  # tiles overlap by a quarter (diffusers' tile_overlap_factor), which is to be whole latents
        if self.tiling < step or self.tiling % step:
            raise UserError(
                f"--tiling {self.tiling}: not a multiple of {step}, four of this VAE's latents, of which tiles share "
                f"one. Try {max(1, self.tiling // step + 1) * step}."
            )
        longest = self.geometry.longest_side
        if longest is not None and longest <= self.tiling:
            raise UserError(
                f"--tiling {self.tiling}: no bucket is larger, their sides are at most {longest} pixels. "
                "Give fewer, or leave it out."
            )


def check_devices(device: str, devices: str | None) -> None:
    """Raise UserError if --devices is no list of devices, or if --device says something else."""
    if devices is None:
        return
    if device != "auto":
        raise UserError(f"--device {device} with --devices {devices}: both say where the models run. Give one of them.")
    names = devices.split(",")
    if devices != "all" and not all(name and name == name.strip() and name not in ("auto", "all") for name in names):
        raise UserError(f"--devices {devices}: expected all, or names with commas between them, such as cuda:0,cuda:1.")


def check_rank(rank: int | None, world_size: int | None) -> None:
    """Raise UserError if these do not say which share of the work is this process's."""
    if (rank is None) != (world_size is None):
        given, missing = ("--rank", "--world-size") if world_size is None else ("--world-size", "--rank")
        raise UserError(f"{given} without {missing}: a share of the work needs both.")
    if rank is None or world_size is None:
        return
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: must be at least 1.")
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank}: expected 0 to {world_size - 1}, since --world-size is {world_size}.")
