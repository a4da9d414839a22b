"""What `import latentprep` offers for making and checking caches: each argument is an option of the command of that name.

These signatures are all there is of the options: the command line, help() and the checks are made from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from latentprep.differences import Compared
from latentprep.door import (
    CAPTIONS,
    GEOMETRY,
    INPUT,
    MACHINES,
    MODEL,
    OUTPUT,
    PERFORMANCE,
    PREVIEW,
    Option,
    door,
    door_through,
    keywords_of,
    list_parameters,
)
from latentprep.errors import UserError
from latentprep.geometry import Crop, Filter, Fit, Geometry
from latentprep.option_files import expand
from latentprep.options import (
    CAPTION_COLUMN,
    DEFAULT_MODEL,
    Animated,
    CaptionFrom,
    CondDtype,
    ControlSize,
    Dtype,
    EncodeOptions,
    Folders,
    ImageOptions,
    ImageSet,
    Only,
    Show,
    Store,
    TextOptions,
    count_pixels,
    default_out,
)
from latentprep.progress import Progress, open_progress
from latentprep.results import Benched, Compacted, Encoded, Merged, Summary, Verified, join_runs
from latentprep.sets import Origin, as_columns, as_folders, as_tuple, check_controls, join_weights, make_sets, make_text

if TYPE_CHECKING:
    from latentprep.previews import Pictures

# options that several functions have in common
# fmt: off
NoDraftOption = Annotated[bool, Option(help="Decode large JPEGs in full, and resize with Pillow alone. Else libjpeg may halve their sides, as long as twice the size needed is left, and torch computes lanczos to within 2 levels of 255.", panel=INPUT)]
SeedOption = Annotated[int, Option(help="Seed of every random choice.", panel=INPUT)]
StoreDtypeOption = Annotated[Dtype, Option(help="Number type of latents and cond on disk.", panel=OUTPUT)]
CondDtypeOption = Annotated[CondDtype | None, Option(help="Number type of cond on disk; int8: blocks of 32 values, each with a scale, in half the space of float16.", panel=OUTPUT, shown="that of --store-dtype")]
ShardSizeOption = Annotated[str | int | None, Option("BYTES", "Largest size of a shard file; a run that is stopped loses at most one.", OUTPUT, shown="256MB, on a CPU 16MB")]
ModelOption = Annotated[str | Path, Option("ID|DIR|FILE|tiny", "Hub id, diffusers folder, .safetensors checkpoint, or the built-in miniature.", MODEL)]
VaeOption = Annotated[str | Path | None, Option("ID|DIR|FILE", "Another VAE than the model's own.", MODEL, shown="the model's")]
TextEncoderOption = Annotated[str | Path | Sequence[str | Path] | None, Option("FILE|DIR", "Weights of a text encoder from a file or folder of their own; may be given again.", MODEL, shown="the model's")]
ConfigOption = Annotated[str | Path | None, Option("DIR", "Diffusers folder with the configs and tokenizers of a checkpoint.", MODEL, shown="what its tensors tell")]
RevisionOption = Annotated[str | None, Option("REV", "Branch, tag or commit of a hub model.", MODEL, shown="main")]
DeviceOption = Annotated[str, Option("auto|cuda|cuda:N|mps|cpu", "Where the models run.", MODEL)]
TextDeviceOption = Annotated[str | None, Option("auto|cuda|cuda:N|mps|cpu", "Where the text encoders run, if not where the VAE does; in one process.", MODEL, shown="as the VAE")]
DtypeOption = Annotated[Literal["auto"] | Dtype, Option(help="Number type of the models; auto: float16 on CUDA, else float32.", panel=MODEL)]
ResolutionOption = Annotated[int | str, Option("PIXELS|WxH|native", "Buckets have at most PIXELS x PIXELS, or W x H; native: no resizing.", GEOMETRY)]
NoCondOption = Annotated[bool, Option(help="Store captions and prompts, but no text embeddings.", panel=CAPTIONS)]
MaxTokensOption = Annotated[int | None, Option("TOKENS", "Tokens kept of a prompt: for CLIP 75, 150, 225, ... in windows of 75; for T5 up to 512.", CAPTIONS, shown="75; SD 3: 256; FLUX: 512")]
TilingOption = Annotated[int | None, Option("PIXELS", "Encode larger images in overlapping tiles of this side: less memory, but other numbers.", PERFORMANCE, shown="no tiles")]
BatchSizeOption = Annotated[int | None, Option("IMAGES", "Images the VAE sees at once.", PERFORMANCE, shown="8 at 512x512 on a GPU, 1 on a CPU")]
WorkersOption = Annotated[int | None, Option("THREADS", "Threads that decode images.", PERFORMANCE, shown="CPU cores, at most 16")]
ImagesOption = Annotated[str | Path | None, Option("DIR", "Where the images are.", PREVIEW, shown="where they were")]
DecoderModelOption = Annotated[str | Path | None, Option("ID|DIR|FILE|tiny", "Model whose VAE decodes, if it is elsewhere now.", PREVIEW, shown="the cache's own, if it is on this machine")]
DecoderVaeOption = Annotated[str | Path | None, Option("ID|DIR|FILE", "VAE that decodes, if it is not that of the model.", PREVIEW, shown="the cache's own")]
DecoderDeviceOption = Annotated[str, Option("auto|cuda|cuda:N|mps|cpu", "Where it decodes.", PREVIEW)]
ShownSeedOption = Annotated[int, Option(help="Which images chance takes.", panel=PREVIEW)]
ProgressOption = Annotated[bool | Progress, Option(help="Whether to show bars, and lines on stderr; or an object with `say` and `bar`.", in_python_only=True)]
# fmt: on


def expand_encode(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each run that a call of `encode` asks for."""
    return expand(given, list_parameters(encode))


