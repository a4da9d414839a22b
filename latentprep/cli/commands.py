"""Typer commands: options -> config -> one call. No logic, and no heavy imports until a command runs."""

import json
import os
import sys
import warnings
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentprep import __version__
from latentprep.cli.terminal import fail, say, show, show_json, unbreakable
from latentprep.errors import UserError
from latentprep.options import (
    CAPTION_COLUMN,
    DEFAULT_MODEL,
    EncodeOptions,
    Geometry,
    ImageOptions,
    TextOptions,
    count_pixels,
)

if TYPE_CHECKING:
    from latentprep.prepare.survey import Prepared

app = typer.Typer(
    help="Encode an image folder once into a latent cache; train diffusion models from it many times.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

INPUT, OUTPUT, MODEL, GEOMETRY, CAPTIONS, PERFORMANCE = (
    "Input",
    "Output",
    "Model",
    "Geometry",
    "Captions",
    "Performance",
)


def _version(wanted: bool) -> None:
    if wanted:
        show(f"latentprep {__version__}")
        raise typer.Exit


@app.callback()
def latentprep(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# fmt: off
@app.command()
def encode(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of images, searched recursively, or of WebDataset tars.", show_default=False)],
    max_megapixels: Annotated[float, typer.Option(metavar="MEGAPIXELS", help="Larger images are skipped unread: they may be decompression bombs.", rich_help_panel=INPUT)] = 180,
    animated: Annotated[str, typer.Option(metavar="first|skip", help="Of an image with several frames: take the first, or leave it out.", rich_help_panel=INPUT)] = "first",
    background: Annotated[str, typer.Option(metavar="auto|keep|COLOR", help="Below transparency: its stored colour, or a colour; auto: stored where it is a picture, else white.", rich_help_panel=INPUT)] = "auto",
    weights: Annotated[str, typer.Option(metavar="alpha|none|DIR", help="Loss weights from transparency, or from a folder of masks with the images' paths and stems.", rich_help_panel=INPUT)] = "alpha",
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Decode large JPEGs in full, and not at a fraction that is still twice what is needed.", rich_help_panel=INPUT)] = False,
    strict_images: Annotated[bool, typer.Option("--strict-images", help="Leave out damaged JPEGs, parts of which would be wrong; by default they are counted.", rich_help_panel=INPUT)] = False,
    check_content: Annotated[bool, typer.Option("--check-content", help="Read and compare every image, also those whose size and time are as they were.", rich_help_panel=INPUT)] = False,
    allow_gone: Annotated[bool, typer.Option("--allow-gone", help="Go on though most of the images in the cache are not in SOURCE.", rich_help_panel=INPUT)] = False,
    retry_skipped: Annotated[bool, typer.Option("--retry-skipped", help="Try again all that was skipped; else only that for which something has changed.", rich_help_panel=INPUT)] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.", rich_help_panel=INPUT)] = 0,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the cache goes.", show_default="SOURCE.latents", rich_help_panel=OUTPUT)] = "",
    store: Annotated[str, typer.Option(metavar="mean+std|mean", help="What to keep of the VAE posterior.", rich_help_panel=OUTPUT)] = "mean+std",
    store_dtype: Annotated[str, typer.Option(metavar="float16|bfloat16|float32", help="Number type of latents and cond on disk.", rich_help_panel=OUTPUT)] = "float16",
    shard_size: Annotated[str, typer.Option(metavar="BYTES", help="Largest size of a shard file; a run that is stopped loses at most one.", show_default="256MB, on a CPU 16MB", rich_help_panel=OUTPUT)] = "",
    only: Annotated[str, typer.Option(metavar="latents|text", help="Encode images alone, or the prompts of what is encoded; a later run does the rest.", show_default="both, one after the other", rich_help_panel=OUTPUT)] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what the cache holds and start anew.", rich_help_panel=OUTPUT)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be done and why, with the time and space it takes; write nothing.", rich_help_panel=OUTPUT)] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if any image was skipped.", rich_help_panel=OUTPUT)] = False,
    model: Annotated[str, typer.Option(metavar="ID|DIR|FILE|tiny", help="Hub id, diffusers folder, .safetensors checkpoint, or the built-in miniature.", rich_help_panel=MODEL)] = DEFAULT_MODEL,
    vae: Annotated[str, typer.Option(metavar="ID|DIR|FILE", help="Another VAE than the model's own.", show_default="the model's", rich_help_panel=MODEL)] = "",
    config: Annotated[str, typer.Option(metavar="DIR", help="Diffusers folder with the configs and tokenizers of a checkpoint.", show_default="what its tensors tell", rich_help_panel=MODEL)] = "",
    revision: Annotated[str, typer.Option(metavar="REV", help="Branch, tag or commit of a hub model.", show_default="main", rich_help_panel=MODEL)] = "",
    device: Annotated[str, typer.Option(metavar="auto|cuda|cuda:N|mps|cpu", help="Where the models run.", rich_help_panel=MODEL)] = "auto",
    dtype: Annotated[str, typer.Option(metavar="auto|float32|float16|bfloat16", help="Number type of the models; auto: float16 on CUDA, else float32.", rich_help_panel=MODEL)] = "auto",
    resolution: Annotated[str, typer.Option(metavar="PIXELS|native", help="Buckets have at most PIXELS x PIXELS; native: no resizing.", rich_help_panel=GEOMETRY)] = "512",
    bucket_step: Annotated[int, typer.Option(metavar="PIXELS", help="Sides of buckets are multiples of this.", rich_help_panel=GEOMETRY)] = 64,
    min_side: Annotated[int | None, typer.Option(metavar="PIXELS", help="Shortest side of a bucket; of an image with a fixed or native size.", show_default="resolution / 2; with --no-upscale the step", rich_help_panel=GEOMETRY)] = None,
    max_side: Annotated[int | None, typer.Option(metavar="PIXELS", help="Longest side, likewise.", show_default="resolution x 2; with --no-upscale none", rich_help_panel=GEOMETRY)] = None,
    max_aspect: Annotated[float, typer.Option(metavar="RATIO", help="Longest side of a bucket over its shortest.", rich_help_panel=GEOMETRY)] = 4.0,
    no_upscale: Annotated[bool, typer.Option("--no-upscale", help="No image is enlarged: each has a bucket of its own size, or of its own shape.", rich_help_panel=GEOMETRY)] = False,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", help="One fixed size for all, with --height.", show_default=False, rich_help_panel=GEOMETRY)] = None,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", help="One fixed size for all, with --width.", show_default=False, rich_help_panel=GEOMETRY)] = None,
    fit: Annotated[str, typer.Option(metavar="crop|stretch|pad", help="How an image fills its bucket; padding weighs 0.", rich_help_panel=GEOMETRY)] = "crop",
    filter: Annotated[str, typer.Option(metavar="NAME", help="lanczos, bicubic, bilinear, hamming, box or nearest.", rich_help_panel=GEOMETRY)] = "lanczos",  # noqa: A002
    crop: Annotated[str, typer.Option(metavar="center|random|focus", help="Which part of an image its bucket keeps; focus: where there is most to see.", rich_help_panel=GEOMETRY)] = "center",
    crops: Annotated[int, typer.Option(metavar="COUNT", help="Crops of each image, as views; an epoch takes one of them.", rich_help_panel=GEOMETRY)] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="Encode the mirrored image too, as a second view.", rich_help_panel=GEOMETRY)] = False,
    template: Annotated[str, typer.Option(metavar="NAME|FILE", help="Template lines with [name] and [filewords]; see `latentprep templates`.", show_default="the caption alone", rich_help_panel=CAPTIONS)] = "",
    placeholder: Annotated[str, typer.Option(metavar="TEXT", help="What [name] stands for.", show_default=False, rich_help_panel=CAPTIONS)] = "",
    word_regex: Annotated[str, typer.Option(metavar="REGEX", help="Words of a file name that make its caption.", show_default="the whole name", rich_help_panel=CAPTIONS)] = "",
    joiner: Annotated[str, typer.Option(metavar="TEXT", help="Between the words that --word-regex finds.", show_default="a space", rich_help_panel=CAPTIONS)] = " ",
    caption_lines: Annotated[bool, typer.Option("--caption-lines", help="Each line of a caption file is a caption of its own.", rich_help_panel=CAPTIONS)] = False,
    caption_column: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Column of metadata files, and of the .json files in tars, that holds captions; may be given again.", show_default=CAPTION_COLUMN, rich_help_panel=CAPTIONS)] = None,
    prompts_per_image: Annotated[int, typer.Option(metavar="K", help="Prompts of each image: other captions, template lines, tags and wildcards.", rich_help_panel=CAPTIONS)] = 1,
    shuffle_tags: Annotated[bool, typer.Option("--shuffle-tags", help="Shuffle the comma-separated tags of a caption.", rich_help_panel=CAPTIONS)] = False,
    tag_drop_out: Annotated[float, typer.Option(metavar="PROBABILITY", help="How often each tag is left out.", rich_help_panel=CAPTIONS)] = 0.0,
    keep_tags: Annotated[int, typer.Option(metavar="N", help="The first N tags are neither shuffled nor left out.", rich_help_panel=CAPTIONS)] = 0,
    wildcards: Annotated[bool, typer.Option("--wildcards", help="{a|b|c} in captions and templates becomes one of its parts.", rich_help_panel=CAPTIONS)] = False,
    no_cond: Annotated[bool, typer.Option("--no-cond", help="Store captions and prompts, but no text embeddings.", rich_help_panel=CAPTIONS)] = False,
    max_tokens: Annotated[int | None, typer.Option(metavar="TOKENS", help="Tokens kept of a prompt: for CLIP 75, 150, 225, ... in windows of 75; for T5 up to 512.", show_default="75; SD 3: 256; FLUX: 512", rich_help_panel=CAPTIONS)] = None,
    clip_skip: Annotated[int, typer.Option(metavar="LAYER", help="Layer of CLIP to take, from the end; 2 is the penultimate. Stable Diffusion 1 and 2.", rich_help_panel=CAPTIONS)] = 1,
    emphasis: Annotated[bool, typer.Option("--emphasis", help="Weigh (words), [words] and (words:1.3) as stable-diffusion-webui does. CLIP alone.", rich_help_panel=CAPTIONS)] = False,
    tiling: Annotated[int | None, typer.Option(metavar="PIXELS", help="Encode larger images in overlapping tiles of this side: less memory, but other numbers.", show_default="no tiles", rich_help_panel=PERFORMANCE)] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the VAE's encoder (torch.compile): starts minutes later, needs a C++ compiler.", rich_help_panel=PERFORMANCE)] = False,  # noqa: A002
    batch_size: Annotated[int | None, typer.Option(metavar="IMAGES", help="Images the VAE sees at once.", show_default="8 at 512x512 on a GPU, 1 on a CPU", rich_help_panel=PERFORMANCE)] = None,
    workers: Annotated[int | None, typer.Option(metavar="THREADS", help="Threads that decode images.", show_default="CPU cores, at most 8", rich_help_panel=PERFORMANCE)] = None,
) -> None:
    """Encode a folder of images into a latent cache.

    Run it again to go on after an interruption, or after images or captions changed: what is done is not done again.
    """
    # fmt: on
    from latentprep.human import parse_bytes
    from latentprep.prompts import load_template

    images = ImageOptions.from_options(background=background, weights=weights, animated=animated, draft=not no_draft)
    options = EncodeOptions(
        source=source,
        out=out or default_out(source),
        geometry=Geometry.from_options(
            resolution=resolution, width=width, height=height, bucket_step=bucket_step, min_side=min_side,
            max_side=max_side, max_aspect=max_aspect, upscale=not no_upscale, fit=fit, filter=filter, crop=crop,
            crops=crops, seed=seed,
        ),
        images=images,
        masks=Path(weights) if images.weights == "masks" else None,
        text=TextOptions(
            load_template(template) if template else None, placeholder, word_regex, joiner, not no_cond,
            prompts_per_image=prompts_per_image, shuffle_tags=shuffle_tags, tag_drop_out=tag_drop_out,
            keep_tags=keep_tags, wildcards=wildcards, caption_lines=caption_lines,
            caption_columns=tuple(caption_column or (CAPTION_COLUMN,)),
            max_tokens=max_tokens, clip_skip=clip_skip, emphasis=emphasis,
        ),
        model=model, vae=vae or None, config=config or None, revision=revision or None, flip=flip, store=store,
        store_dtype=store_dtype, device=device, dtype=dtype,
        tiling=tiling, compile=compile, batch_size=batch_size, workers=workers, seed=seed,
        shard_bytes=parse_bytes("--shard-size", shard_size) if shard_size else None,
        max_pixels=count_pixels(max_megapixels), only=only or None, overwrite=overwrite, strict=strict,
        strict_images=strict_images, check_content=check_content, allow_gone=allow_gone, retry_skipped=retry_skipped,
    )  # fmt: skip
    run_encode(options, dry_run=dry_run)


