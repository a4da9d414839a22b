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
    CAPTION_ENCODING,
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
from latentprep.sets import (
    OWN,
    Origin,
    as_columns,
    as_folders,
    as_tuple,
    check_controls,
    join_weights,
    make_sets,
    make_text,
)

if TYPE_CHECKING:
    from latentprep.previews import Pictures

# options that several functions have in common
# fmt: off
NoDraftOption = Annotated[bool, Option(help="Decode large JPEGs in full, and resize with Pillow alone. Without it, they are decoded at a half, a quarter or an eighth of their sides, but at least at twice the size needed, and torch computes lanczos to within 2 levels of 255.", panel=INPUT)]
SeedOption = Annotated[int, Option(help="Seed of every random choice.", panel=INPUT)]
StoreDtypeOption = Annotated[Dtype, Option(help="Number type of latents and conditioning on disk.", panel=OUTPUT)]
CondDtypeOption = Annotated[CondDtype | None, Option(help="Number type of conditioning on disk; int8 takes 53% of float16's space: it has a scale for each 32 values.", panel=OUTPUT, shown="that of --store-dtype")]
ShardSizeOption = Annotated[str | int | None, Option("BYTES", "Largest size of a shard file, such as 64MB; a run that is killed loses what it has of the unfinished one.", OUTPUT, shown="256MB, on a CPU 16MB")]
ModelOption = Annotated[str | Path, Option("ID|DIR|FILE|tiny", "Hub id, diffusers folder, .safetensors checkpoint, or tiny, the small model that is built in.", MODEL)]
VaeOption = Annotated[str | Path | None, Option("ID|DIR|FILE", "Another VAE than the model's own.", MODEL, shown="the model's")]
TextEncoderOption = Annotated[str | Path | Sequence[str | Path] | None, Option("FILE|DIR", "File or folder with the weights of a text encoder; once for each encoder.", MODEL, shown="the model's")]
ConfigOption = Annotated[str | Path | None, Option("DIR", "Diffusers folder with configs and tokenizers for a checkpoint in one file.", MODEL, shown="as its tensors say")]
RevisionOption = Annotated[str | None, Option("REV", "Branch, tag or commit of a hub model.", MODEL, shown="main")]
DeviceOption = Annotated[str, Option("auto|cuda|cuda:N|mps|cpu", "Where the models run.", MODEL)]
TextDeviceOption = Annotated[str | None, Option("auto|cuda|cuda:N|mps|cpu", "Where the text encoders run, if not on the device of the VAE; they run in one process.", MODEL, shown="as the VAE")]
DtypeOption = Annotated[Literal["auto"] | Dtype, Option(help="Number type of the models; auto: float16 on CUDA, else float32.", panel=MODEL)]
ResolutionOption = Annotated[int | str, Option("PIXELS|WxH|native", "A bucket has at most as many pixels as PIXELS x PIXELS, or W x H; native: images are not resized.", GEOMETRY)]
NoCondOption = Annotated[bool, Option(help="Store captions and prompts, but no text embeddings.", panel=CAPTIONS)]
MaxTokensOption = Annotated[int | None, Option("TOKENS", "How many tokens of a prompt are kept: for CLIP 75, 150, 225, ... in windows of 75; for others up to a limit of the model.", CAPTIONS, shown="that of the model: CLIP 75, SD 3 256, FLUX 512")]
TilingOption = Annotated[int | None, Option("PIXELS", "Encode images larger than this in overlapping tiles of this size: less memory, but other numbers.", PERFORMANCE, shown="no tiles")]
BatchSizeOption = Annotated[int | None, Option("IMAGES", "How many images the VAE encodes at once.", PERFORMANCE, shown="8 at 512x512 on a GPU, 1 on a CPU")]
WorkersOption = Annotated[int | None, Option("THREADS", "Threads that decode images.", PERFORMANCE, shown="CPU cores, at most 16")]
ImagesOption = Annotated[str | Path | None, Option("DIR", "Folder of the images.", PREVIEW, shown="where they were encoded from")]
DecoderModelOption = Annotated[str | Path | None, Option("ID|DIR|FILE|tiny", "Model whose VAE decodes the latents, if it has moved.", PREVIEW, shown="the cache's own, if it is on this machine")]
DecoderVaeOption = Annotated[str | Path | None, Option("ID|DIR|FILE", "VAE that decodes the latents, if it is not the model's.", PREVIEW, shown="the cache's own")]
DecoderDeviceOption = Annotated[str, Option("auto|cuda|cuda:N|mps|cpu", "Where the VAE decodes.", PREVIEW)]
ShownSeedOption = Annotated[int, Option(help="Seed of the random choice of images.", panel=PREVIEW)]
ProgressOption = Annotated[bool | Progress, Option(help="True: messages and bars on stderr; False: none. Or an object with `say` and `bar`.", in_python_only=True)]
# fmt: on