# fmt: off
@door_through(expand_encode, join_runs)
def encode(
    source: Annotated[str | Path | Origin | Iterable[Mapping[str, Any]] | None, Option("SOURCE", "Folder of images, searched recursively, or of WebDataset tars; a .toml file of sets, or of sd-scripts.", is_argument=True)] = None,
    out: Annotated[str | Path | None, Option("DIR", "Where the cache goes.", OUTPUT, shown="SOURCE.latents")] = None,
    *,
    options: Annotated[str | Path | None, Option("FILE", "TOML file of options, as resolution = 768; those that are given count first.", INPUT)] = None,
    again: Annotated[str | Path | None, Option("CACHE", "Run once more what made this cache, with its options; those that are given count first.", INPUT)] = None,
    folders: Annotated[Folders, Option(help="Whether folders such as kohya's 10_sks dog are sets, with repeats and captions by their names; auto: if all are.", panel=INPUT)] = "auto",
    exclude: Annotated[str | Sequence[str] | None, Option("PATTERN", "Leave out files and folders of this name, or with a / in it of this path; may be given again.", INPUT, of_set=True)] = None,
    max_megapixels: Annotated[float, Option("MEGAPIXELS", "Larger images are skipped unread: they may be decompression bombs.", INPUT)] = 180,
    animated: Annotated[Animated, Option(help="Of an image with several frames: take the first, or leave it out.", panel=INPUT)] = "first",
    background: Annotated[str, Option("auto|keep|COLOR", "Below transparency: its stored colour, or a colour; auto: stored where it is a picture, else white.", INPUT)] = "auto",
    weights: Annotated[str | Path, Option("alpha|none|DIR", "Loss weights from transparency, or from a folder of masks with the images' paths and stems.", INPUT, of_set=True)] = "alpha",
    control: Annotated[str | Path | Sequence[str | Path] | None, Option("DIR", "Control images of edit pairs: a folder with the images' paths and stems; may be given again.", INPUT, of_set=True)] = None,
    control_column: Annotated[str | Sequence[str] | None, Option("NAME", "The same by a column of SOURCE's metadata files that names each image's control image; may be given again.", INPUT, of_set=True)] = None,
    control_size: Annotated[ControlSize, Option(help="What control images of another shape get: their target's bucket, or one of their own.", panel=INPUT)] = "target",
    no_draft: NoDraftOption = False,
    strict_images: Annotated[bool, Option(help="Leave out damaged JPEGs, parts of which would be wrong; by default they are counted.", panel=INPUT)] = False,
    check_content: Annotated[bool, Option(help="Read and compare every image, also those whose size and time are as they were.", panel=INPUT)] = False,
    allow_gone: Annotated[bool, Option(help="Go on though most of the images in the cache are not in SOURCE.", panel=INPUT)] = False,
    retry_skipped: Annotated[bool, Option(help="Try again all that was skipped; else only that for which something has changed.", panel=INPUT)] = False,
    seed: SeedOption = 0,
    store: Annotated[Store, Option(help="What to keep of the VAE posterior.", panel=OUTPUT)] = "mean+std",
    store_dtype: StoreDtypeOption = "float16",
    cond_dtype: CondDtypeOption = None,
    shard_size: ShardSizeOption = None,
    only: Annotated[Only | None, Option(help="Encode images alone, or the prompts of what is encoded; a later run does the rest.", panel=OUTPUT, shown="both, one after the other")] = None,
    overwrite: Annotated[bool, Option(help="Delete what the cache holds and start anew.", panel=OUTPUT)] = False,
    dry_run: Annotated[bool, Option(help="Say what would be done and why, with the time and space it takes; write nothing.", panel=OUTPUT)] = False,
    log: Annotated[str | Path | None, Option("FILE|none", "Write what is said into this file too.", OUTPUT, shown="DIR.log, beside the cache")] = None,
    strict: Annotated[bool, Option(help="Count it as a failure if any image was skipped: exit code 1.", panel=OUTPUT)] = False,
    model: ModelOption = DEFAULT_MODEL,
    vae: VaeOption = None,
    text_encoder: TextEncoderOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    devices: Annotated[str | None, Option("all|cuda:N,cuda:N", "Several devices of this machine at once, with a process for each.", MODEL, shown="--device alone")] = None,
    text_device: TextDeviceOption = None,
    dtype: DtypeOption = "auto",
    resolution: ResolutionOption = 512,
    bucket_step: Annotated[int, Option("PIXELS", "Sides of buckets are multiples of this.", GEOMETRY)] = 64,
    min_side: Annotated[int | None, Option("PIXELS", "Shortest side of a bucket; of an image with a fixed or native size.", GEOMETRY, shown="resolution / 2; with --no-upscale the step")] = None,
    max_side: Annotated[int | None, Option("PIXELS", "Longest side, likewise.", GEOMETRY, shown="resolution x 2; with --no-upscale none")] = None,
    max_aspect: Annotated[float, Option("RATIO", "Longest side of a bucket over its shortest.", GEOMETRY)] = 4.0,
    no_upscale: Annotated[bool, Option(help="No image is enlarged: each has a bucket of its own size, or of its own shape.", panel=GEOMETRY)] = False,
    width: Annotated[int | None, Option("PIXELS", "One fixed size for all, with --height.", GEOMETRY)] = None,
    height: Annotated[int | None, Option("PIXELS", "One fixed size for all, with --width.", GEOMETRY)] = None,
    fit: Annotated[Fit, Option(help="How an image fills its bucket; padding weighs 0.", panel=GEOMETRY)] = "crop",
    filter: Annotated[Filter, Option("NAME", "lanczos, bicubic, bilinear, hamming, box or nearest.", GEOMETRY)] = "lanczos",  # noqa: A002
    crop: Annotated[Crop, Option(help="Which part of an image its bucket keeps; focus: where there is most to see.", panel=GEOMETRY)] = "center",
    crops: Annotated[int, Option("COUNT", "Crops of each image, as views; an epoch takes one of them.", GEOMETRY)] = 1,
    flip: Annotated[bool, Option(help="Encode the mirrored image too, as a second view.", panel=GEOMETRY)] = False,
    template: Annotated[str | Path | None, Option("NAME|FILE", "Template lines with [name] and [filewords]; see `latentprep templates`.", CAPTIONS, shown="the caption alone", of_set=True)] = None,
    placeholder: Annotated[str, Option("TEXT", "What [name] stands for.", CAPTIONS, of_set=True)] = "",
    word_regex: Annotated[str, Option("REGEX", "Words of a file name that make its caption.", CAPTIONS, shown="the whole name", of_set=True)] = "",
    joiner: Annotated[str, Option("TEXT", "Between the words that --word-regex finds.", CAPTIONS, shown="a space", of_set=True)] = " ",
    caption_lines: Annotated[bool, Option(help="Each line of a caption file is a caption of its own.", panel=CAPTIONS, of_set=True)] = False,
    caption_column: Annotated[str | Sequence[str] | None, Option("NAME", "Column of metadata files, and of the .json files in tars, that holds captions; may be given again.", CAPTIONS, shown=CAPTION_COLUMN, of_set=True)] = None,
    caption_from: Annotated[CaptionFrom, Option(help="auto: caption and metadata files, else the image's name; file: those alone; name, folder: the image's or its folder's name.", panel=CAPTIONS, of_set=True)] = "auto",
    caption_extension: Annotated[str, Option(".EXT", "Ending of caption files.", CAPTIONS, shown=".txt, .caption", of_set=True)] = "",
    caption_prefix: Annotated[str, Option("TEXT", "Put before each caption, with a space between.", CAPTIONS, of_set=True)] = "",
    caption_suffix: Annotated[str, Option("TEXT", "Put behind each caption, with a space between.", CAPTIONS, of_set=True)] = "",
    default_caption: Annotated[str, Option("TEXT|FILE.txt", "Caption of images that have none in a file; of a .txt file each line is one.", CAPTIONS, of_set=True)] = "",
    trigger: Annotated[str, Option("WORDS", "Words that begin each caption, such as sks dog; tags are shuffled behind them.", CAPTIONS, of_set=True)] = "",
    prompts_per_image: Annotated[int, Option("K", "Prompts of each image: other captions, template lines, tags and wildcards.", CAPTIONS, most=10_000)] = 1,
    shuffle_tags: Annotated[bool, Option(help="Shuffle the comma-separated tags of a caption.", panel=CAPTIONS, of_set=True)] = False,
    tag_drop_out: Annotated[float, Option("PROBABILITY", "How often each tag is left out.", CAPTIONS, of_set=True)] = 0.0,
    keep_tags: Annotated[int, Option("N", "The first N tags are neither shuffled nor left out.", CAPTIONS, of_set=True)] = 0,
    wildcards: Annotated[bool, Option(help="{a|b|c} in captions and templates becomes one of its parts.", panel=CAPTIONS, of_set=True)] = False,
    no_cond: NoCondOption = False,
    max_tokens: MaxTokensOption = None,
    clip_skip: Annotated[int, Option("LAYER", "Layer of CLIP to take, from the end; 2 is the penultimate. Stable Diffusion 1 and 2.", CAPTIONS)] = 1,
    emphasis: Annotated[bool, Option(help="Weigh (words), [words] and (words:1.3) as stable-diffusion-webui does. CLIP alone.", panel=CAPTIONS)] = False,
    tiling: TilingOption = None,
    compile: Annotated[bool, Option(help="Compile the VAE's encoder (torch.compile): starts minutes later, needs a C++ compiler.", panel=PERFORMANCE)] = False,  # noqa: A002
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = None,
    rank: Annotated[int | None, Option("RANK", "Which share of the work this process takes, counted from 0; with --world-size.", MACHINES, shown="that of torchrun or SLURM")] = None,
    world_size: Annotated[int | None, Option("PROCESSES", "How many processes share the work, with nothing in common but the cache.", MACHINES, shown="that of torchrun or SLURM")] = None,
    progress: ProgressOption = True,
) -> Encoded:
    """Encode a folder of images into a latent cache.

    Run it again to go on after an interruption, or after images or captions changed: what is done is not done again.

    In Python it returns what became of it. A skipped image is no error: it is counted in the result, as are failures
    (faults of latentprep's own); `result.ok` is False if there were any. With dry_run=True the result says what there is
    to do. Raises UserError for what the caller can mend: arguments, models, a full disk, a cache that another process
    writes to; and OSError as the file system does. Raises KeyboardInterrupt after Ctrl-C, once what is done is safe on
    disk; the same call goes on from there.

    Under torchrun or SLURM each process that calls it does its share of the work, and returns once that is done. The
    last one commits the cache; `result.absent` are the ranks that were still at work. So wait for all of them, as
    torch.distributed.barrier() does, before a dataset opens the cache. If only one of the processes calls it, give
    rank=0 and world_size=1: else it waits for shares that nobody does.
    """
    # fmt: on
    from latentprep.human import parse_bytes
    from latentprep.runs import run_encode

    assert isinstance(source, Origin)  # door_through has read what was given
    wording: dict[str, Any] = {
        "template": template, "placeholder": placeholder, "word_regex": word_regex, "joiner": joiner,
        "shuffle_tags": shuffle_tags, "tag_drop_out": tag_drop_out, "keep_tags": keep_tags, "wildcards": wildcards,
        "caption_lines": caption_lines, "caption_column": caption_column, "caption_from": caption_from,
        "caption_extension": caption_extension, "caption_prefix": caption_prefix, "caption_suffix": caption_suffix,
        "default_caption": default_caption, "trigger": trigger,
    }  # fmt: skip
    encoders: dict[str, Any] = {
        "include_cond": not no_cond, "cond_dtype": cond_dtype or None, "prompts_per_image": prompts_per_image,
        "max_tokens": max_tokens, "clip_skip": clip_skip, "emphasis": emphasis,
    }  # fmt: skip
    patterns = as_tuple(exclude)
    common = {**wording, **encoders}
    sets = make_sets(source.sets, common, list_parameters(encode), patterns) if source.sets else ()
    text = replace(TextOptions(**encoders), sets={own.name: own.text for own in sets}) if sets else None
    weights = join_weights(source.sets, str(weights)) if sets else str(weights)
    controls = as_folders("--control", control)
    columns = as_columns("--control-column", control_column)
    check_controls(sets, controls, columns)
    images = ImageOptions.from_options(background=background, weights=weights, animated=animated, draft=not no_draft)
    chosen = EncodeOptions(
        source=source.where,
        out=str(out or default_out(source.where)),
        geometry=Geometry.from_options(
            resolution=str(resolution), width=width, height=height, bucket_step=bucket_step, min_side=min_side,
            max_side=max_side, max_aspect=max_aspect, upscale=not no_upscale, fit=fit, filter=filter, crop=crop,
            crops=crops, seed=seed,
        ),
        images=images,
        exclude=patterns,
        masks=Path(weights) if images.weights == "masks" and not sets else None, controls=controls,
        control_columns=columns, control_size=control_size,
        text=text or make_text(common), sets=sets, notes=source.notes, remembered=source.remembered,
        model=str(model), vae=name_or_none(vae), text_encoders=names_given(text_encoder), config=name_or_none(config),
        revision=revision or None, flip=flip, store=store, store_dtype=store_dtype, device=device, devices=devices,
        text_device=text_device or None, dtype=dtype, rank=rank, world_size=world_size, tiling=tiling, compile=compile,
        batch_size=batch_size, workers=workers, seed=seed,
        shard_bytes=parse_bytes("--shard-size", str(shard_size)) if shard_size not in (None, "") else None,
        max_pixels=count_pixels(max_megapixels), only=only or None, overwrite=overwrite, strict=strict,
        strict_images=strict_images, check_content=check_content, allow_gone=allow_gone, retry_skipped=retry_skipped,
    )  # fmt: skip
    shown = open_progress(progress, keywords_of(encode))
    return run_encode(chosen, shown, dry_run=dry_run, log=str(log) if log is not None else None)


