"""What bench prints: a page of speeds, what limits a run, what would help, and a line for an issue."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from latentprep.human import counted, human_bytes, printable
from latentprep.speeds import BatchSpeed, VaeSpeed

if TYPE_CHECKING:
    from latentprep.results import Benched


def short(number: float) -> str:
    """A number in three significant digits, or with all digits before the point: 0.123, 12.3, 12,345."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def page(found: "Benched") -> str:
    """All of it."""
    return "\n".join(
        [
            describe_decode(found),
            *describe_vae(found.vae),
            *describe_text(found),
            *describe_files(found),
            *describe_load(found.load, found.decode.cores, "all of this may be faster, and what helps may be chance"),
            "",
            *describe_limit(found),
            *describe_advice(found),
            "",
            f"paste    {found.line}",
        ]
    )


def describe_decode(found: "Benched") -> str:
    own = found.decode
    together = f"{short(own.with_threads)} with {counted(own.threads, 'thread')}"
    if own.with_cores is not None:
        together += f", {short(own.with_cores)} with {own.cores}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in own.images[:3])
    more = f", {len(own.images) - 3} other kinds" if len(own.images) > 3 else ""
    drawn = " drawn" if found.source is None else ""
    broken = f"; {counted(own.num_broken, 'image')} passed over" if own.num_broken else ""
    return printable(
        f"decode   {short(own.per_core)} images/s a core, {together} ({counted(own.num_images, 'image')}{drawn}: "
        f"{kinds}{more}; {own.num_measured} measured{broken})"
    )


def describe_vae(vae: VaeSpeed) -> Iterator[str]:
    height, width = vae.bucket
    first = vae.batches[0]
    work = f"{first.flops / first.per_second / 1e12:.3g} TFLOP an image"
    peak = "" if first.peak_share is not None else ", peak not known"
    by_area = "" if vae.size == vae.bucket else f", by its area: measured at {vae.size[1]}x{vae.size[0]}"
    yield printable(f"VAE      {width}x{height} on {vae.device_name}, {work}{peak}{by_area}")
    for batch in vae.batches:
        yield f"           {describe_batch(batch)}"
    for end in filter(None, vae.ends):
        yield printable(f"           {end}")


def describe_batch(batch: BatchSpeed) -> str:
    share = f", {batch.peak_share:.0%} of the peak" if batch.peak_share is not None else ""
    retried = ""
    if batch.num_retried:
        retried = f"; {counted(batch.num_retried, 'image')} overflowed, and were encoded again in float32"
    return (
        f"{batch.dtype:<8} batch {batch.batch_size:>3}: {short(batch.per_second):>6} images/s, "
        f"{batch.flops / 1e12:.3g} TFLOP/s{share} (median of {batch.num_measured}{retried})"
    )


def describe_text(found: "Benched") -> Iterator[str]:
    text = found.text
    if text is None:
        yield "text     not measured: no text encoder is asked for"
        return
    tokens = f", {text.tokens:.1f} tokens a prompt" if text.tokens is not None else ""
    yield (
        f"text     {short(text.per_second)} prompts/s on {text.device} in {text.dtype}{tokens} "
        f"({counted(text.num_prompts, 'prompt')} at once, median of {text.num_measured})"
    )


def describe_files(found: "Benched") -> Iterator[str]:
    write, read = found.write, found.read
    yield printable(
        f"write    {human_bytes(write.bytes_per_second)}/s in shards of {human_bytes(write.shard_bytes)}, that is "
        f"{short(write.per_second)} images/s (median of {write.num_measured}, {write.where})"
    )
    yield (
        f"read     {short(read.per_second)} samples/s with LatentLoader, in batches of {read.batch_size} from memory "
        f"({counted(read.num_samples, 'sample')}, median of {counted(read.num_measured, 'epoch')})"
    )


def is_busy(load: float | None, cores: int) -> bool:
    """Whether others had more than a quarter of the cores."""
    return load is not None and load > cores / 4


def describe_load(load: float | None, cores: int, so: str) -> Iterator[str]:
    """A line if other programs were at work while something was measured; `so` says what follows."""
    if is_busy(load, cores):
        yield f"note     other programs were at work (load {load:.1f} on {counted(cores, 'core')}): {so}"


def describe_limit(found: "Benched") -> Iterator[str]:
    best, now = found.best, found.now
    line = f"limit    {best.limit}: {short(best.images_per_second)} images/s"
    if now.images_per_second < 0.95 * best.images_per_second:
        size = found.vae.best().batch_size
        line += (
            f" with the VAE in batches of {size}; {short(now.images_per_second)} in batches of {found.vae.batch_size}"
        )
    yield line
    if now.text is not None:
        yield (f"         the text encoders take {now.text_share:.0%} of a run, if each image has a prompt of its own")


def describe_advice(found: "Benched") -> Iterator[str]:
    head = "helps    "
    for own in found.advice:
        gain = f"{own.gain:.2f} times as fast: " if own.gain is not None else ""
        yield f"{head}{own.what}: {gain}{own.why}"
        head = " " * len(head)
    if not found.advice:
        yield f"{head}none{' for certain' * bool(found.unsure)} of {'; '.join(found.tried)}"
    if found.unsure:
        yield f"unsure   {', '.join(found.unsure)}: was measured once; more --seconds measure more often"


def issue_line(found: "Benched") -> str:
    """One line: versions, device and numbers."""
    vae, best, text = found.vae, found.vae.best(), found.text
    versions = " ".join(f"{name} {version}" for name, version in found.versions.items())
    model = re.split(r"[/\\]", found.model.rstrip("/\\"))[-1]  # where it lies is nobody's business
    load = f", load {found.load:.1f}" if is_busy(found.load, found.decode.cores) else ""
    parts = [
        versions,
        f"{vae.device_name}, {counted(found.decode.cores, 'core')}{load}",
        f"{model} {vae.bucket[1]}x{vae.bucket[0]} {vae.dtype}",
        f"decode {short(found.decode.per_core)} a core, {short(found.decode.with_threads)} by {found.decode.threads}",
        f"VAE {short(best.per_second)} in batches of {best.batch_size}",
        *([f"text {short(text.per_second)}"] if text is not None else []),
        f"write {human_bytes(found.write.bytes_per_second)}/s",
        f"read {short(found.read.per_second)}",
    ]
    return printable("; ".join(parts))