def default_out(source: Path) -> str:
    """SOURCE.latents, beside it. Raises UserError for the root of a disk."""
    if source.name in ("", ".."):  # of the folder that one is in
        source = source.resolve()
    if not source.name:
        raise UserError(f"SOURCE {source}: the cache cannot lie beside it. Say where it goes: --out DIR.")
    return f"{source}.latents"


def _quiet() -> None:
    """Keep other libraries from talking while they are imported."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import, where it already talks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_encode(options: EncodeOptions, *, dry_run: bool = False) -> None:
    """Plan, encode and report; the exit code tells the truth."""
    _quiet()
    from latentprep.cache.lock import hold
    from latentprep.cache.storage import Storage
    from latentprep.cli import messages
    from latentprep.cli.stop import end_if_stuck, stoppable
    from latentprep.prepare.devices import quiet_libraries
    from latentprep.prepare.plan.estimate import estimate_time
    from latentprep.prepare.survey import check_paths, prepare

    check_paths(options, say)
    if dry_run:
        prepared = prepare(options, say)
        say(messages.source_text(prepared))
        quiet_libraries()
        show(messages.plan_text(prepared, estimate_time(prepared)))
        return
    try:
        with stoppable(), hold(Storage(options.out)):
            code = encode_prepared(prepare(options, say))
    except KeyboardInterrupt as stop:
        say(messages.interrupted_text(options, sys.argv[1:]))
        code = 128 + (stop.args[0] if stop.args else 2)
        end_if_stuck(code)
        raise typer.Exit(code) from None
    raise typer.Exit(code)


def encode_prepared(prepared: "Prepared") -> int:
    """Encode what there is to do, and report; returns the exit code."""
    from tqdm import tqdm

    from latentprep.cache.leftovers import clear_orphans, clear_temporaries
    from latentprep.cli import messages
    from latentprep.prepare.devices import quiet_libraries
    from latentprep.prepare.encode import encode

    say(messages.source_text(prepared))
    is_strict = prepared.options.strict
    if prepared.is_done and prepared.manifest is not None:
        clear_temporaries(prepared.storage)
        show(messages.done_text(prepared, clear_orphans(prepared.storage, prepared.manifest)))
        return messages.exit_code(prepared.plan.skips, [], is_strict)
    quiet_libraries()

    def make_progress(total: int, stage: str) -> Any:
        return tqdm(
            total=total, desc=stage, unit="img", dynamic_ncols=True, smoothing=0.1, file=sys.stderr, disable=not total
        )

    outcome = encode(prepared, make_progress)
    show(messages.outcome_text(prepared, outcome))
    return messages.exit_code(outcome.skips, outcome.failures, is_strict)


@app.command()
def inspect(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder.", show_default=False)],
    key: Annotated[str, typer.Option(metavar="NAME", help="One image, by its path relative to the image folder.", show_default=False)] = "",
    most_cropped: Annotated[int, typer.Option(metavar="COUNT", min=0, help="How many of the most cropped images to name.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show what is in a cache: counts, recipe, buckets, statistics, captions, skips."""
    from rich.console import Console

    from latentprep.cache.readers import Reading
    from latentprep.cache.storage import Storage
    from latentprep.look import summary, tables

    storage = Storage(cache)
    with Reading(storage):
        found = summary.describe_sample(storage, key) if key else summary.summarize(storage, most_cropped)
    if as_json:
        show_json(json.dumps(found, indent=2))
    else:
        Console(highlight=False).print(tables.render_sample(found) if key else tables.render_summary(found), markup=False)


