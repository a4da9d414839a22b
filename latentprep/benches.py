"""What `bench` does, once its arguments are checked: each stage is measured for a share of the time there is."""

import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.options import EncodeOptions
from latentprep.progress import LateBar, Progress
from latentprep.quiet import quiet_logs, quiet_warnings
from latentprep.results import Benched
from latentprep.speeds import Rates, advise
from latentprep.system import measure_load, share_freed_memory

SHARES = {"decode": 0.2, "VAE": 0.4, "text": 0.2, "write": 0.12, "read": 0.08}  # of the seconds
PREFIX = ".latentprep-bench-"


def run_bench(options: EncodeOptions, progress: Progress, seconds: float, *, is_drawn: bool) -> Benched:
    """Measure every stage of a run with these options. Raises UserError; whatever happens, no file is left.

    is_drawn: the source is none, and pictures are drawn in its place.
    """
    import torch

    from latentprep.prepare.images.pillow import kept_limit, limit_pixels
    from latentprep.prepare.recipes import versions
    from latentprep.prepare.speed.decode import measure_decode
    from latentprep.prepare.speed.files import measure_write, write_small
    from latentprep.prepare.speed.models import measure_text, measure_vae
    from latentprep.prepare.speed.samples import draw_pictures, sample_images
    from latentprep.prepare.survey import prepare
    from latentprep.read.speed import measure_read

    share_freed_memory()
    load = measure_load()
    started = time.perf_counter()
    left = {stage: share * seconds for stage, share in SHARES.items()}
    with ExitStack() as stack:
        for context in (quiet_warnings, kept_limit(), quiet_logs):
            stack.enter_context(context)
        root = stack.enter_context(scratch(options.out))
        if is_drawn:
            pictures = stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX))
            draw_pictures(Path(pictures), options.seed)
            options = replace(options, source=Path(pictures))
        limit_pixels(options.max_pixels)
        images = sample_images(options.source, options.text, options.seed, progress)
        prepared = prepare(replace(options, out=f"{root}/none"), progress, images=images)
        with LateBar(progress, None, "decode") as bar:
            decode, bucket, pixels = measure_decode(prepared, left["decode"], bar.update)
        with LateBar(progress, None, "VAE") as bar:
            vae = measure_vae(prepared, bucket, pixels, left["VAE"], bar.update)
        with LateBar(progress, None, "text", "prompt") as bar:
            text, cond = measure_text(prepared, left["text"], bar.update)
        with LateBar(progress, None, "write", "B") as bar:
            write = measure_write(prepared, Storage(f"{root}/written"), bucket, left["write"], bar.update)
        text_bytes = text.num_bytes if text is not None else 0.0
        write_small(prepared, Storage(f"{root}/read"), bucket, cond, text_bytes)
        with LateBar(progress, None, "read", "sample") as bar:
            has_std = prepared.recipe.latents.store == "mean+std"
            read = measure_read(f"{root}/read", has_std, left["read"], bar.update)
    write_text = write.bytes_per_second / text.num_bytes if text is not None else None
    now = Rates(
        decode.with_threads, vae.own().per_second, write.per_second, text.per_second if text else None, write_text
    )
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    advised = advise(now, decode, vae, text, write, num_devices)
    return Benched(
        model=options.model,
        source=None if is_drawn else str(options.source),
        versions={**versions(), "python": platform.python_version()},
        seconds=time.perf_counter() - started,
        load=load,
        decode=decode,
        vae=vae,
        text=text,
        write=replace(write, where=options.out),
        read=read,
        now=now,
        best=replace(now, vae=vae.best().per_second),
        advice=advised.found,
        unsure=advised.unsure,
        tried=advised.tried,
    )


@contextmanager
def scratch(out: str) -> Iterator[str]:
    """A new folder where a cache would go: in it if it is there, or where it would be made. It does not stay.

    Raises UserError if it cannot be made.
    """
    storage = Storage(out)
    if not storage.is_local:
        root = f"{storage.root.rstrip('/')}/{PREFIX}{secrets.token_hex(8)}"
        try:
            yield root
        finally:
            with suppress(FileNotFoundError):
                storage.fs.rm(Storage(root).path, recursive=True)
        return
    place = Path(storage.path)
    home = next(path for path in (place, *place.parents) if path.exists())
    if not home.is_dir():
        raise UserError(f"--out {out}: {home} is a file, expected a folder to measure its disk in.")
    try:
        made = tempfile.mkdtemp(prefix=PREFIX, dir=home)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot write in {home} ({error.strerror or error}). Give a folder on the disk to measure."
        ) from None
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