def find_named(source: Path) -> tuple[Path, list[tuple[ImageSet, ...]]]:
    """A source of images, and the sets of each run that it asks for, if it is a .toml file. Raises UserError."""
    if source.suffix.lower() != ".toml" or source.is_dir():
        return source, []
    runs = expand_encode({"source": source})
    named = [make_sets(run["source"].sets, {}, list_parameters(encode)) for run in runs if run["source"].sets]
    return (source if named else runs[0]["source"].where), named


def find_pictures(
    source: str | Path | None, model: str | Path | None, vae: str | Path | None, device: str
) -> "Pictures":
    """Where the pictures of a cache come from, as was asked for. Raises UserError for a .toml that is no file of sets."""
    from latentprep.previews import Pictures

    where, named = (None, []) if source is None else find_named(Path(source))
    return Pictures(where, tuple(named), list_parameters(encode), name_or_none(model), name_or_none(vae), device)


# fmt: off
@door
def inspect(
    cache: Annotated[str | Path, Option("CACHE", "A cache folder.", is_argument=True)],
    *,
    key: Annotated[str | None, Option("NAME", "One image, by its path relative to the image folder.")] = None,
    most_cropped: Annotated[int, Option("COUNT", "How many of the most cropped images to name.", least=0)] = 5,
) -> Summary:
    """Show what is in a cache: counts, recipe, buckets, statistics, captions, skips.

    In Python it returns a dict of plain JSON values that prints as tables. Raises UserError if there is no such cache, or
    no such image in it.
    """
    # fmt: on
    from latentprep.runs import run_inspect

    return run_inspect(str(cache), key, most_cropped)