# fmt: off
@app.command()
def verify(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder.", show_default=False)],
    source: Annotated[Path | None, typer.Option(metavar="DIR", help="Compare with the images too: changed, gone and new ones.", show_default=False)] = None,
    masks: Annotated[Path | None, typer.Option(metavar="DIR", help="Masks of encode --weights DIR, if they are elsewhere now.", show_default=False)] = None,
    re_encode: Annotated[int, typer.Option(metavar="N", min=0, help="Encode N random images of --source and their prompts again, and compare.")] = 0,
    seed: Annotated[int, typer.Option(help="Which images --re-encode takes.")] = 0,
    model: Annotated[str, typer.Option(metavar="ID|DIR|FILE|tiny", help="Model of --re-encode.", show_default="the cache's own")] = "",
    vae: Annotated[str, typer.Option(metavar="ID|DIR|FILE", help="VAE of --re-encode, if it is not that of --model.", show_default="the cache's own")] = "",
    no_cond: Annotated[bool, typer.Option("--no-cond", help="Of --re-encode: compare latents alone; needs no text encoder.")] = False,
    device: Annotated[str, typer.Option(metavar="auto|cuda|cuda:N|mps|cpu", help="Where --re-encode runs.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Check a cache: every byte, shape and number, and on request the images it came from.

    Exit code 0: nothing wrong. 1: problems, which are listed.
    """
    # fmt: on
    from tqdm import tqdm

    from latentprep.cache.readers import Reading
    from latentprep.cache.storage import Storage
    from latentprep.look.tables import render_problems
    from latentprep.look.verify import verify as verify_cache

    if re_encode and source is None:
        raise UserError("--re-encode needs the images: give their folder with --source.")
    storage = Storage(cache)
    found: dict[str, Any] = {"cache": cache}
    with tqdm(unit="B", unit_scale=True, desc="hash", dynamic_ncols=True, disable=as_json or None) as bar:
        manifest, problems = verify_cache(storage, bar.update)
    reading = Reading(storage)
    if manifest is not None:
        found |= {"images": manifest.num_images, "shards": len(manifest.shards)}
    if source is not None and problems:
        found["source"] = f"{source}: not compared; mend the cache first"
    elif manifest is not None and source is not None:
        _quiet()
        from latentprep.prepare.devices import quiet_libraries
        from latentprep.prepare.recheck import compare_source, find_masks, reencode
        from latentprep.prepare.recheck_text import find_text, reencode_text

        own_masks = find_masks(manifest, masks)
        with tqdm(unit="img", desc="source", dynamic_ncols=True, disable=as_json or None) as bar:
            problems += compare_source(storage, manifest, source, own_masks, bar.update)
        if re_encode:
            quiet_libraries()
            text = None if no_cond else find_text(manifest, model or None, vae or None)
            more, found["largest_difference"] = reencode(
                storage, manifest, source, own_masks, re_encode,
                seed=seed, model=model or None, vae=vae or None, device=device,
            )  # fmt: skip
            problems += more
            if text is not None:
                more, found["largest_cond_difference"] = reencode_text(
                    storage, manifest, text, re_encode, seed=seed, device=device
                )
                problems += more
    reading.close()
    found |= {
        name: None for name in ("largest_difference", "largest_cond_difference") if not isfinite(found.get(name, 0.0))
    }  # JSON knows no NaN
    found["problems"] = [asdict(problem) for problem in problems]
    show_json(json.dumps(found, indent=2)) if as_json else show(render_problems(found))
    raise typer.Exit(1 if problems else 0)


@app.command()
def compact(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A cache folder.", show_default=False)],
    min_share: Annotated[float, typer.Option(metavar="SHARE", min=0, max=1, help="Rewrite shards of which at least this share is tombstones.")] = 0.2,  # compact.MIN_SHARE
) -> None:
    """Free the space of images that changed or were removed: rewrite the shards that hold many of them."""
    from latentprep.cache.compact import compact as compact_cache
    from latentprep.cache.lock import hold
    from latentprep.cache.manifest import open_manifest
    from latentprep.cache.storage import Storage
    from latentprep.human import counted, human_bytes

    storage = Storage(cache)
    open_manifest(storage)  # before the lock, which would make the folder
    with hold(storage):
        done = compact_cache(storage, min_share)
    left = f"; {counted(done.num_left, 'tombstone')} left in shards that have few" if done.num_left else ""
    show(
        f"{cache}: {counted(done.num_shards, 'shard')} rewritten or removed, {counted(done.num_rows, 'row')} "
        f"and {human_bytes(max(0, done.nbytes))} freed{left}"
    )
    if done.num_read:
        show(
            f"{counted(done.num_read, 'old file')} stay while a training loop may read them; the next latentprep encode "
            "or compact deletes them"
        )
    for line in done.damaged:
        show(f"damaged  {line} The shard was left alone: delete this file and run latentprep encode again.")
    if done.damaged:
        raise typer.Exit(1)


@app.command()
def templates() -> None:
    """List the prompt templates that ship with latentprep, with their lines."""
    from latentprep.prompts import list_templates

    for name, lines in list_templates().items():
        show(name)
        for line in lines:
            show(f"    {line}")


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the demo's images and cache.")] = Path("demo"),
) -> None:
    """Draw images with captions and alpha, and encode them with the built-in model `tiny`."""
    from latentprep.demo import draw_folder

    images, cache = out / "images", out / "cache"
    draw_folder(images)
    say(f"drew {images}: landscapes with captions, some with alpha, some turned by EXIF, and one broken file")
    geometry = Geometry.from_options(resolution="256", bucket_step=64)
    options = EncodeOptions(images, str(cache), geometry, TextOptions(), model="tiny", flip=True)
    run_encode(options)


def main() -> None:
    """Entry point: errors that are the person's to mend are one line, and no traceback."""
    with unbreakable():
        try:
            app()
        except UserError as error:
            fail(str(error))
        except OSError as error:  # of the file system, wherever it comes up: a name that is too long, a disk that fails
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}. Mend that, and run the same command again.")
        else:
            return
        sys.exit(1)


if __name__ == "__main__":
    main()