def expand_encode(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each run that a call of `encode` asks for."""
    return expand(given, list_parameters(encode))


# fmt: off
@door_through(expand_encode, join_runs)
def encode(
    source: Annotated[str | Path | Origin | Iterable[Mapping[str, Any]] | None, Option("SOURCE", "Folder of images, with its subfolders; folder of WebDataset tars, or one .tar; or a .toml file of sets, or of kohya's sd-scripts.", is_argument=True)] = None,
    out: Annotated[str | Path | None, Option("DIR", "Folder or URL of the cache.", OUTPUT, shown="SOURCE.latents")] = None,
    *,
    options: Annotated[str | Path | None, Option("FILE", "TOML file with options, such as resolution = 768; an option that you type counts first.", INPUT)] = None,
    again: Annotated[str | Path | None, Option("CACHE", "Repeat the run that made this cache, with its options; an option that you type counts first.", INPUT)] = None,
    folders: Annotated[Folders, Option(help="Whether folders with names such as 10_sks dog (kohya's) are sets, with repeats and captions from the name. auto: if all folders are; kohya: those that are, others are left out; plain: none.", panel=INPUT)] = "auto",
    exclude: Annotated[str | Sequence[str] | None, Option("PATTERN", "Leave out files and folders with this name, such as '*_mask.png'; a pattern with a / is one of whole paths. May be given several times.", INPUT, of_set=True)] = None,
    max_megapixels: Annotated[float, Option("MEGAPIXELS", "Larger images are skipped unread: they may be decompression bombs.", INPUT)] = 180,
    animated: Annotated[Animated, Option(help="What to do with an image of several frames: take the first frame, or skip the image.", panel=INPUT)] = "first",
    background: Annotated[str, Option("auto|keep|COLOR", "What stands under transparent pixels. keep: the stored colour; COLOR: that colour; auto: the stored colour if it is a picture, else white.", INPUT)] = "auto",
    weights: Annotated[str | Path, Option("alpha|none|DIR", "Where loss weights come from: transparency, nowhere, or a folder of masks. A mask has the path of its image, but for the ending.", INPUT, of_set=True)] = "alpha",
    control: Annotated[str | Path | Sequence[str | Path] | None, Option("DIR", "Folder with the control images of edit pairs. Each has the path of its image, but for the ending. May be given several times.", INPUT, of_set=True)] = None,
    control_column: Annotated[str | Sequence[str] | None, Option("NAME", "Column of SOURCE's metadata files that has the path of each image's control image. May be given several times.", INPUT, of_set=True)] = None,
    control_size: Annotated[ControlSize, Option(help="Bucket of a control image that has another shape than its target. target: the target's bucket; own: one of its own.", panel=INPUT)] = "target",
    no_draft: NoDraftOption = False,
    strict_images: Annotated[bool, Option(help="Skip damaged JPEGs. By default they are encoded and counted, and parts of them may be wrong.", panel=INPUT)] = False,
    check_content: Annotated[bool, Option(help="Read and compare every image, even if its size and time have not changed.", panel=INPUT)] = False,
    allow_gone: Annotated[bool, Option(help="Go on although images of the cache are missing in SOURCE: most of them, or any if SOURCE is another folder.", panel=INPUT)] = False,
    retry_skipped: Annotated[bool, Option(help="Try all skipped images again. By default, only those for which something has changed.", panel=INPUT)] = False,
    seed: SeedOption = 0,
    store: Annotated[Store, Option(help="What to store of the VAE's output: mean and std, or the mean alone.", panel=OUTPUT)] = "mean+std",
    store_dtype: StoreDtypeOption = "float16",
    cond_dtype: CondDtypeOption = None,
    shard_size: ShardSizeOption = None,
    only: Annotated[Only | None, Option(help="latents: encode images alone; text: encode the prompts of encoded images alone. A later run does the rest.", panel=OUTPUT, shown="both, one after the other")] = None,
    overwrite: Annotated[bool, Option(help="Delete what the cache holds and start anew.", panel=OUTPUT)] = False,
    dry_run: Annotated[bool, Option(help="Print what a run would do and why, and how much time and space it takes. Write nothing.", panel=OUTPUT)] = False,
    log: Annotated[str | Path | None, Option("FILE|none", "File for the messages of the run; none: no file.", OUTPUT, shown="DIR.log, beside the cache")] = None,
    strict: Annotated[bool, Option(help="A skipped image counts as a failure: exit code 1.", panel=OUTPUT)] = False,
    model: ModelOption = DEFAULT_MODEL,
    vae: VaeOption = None,
    text_encoder: TextEncoderOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    devices: Annotated[str | None, Option("all|cuda:N,cuda:N", "Use several devices of this machine, with a process for each. all: every CUDA device.", MODEL, shown="--device alone")] = None,
    text_device: TextDeviceOption = None,
    dtype: DtypeOption = "auto",
    resolution: ResolutionOption = 512,
    bucket_step: Annotated[int, Option("PIXELS", "Sides of buckets are multiples of this.", GEOMETRY)] = 64,
    min_side: Annotated[int | None, Option("PIXELS", "Shortest side of a bucket. With a fixed or native size, images with a shorter side are skipped.", GEOMETRY, shown="resolution / 2; with --no-upscale the step; with a fixed or native size none")] = None,
    max_side: Annotated[int | None, Option("PIXELS", "Longest side of a bucket. With a fixed or native size, images with a longer side are skipped.", GEOMETRY, shown="resolution x 2; with --no-upscale or a fixed or native size none")] = None,
    max_aspect: Annotated[float, Option("RATIO", "Largest aspect ratio of a bucket: its longer side divided by its shorter one.", GEOMETRY)] = 4.0,
    no_upscale: Annotated[bool, Option(help="Enlarge no image. A small image gets a bucket of its own size, a large one a bucket close to its own shape.", panel=GEOMETRY)] = False,
    width: Annotated[int | None, Option("PIXELS", "Width of all images, with --height: one fixed size and no buckets.", GEOMETRY)] = None,
    height: Annotated[int | None, Option("PIXELS", "Height of all images, with --width: one fixed size and no buckets.", GEOMETRY)] = None,
    fit: Annotated[Fit, Option(help="How an image is made to fit its bucket. Padding has weight 0.", panel=GEOMETRY)] = "crop",
    filter: Annotated[Filter, Option("NAME", "How images are resized: lanczos, bicubic, bilinear, hamming, box or nearest.", GEOMETRY)] = "lanczos",  # noqa: A002
    crop: Annotated[Crop, Option(help="Which part of an image its bucket keeps; focus: where there is most to see.", panel=GEOMETRY)] = "center",
    crops: Annotated[int, Option("COUNT", "How many crops of each image to store; an epoch takes one of them.", GEOMETRY)] = 1,
    flip: Annotated[bool, Option(help="Store the mirrored image too; flip_p of LatentDataset then says how often it is taken.", panel=GEOMETRY)] = False,
    template: Annotated[str | Path | None, Option("NAME|FILE", "File with template lines that have [name] and [filewords], or the name of one that `latentprep templates` lists.", CAPTIONS, shown="the caption alone", of_set=True)] = None,
    placeholder: Annotated[str, Option("TEXT", "Text that replaces [name] in a template.", CAPTIONS, of_set=True)] = "",
    word_regex: Annotated[str, Option("REGEX", "Regular expression for the words of a file name that make the caption.", CAPTIONS, shown="the whole name", of_set=True)] = "",
    joiner: Annotated[str, Option("TEXT", "Text between the words that --word-regex finds.", CAPTIONS, shown="a space", of_set=True)] = " ",
    caption_lines: Annotated[bool, Option(help="Each line of a caption file is a caption of its own.", panel=CAPTIONS, of_set=True)] = False,
    caption_column: Annotated[str | Sequence[str] | None, Option("NAME", "Column of metadata files, and of the .json files in tars, that holds captions; may be given again.", CAPTIONS, shown=CAPTION_COLUMN, of_set=True)] = None,
    caption_from: Annotated[CaptionFrom, Option(help="Where captions come from. auto: caption and metadata files, else the file name; file: those files alone; name: the file name; folder: the name of the folder; none: nowhere.", panel=CAPTIONS, of_set=True)] = "auto",
    caption_extension: Annotated[str, Option(".EXT", "Extension of caption files.", CAPTIONS, shown=".txt, .caption", of_set=True)] = "",
    caption_encoding: Annotated[str, Option("utf-8|cp1252|NAME", "Encoding of caption and metadata files. A file that begins with a byte order mark is read by that.", CAPTIONS, of_set=True)] = CAPTION_ENCODING,
    caption_prefix: Annotated[str, Option("TEXT", "Put before each caption, with a space between.", CAPTIONS, of_set=True)] = "",
    caption_suffix: Annotated[str, Option("TEXT", "Put behind each caption, with a space between.", CAPTIONS, of_set=True)] = "",
    default_caption: Annotated[str, Option("TEXT|FILE.txt", "Caption of images without one in a file. If it names a .txt file, each line of that is a caption.", CAPTIONS, of_set=True)] = "",
    trigger: Annotated[str, Option("WORDS", "Words at the start of each caption, such as sks dog. They stay there if tags are shuffled.", CAPTIONS, of_set=True)] = "",
    prompts_per_image: Annotated[int, Option("K", "How many prompts of each image to store. They differ in caption, template line, tags and wildcards.", CAPTIONS, most=10_000)] = 1,
    shuffle_tags: Annotated[bool, Option(help="Shuffle the comma-separated tags of a caption.", panel=CAPTIONS, of_set=True)] = False,
    tag_drop_out: Annotated[float, Option("PROBABILITY", "Probability that a tag is left out.", CAPTIONS, of_set=True)] = 0.0,
    keep_tags: Annotated[int, Option("N", "The first N tags are neither shuffled nor left out.", CAPTIONS, of_set=True)] = 0,
    wildcards: Annotated[bool, Option(help="{a|b|c} in captions and templates becomes one of its parts.", panel=CAPTIONS, of_set=True)] = False,
    no_cond: NoCondOption = False,
    max_tokens: MaxTokensOption = None,
    clip_skip: Annotated[int, Option("LAYER", "Layer of CLIP to take, counted from the end: 1 is the last. Only for Stable Diffusion 1 and 2.", CAPTIONS)] = 1,
    image_uncond: Annotated[bool, Option(help="For Qwen-Image-Edit: store the conditioning of the empty prompt for each image too. The reader's caption_dropout needs it.", panel=CAPTIONS)] = False,
    emphasis: Annotated[bool, Option(help="Give weights to (words), [words] and (words:1.3), as stable-diffusion-webui does. Only for models whose text encoders are all CLIP.", panel=CAPTIONS)] = False,
    tiling: TilingOption = None,
    compile: Annotated[bool, Option(help="Compile the VAE's encoder (torch.compile). The start takes minutes longer, and needs a C++ compiler.", panel=PERFORMANCE)] = False,  # noqa: A002
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = None,
    rank: Annotated[int | None, Option("RANK", "Number of this process, from 0, among those that share the work; with --world-size.", MACHINES, shown="that of torchrun or SLURM")] = None,
    world_size: Annotated[int | None, Option("PROCESSES", "How many processes share the work. They need nothing in common but the cache.", MACHINES, shown="that of torchrun or SLURM")] = None,
    progress: ProgressOption = True,
) -> Encoded:
    """Encode a folder of images into a latent cache.

    Run it again to go on after an interruption, or after images or captions changed: what is done is not done again.

    In Python it returns what the run did. A skipped image is no error: the result counts it. The result also has the
    failures (faults of latentprep itself, or of the disk); `result.ok` is False if there were failures. With
    dry_run=True the result says what there is to do. Raises UserError for what the caller can correct: arguments,
    models, a full disk, a cache that another process writes to. An OSError may come from the file system. Raises
    KeyboardInterrupt after Ctrl-C, once what is done is safe on disk; the same call goes on from there.

    Under torchrun or SLURM each process that calls it does its share of the work, and returns once that is done. The
    last one commits the cache; `result.absent` has the ranks that are still at work. So wait for all of them, as with
    torch.distributed.barrier(), before a dataset opens the cache. If only one of the processes calls it, give
    rank=0 and world_size=1. Otherwise the cache is never committed: nobody does the other shares.
    """
    # fmt: on
    from latentprep.human import parse_bytes
    from latentprep.runs import run_encode

    assert isinstance(source, Origin)  # door_through has read what was given
    wording: dict[str, Any] = {
        "template": template, "placeholder": placeholder, "word_regex": word_regex, "joiner": joiner,
        "shuffle_tags": shuffle_tags, "tag_drop_out": tag_drop_out, "keep_tags": keep_tags, "wildcards": wildcards,
        "caption_lines": caption_lines, "caption_column": caption_column, "caption_from": caption_from,
        "caption_extension": caption_extension, "caption_encoding": caption_encoding, "caption_prefix": caption_prefix,
        "caption_suffix": caption_suffix, "default_caption": default_caption, "trigger": trigger,
    }  # fmt: skip
    encoders: dict[str, Any] = {
        "include_cond": not no_cond, "cond_dtype": cond_dtype or None, "prompts_per_image": prompts_per_image,
        "max_tokens": max_tokens, "clip_skip": clip_skip, "emphasis": emphasis, "image_uncond": image_uncond,
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


def recall_texts(cache: str) -> dict[str, TextOptions]:
    """How the captions of a cache were found, by the names of its sets; that of a single source is "". Raises UserError."""
    parameters = list_parameters(encode)
    # of captions alone: a template makes prompts of them, and may be gone
    names = {p.name for p in parameters if p.option.of_set and p.option.panel == CAPTIONS} - {"template", "placeholder"}
    (run,) = expand_encode({"again": cache})
    sets, common = run["source"].sets, {name: value for name, value in run.items() if name in names}
    own = [{name: value for name, value in one.items() if name in {*names, *OWN}} for one in sets]
    return {part.name: part.text for part in make_sets(own, common, parameters)} or {"": make_text(common)}


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
    cache: Annotated[str | Path, Option("CACHE", "Folder or URL of a cache.", is_argument=True)],
    *,
    key: Annotated[str | None, Option("NAME", "Show one image: its path in the image folder, or set/path.")] = None,
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
    show: Annotated[Show, Option(help="Which images to show: random ones; crop: those that lose most to their crop; weight: those with the least weight; outliers: those with the most unusual latents.", panel=PREVIEW)] = "random",
    num: Annotated[int, Option("N", "How many samples to show, at most.", PREVIEW, least=1, most=200)] = 12,
    seed: ShownSeedOption = 0,
    source: ImagesOption = None,
    model: DecoderModelOption = None,
    vae: DecoderVaeOption = None,
    device: DecoderDeviceOption = "cpu",
    progress: ProgressOption = True,
) -> Any:
    """Draw a contact sheet: images with their crops, the crops as trained, decoded latents, weights and captions.

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
    source: Annotated[str | Path | None, Option("DIR", "Folder of the images: names those that have changed, were renamed, are gone or are new, and captions that differ.")] = None,
    masks: Annotated[str | Path | None, Option("DIR", "Folder of the masks that the weights came from, if it is elsewhere now.")] = None,
    control: Annotated[str | Path | Sequence[str | Path] | None, Option("DIR", "Folder of the control images, if it is elsewhere now; may be given again.")] = None,
    re_encode: Annotated[int, Option("N", "Encode N random images of --source and their prompts again, and compare.", least=0)] = 0,
    seed: Annotated[int, Option(help="Which images --re-encode takes.")] = 0,
    model: Annotated[str | Path | None, Option("ID|DIR|FILE|tiny", "Model for --re-encode, if it is elsewhere now.", shown="the cache's own")] = None,
    vae: Annotated[str | Path | None, Option("ID|DIR|FILE", "VAE of --re-encode, if it is not that of --model.", shown="the cache's own")] = None,
    text_encoder: Annotated[str | Path | Sequence[str | Path] | None, Option("FILE|DIR", "Weights of text encoders of --re-encode, if they are elsewhere now; may be given again.", shown="the cache's own")] = None,
    no_cond: Annotated[bool, Option(help="With --re-encode: compare latents alone. This needs no text encoder.")] = False,
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
        str(cache), open_progress(progress, keywords_of(verify)), source=where, named=named, recall_texts=recall_texts,
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
    min_share: Annotated[float, Option("SHARE", "Rewrite a shard if at least this share of its rows is dead: of images that changed or were removed.", least=0, most=1)] = 0.2,  # compact.MIN_SHARE
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
    incomplete: Annotated[bool, Option(help="Commit even if ranks have not finished; the next encode does their work.")] = False,
) -> Merged:
    """Make the cache from what several ranks have done, if the last rank could not.

    In Python it returns what was committed. Raises UserError if ranks are missing, if they have done different work, or
    if a rank or another process is still at work on the cache.
    """
    # fmt: on
    from latentprep.runs import run_merge

    return run_merge(str(cache), incomplete)


# fmt: off
@door
def bench(
    source: Annotated[str | Path | None, Option("SOURCE", "Folder of images, or of WebDataset tars; up to 32 images are measured. Without SOURCE, pictures are drawn and measured.", is_argument=True)] = None,
    out: Annotated[str | Path | None, Option("DIR", "Folder on the disk that is measured, as for a cache. Nothing stays there.", OUTPUT, shown="SOURCE.latents, or here")] = None,
    *,
    seconds: Annotated[float, Option("SECONDS", "About how long to measure, without the time to load models.", PERFORMANCE, least=1, most=3600)] = 60,
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
    """Measure how fast each stage of encode is on this machine, what limits a run, and which options would help.

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