# fmt: off
@door
def preview(
    cache: Annotated[str | Path, Option("CACHE", "A cache folder.", is_argument=True)],
    pattern: Annotated[str | None, Option("PATTERN", "Images that fit a shell pattern, such as 'birds/*'.", is_argument=True)] = None,
    *,
    key: Annotated[str | None, Option("NAME", "One image, by its path relative to the image folder.")] = None,
    show: Annotated[Show, Option(help="Which images: by chance, or those that lose most to their crop, weigh least, or have the most unusual latents.", panel=PREVIEW)] = "random",
    num: Annotated[int, Option("N", "How many samples to show, at most.", PREVIEW, least=1, most=200)] = 12,
    seed: ShownSeedOption = 0,
    source: ImagesOption = None,
    model: DecoderModelOption = None,
    vae: DecoderVaeOption = None,
    device: DecoderDeviceOption = "cpu",
    progress: ProgressOption = True,
) -> Any:
    """Draw a contact sheet: images with their crops, what the VAE saw, what their latents say, weights and captions.

    If the cache's own VAE is not there, latents are shown in approximate colours; the sheet says so.

    In Python it returns a picture of Pillow's. Raises UserError if there is no such cache, no such image in it, or if the
    VAE that was named is not the cache's.
    """
    # fmt: on
    from latentprep.previews import run_preview

    return run_preview(
        str(cache), open_progress(progress, keywords_of(preview)), find_pictures(source, model, vae, device),
        pattern=pattern, key=key, show=show, num=num, seed=seed,
    )  # fmt: skip


# fmt: off
@door
def report(
    cache: Annotated[str | Path, Option("CACHE", "A cache folder.", is_argument=True)],
    *,
    num: Annotated[int, Option("N", "How many images its gallery shows, at most.", PREVIEW, least=1, most=5000)] = 2000,
    seed: ShownSeedOption = 0,
    source: ImagesOption = None,
    model: DecoderModelOption = None,
    vae: DecoderVaeOption = None,
    device: DecoderDeviceOption = "cpu",
    progress: ProgressOption = True,
) -> str:
    """Make a page of HTML that shows what is in a cache: charts, what stands out, and a gallery.

    Pictures are of the source images; if these are gone, of the latents. Needs jinja2: pip install 'latentprep[report]'.

    In Python it returns the page as a text. Raises UserError if there is no such cache, or if the VAE that was named is
    not the cache's.
    """
    # fmt: on
    from latentprep.reports import run_report

    shown = open_progress(progress, keywords_of(report))
    return run_report(str(cache), shown, find_pictures(source, model, vae, device), num=num, seed=seed)


# fmt: off
@door
def verify(
    cache: Annotated[str | Path, Option("CACHE", "A cache folder.", is_argument=True)],
    *,
    source: Annotated[str | Path | None, Option("DIR", "Compare with the images too: changed, gone and new ones.")] = None,
    masks: Annotated[str | Path | None, Option("DIR", "Folder of the masks that the weights came from, if it is elsewhere now.")] = None,
    control: Annotated[str | Path | Sequence[str | Path] | None, Option("DIR", "Folder of the control images, if it is elsewhere now; may be given again.")] = None,
    re_encode: Annotated[int, Option("N", "Encode N random images of --source and their prompts again, and compare.", least=0)] = 0,
    seed: Annotated[int, Option(help="Which images --re-encode takes.")] = 0,
    model: Annotated[str | Path | None, Option("ID|DIR|FILE|tiny", "Model of --re-encode.", shown="the cache's own")] = None,
    vae: Annotated[str | Path | None, Option("ID|DIR|FILE", "VAE of --re-encode, if it is not that of --model.", shown="the cache's own")] = None,
    text_encoder: Annotated[str | Path | Sequence[str | Path] | None, Option("FILE|DIR", "Weights of text encoders of --re-encode, if they are elsewhere now; may be given again.", shown="the cache's own")] = None,
    no_cond: Annotated[bool, Option(help="Of --re-encode: compare latents alone; needs no text encoder.")] = False,
    device: Annotated[str, Option("auto|cuda|cuda:N|mps|cpu", "Where --re-encode runs.")] = "auto",
    progress: ProgressOption = True,
) -> Verified:
    """Check a cache: every byte, shape and number, and on request the images it came from.

    Exit code 0: nothing wrong. 1: problems, which are listed.

    In Python it returns the problems; `result.ok` is True if there are none. Raises UserError for arguments, folders and
    models that are not those of the cache.
    """
    # fmt: on
    from latentprep.runs import run_verify

    where, named = (None, []) if source is None else find_named(Path(source))
    return run_verify(
        str(cache), open_progress(progress, keywords_of(verify)), source=where, named=named,
        masks=path_or_none(masks), controls=as_folders("--control", control), re_encode=re_encode, seed=seed,
        model=name_or_none(model), vae=name_or_none(vae), text_encoders=names_given(text_encoder), no_cond=no_cond,
        device=device,
    )  # fmt: skip


# fmt: off
@door
def diff(
    a: Annotated[str | Path, Option("A", "The first cache.", is_argument=True)],
    b: Annotated[str | Path, Option("B", "The cache to compare it with.", is_argument=True)],
    *,
    samples: Annotated[int | None, Option("N", "Compare latents and cond of N random images and prompts only.", least=0, shown="all")] = None,
    seed: Annotated[int, Option(help="Which images and prompts --samples takes.")] = 0,
    progress: Annotated[bool | Progress, Option(help="Whether to show bars on stderr; or an object with `say` and `bar`.", in_python_only=True)] = True,
) -> Compared:
    """Show what differs between two caches: images, captions, recipes, and how far their numbers are from each other.

    Exit code 0: nothing differs. 1: something does. 2: the caches cannot be compared.

    In Python it returns what differs; `result.is_same` is True if nothing does. Raises UserError if one of them is no cache.
    """
    # fmt: on
    from latentprep.runs import run_diff

    return run_diff(str(a), str(b), samples, seed, open_progress(progress, keywords_of(diff)))


# fmt: off
@door
def compact(
    cache: Annotated[str | Path, Option("CACHE", "A cache folder.", is_argument=True)],
    *,
    min_share: Annotated[float, Option("SHARE", "Rewrite shards of which at least this share is dead.", least=0, most=1)] = 0.2,  # compact.MIN_SHARE
    progress: ProgressOption = True,
) -> Compacted:
    """Free the space of images that changed or were removed: rewrite the shards that hold many of them.

    In Python it returns what was done; `result.ok` is False if a shard is damaged and was left alone. Raises UserError if
    there is no such cache, or another process writes to it.
    """
    # fmt: on
    from latentprep.runs import run_compact

    return run_compact(str(cache), open_progress(progress, keywords_of(compact)), min_share)


# fmt: off
@door
def merge(
    cache: Annotated[str | Path, Option("CACHE", "A cache folder.", is_argument=True)],
    *,
    incomplete: Annotated[bool, Option(help="Commit also if ranks are missing; the next encode does what they had to do.")] = False,
) -> Merged:
    """Commit what the ranks of an encode have finished, if the last of them could not.

    In Python it returns what was committed. Raises UserError if ranks are missing, if they have done different work, or
    if a rank or another process is still at work on the cache.
    """
    # fmt: on
    from latentprep.runs import run_merge

    return run_merge(str(cache), incomplete)


# fmt: off
@door
def bench(
    source: Annotated[str | Path | None, Option("SOURCE", "Folder of images, or of WebDataset tars, of which up to 32 are measured; without it pictures are drawn.", is_argument=True)] = None,
    out: Annotated[str | Path | None, Option("DIR", "Where a cache would go: the disk that is written to. Nothing stays there.", OUTPUT, shown="SOURCE.latents, or here")] = None,
    *,
    seconds: Annotated[float, Option("SECONDS", "About how long to measure; models are loaded besides.", PERFORMANCE, least=1, most=3600)] = 60,
    no_draft: NoDraftOption = False,
    seed: SeedOption = 0,
    store_dtype: StoreDtypeOption = "float16",
    cond_dtype: CondDtypeOption = None,
    shard_size: ShardSizeOption = None,
    model: ModelOption = DEFAULT_MODEL,
    vae: VaeOption = None,
    text_encoder: TextEncoderOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    text_device: TextDeviceOption = None,
    dtype: DtypeOption = "auto",
    resolution: ResolutionOption = 512,
    no_cond: NoCondOption = False,
    max_tokens: MaxTokensOption = None,
    tiling: TilingOption = None,
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = None,
    progress: ProgressOption = True,
) -> Benched:
    """Measure how fast each stage of encode is on this machine, say what limits a run, and which options would help.

    In Python it returns the numbers. Its temporary files are deleted whatever happens. Raises UserError for arguments,
    images and models that cannot be used.
    """
    # fmt: on
    from latentprep.benches import run_bench
    from latentprep.human import parse_bytes

    if source is not None and Path(source).suffix.lower() == ".toml":
        raise UserError(f"SOURCE {source}: a file of sets. Give the folder of one of them.")
    where = Path(source) if source is not None else Path()
    chosen = EncodeOptions(
        source=where,
        out=str(out or ("." if source is None else default_out(where))),
        geometry=Geometry.from_options(resolution=str(resolution)),
        images=ImageOptions(draft=not no_draft),
        text=TextOptions(include_cond=not no_cond, cond_dtype=cond_dtype or None, max_tokens=max_tokens),
        model=str(model), vae=name_or_none(vae), text_encoders=names_given(text_encoder), config=name_or_none(config),
        revision=revision or None, device=device, text_device=text_device or None, dtype=dtype, tiling=tiling,
        batch_size=batch_size, workers=workers, seed=seed, store_dtype=store_dtype,
        shard_bytes=parse_bytes("--shard-size", str(shard_size)) if shard_size not in (None, "") else None,
    )  # fmt: skip
    return run_bench(chosen, open_progress(progress, keywords_of(bench)), seconds, is_drawn=source is None)


def names_given(names: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    return tuple(name for name in as_tuple(names) if name)


def name_or_none(name: str | Path | None) -> str | None:
    return str(name) if name is not None and str(name) else None


def path_or_none(path: str | Path | None) -> Path | None:
    return Path(path) if path is not None else None
