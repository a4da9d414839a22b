"""A report -> one HTML page that needs nothing else: no file beside it, and no network."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from math import exp, pi, sqrt
from typing import Any
from urllib.parse import quote

from latentprep.cache.ragged import show_shape
from latentprep.errors import UserError
from latentprep.human import counted, human_bytes, printable
from latentprep.look import histogram
from latentprep.look.alike import NEAR
from latentprep.look.cards import Card, Frame, frame_of
from latentprep.look.findings import list_unusual
from latentprep.look.histogram import Histogram
from latentprep.look.measures import LIMIT, NUM_BINS, Channels
from latentprep.look.report import Report
from latentprep.look.samples import AWAY
from latentprep.look.tables import MANY_SETS, list_facts
from latentprep.outputs import MARK
from latentprep.records import NOTES, REASONS, Box

MOST_VALUE, MOST_VALUES = 300, 500  # characters of a recipe's value; values
MOST_BUCKETS = 60  # that are shown
MOST_ALT = 120  # characters that a picture is described by


@dataclass(frozen=True)
class Shot:
    """A picture of a page."""

    jpeg: str = ""  # base64; "": there is none
    width: int = 0  # of the picture, in its own pixels
    frame: Frame | None = None
    origin: str = "none"  # what it was made of
    warning: str = ""
    weight: str = ""  # base64 of a JPEG of its loss weights; "": all are 1

    @property
    def style(self) -> str:
        """The frame in CSS: numbers alone. The last two are how wide a frame may be: no picture is enlarged."""
        assert self.frame is not None
        own = self.frame
        names = ("r", own.ratio), *zip("ltwh", vars(own.cut).values(), strict=True), ("R", own.whole_ratio)
        more = *zip("LTWH", vars(own.whole).values(), strict=True), *zip("xyab", vars(own.crop).values(), strict=True)
        widths = zip("pP", (100 * self.width / max(0.01, own.width) for own in (own.cut, own.whole)), strict=True)
        return ";".join(f"--{name}:{value:.5g}" for name, value in (*names, *more, *widths))


@dataclass(frozen=True)
class Entry:
    """An image of a page: its card and its picture."""

    card: Card
    shot: Shot

    @property
    def alt(self) -> str:
        """What the picture shows, in words: a caption if there is one."""
        caption = next((text for text in self.card.captions if text), self.card.key)
        return cut_end(caption, MOST_ALT)

    @property
    def score(self) -> str:
        if self.card.score is None:
            return ""
        return "not finite" if self.card.score == AWAY else f"score {self.card.score:.1f}"

    @property
    def score_value(self) -> str:
        return f"{self.card.score:.4f}" if self.card.score is not None else ""


def make_shot(card: Card, jpeg: bytes, width: int, shown: Box, origin: str, warning: str, weight: bytes) -> Shot:
    """A picture of a card that shows a box of its resized image; `width` is that of the picture."""
    frame = frame_of(card.resized, card.crop, shown)
    return Shot(
        base64.b64encode(jpeg).decode(), width, frame, origin, warning, base64.b64encode(weight).decode()
    )  # fmt: skip


def check_jinja() -> None:
    """Raise UserError if jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise UserError(
            "--html: needs jinja2, which is not installed. Type: pip install 'latentprep[report]'"
        ) from None


@cache
def open_template() -> Any:
    """The page. Whatever is put into it is made printable, and escaped."""
    import jinja2
    import markupsafe

    folder = files("latentprep.look").joinpath("page")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))

    def finalize(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value

    environment = jinja2.Environment(
        autoescape=True, finalize=finalize, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["address"] = lambda text: quote(printable(text), safe="")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(
        css=markupsafe.Markup(style), script=markupsafe.Markup(script), script_hash=f"sha256-{digest}",
        mark=MARK.format(kind="report"), counted=counted, bar=bar, near_limit=NEAR, notes=NOTES,
    )  # fmt: skip
    return environment.from_string(folder.joinpath("report.html").read_text(encoding="utf-8"))


def render(report: Report, shots: Sequence[Shot], skipped: Mapping[str, bytes], remarks: Sequence[str]) -> str:
    """The page. `shots` are the pictures of the report's cards; `skipped` JPEGs of skipped files by their keys."""
    summary, found, channels, words = report.summary, report.found, report.looked.channels, report.words
    entries = [Entry(card, shot) for card, shot in zip(report.cards, shots, strict=True)]
    by_number = {entry.card.number: entry for entry in entries}
    num_looked, num_images = len(report.looked.images), summary["images"]
    page: str = open_template().render(
        cache_name=summary["cache"].rstrip("/").rpartition("/")[2] or summary["cache"],
        summary=summary,
        tiles=list(list_tiles(report)),
        parts=list(list_parts(summary)),
        warnings=report.warnings,
        remarks=remarks,
        buckets=largest(summary["buckets"]),
        most_bucket=max(summary["buckets"].values(), default=1),
        losses=histogram.of_shares(report.images.losses),
        cropped=[by_number[n] for n in found.cropped],
        patched=report.patched,
        looked=f"all {num_images:,} images"
        if num_looked == num_images
        else f"{num_looked:,} of {num_images:,} images, chosen at random",
        channels=channels,
        channel_rows=list(list_channels(channels)),
        values=histogram_of(channels),
        normal=normal_line(channels),
        outliers=[by_number[n] for n in found.outliers],
        found=found,
        doubles=[(count, [by_number[n] for n in own]) for count, own in found.doubles],
        near=[(distance, by_number[one], by_number[other]) for distance, one, other in found.near],
        words=words,
        letters=histogram.of_counts(words.letters),
        tokens=histogram.of_counts(words.tokens) if words.tokens is not None else None,
        text_facts=list(list_text_facts(summary["text"])),
        sets=summary["sets"][:MANY_SETS],
        skips=list(list_skips(report, skipped)),
        facts=list(list_facts(summary)),
        recipe=list(islice(flatten({part: summary[part] for part in ("recipe", "latent", "made_with")}), MOST_VALUES)),
        gallery_says=tell_gallery(report),
        gallery_buckets=sorted({card.bucket for card in report.cards}, key=lambda size: [*map(int, size.split("x"))]),
        gallery_sets=sorted({card.set for card in report.cards} - {""}),
        gallery=entries,
    )  # fmt: skip
    return page


def bar(count: int, most: int) -> float:
    """The length of a bar in percent, at least 0.75, so that it can be seen."""
    return max(0.75, 100 * count / max(1, most))


def largest(buckets: Mapping[str, int]) -> dict[str, int]:
    """Those of most images, in their own order."""
    shown = set(sorted(buckets, key=lambda size: -buckets[size])[:MOST_BUCKETS])
    return {size: count for size, count in buckets.items() if size in shown}


def list_tiles(report: Report) -> Iterator[tuple[str, str]]:
    summary = report.summary
    yield f"{summary['images']:,}", "images"
    yield f"{len(summary['buckets']):,}", "buckets"
    yield f"{summary['text']['distinct_prompts']:,}", "prompts"
    if summary["sets"]:
        yield f"{len(summary['sets']):,}", "sets"
    yield f"{sum(summary['skipped'].values()):,}", "skipped"
    yield human_bytes(sum(summary["bytes"].values())), "on disk"


def list_parts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Parts of the page, for its menu."""
    yield from (("buckets", "Buckets"), ("crops", "Crop loss"), ("latents", "Latents"), ("outliers", "Outliers"))
    yield from (("duplicates", "Duplicates"), ("captions", "Captions"))
    if summary["sets"]:
        yield "sets", "Sets"
    yield from (("skipped", "Skipped"), ("recipe", "Recipe"), ("gallery", "Gallery"))


def list_channels(channels: Channels) -> Iterator[tuple[float, float, float | None, bool]]:
    """Of each channel mean, std, posterior std, and whether it is far from a unit normal."""
    far = set(list_unusual(channels))
    for n, (mean, std) in enumerate(zip(channels.mean.tolist(), channels.std.tolist(), strict=True)):
        yield mean, std, float(channels.noise[n]) if channels.noise is not None else None, n in far


def histogram_of(channels: Channels) -> Histogram:
    step = 2 * LIMIT / NUM_BINS
    labels = [f"{n * step - LIMIT:.2f} to {(n + 1) * step - LIMIT:.2f}" for n in range(NUM_BINS)]
    return Histogram(channels.counts.tolist(), labels, f"-{LIMIT:g}", f"{LIMIT:g}")


def normal_line(channels: Channels) -> str:
    """The unit normal over the histogram, as the path of an SVG that is 10 wide for each bar and 100 high."""
    step, most = 2 * LIMIT / NUM_BINS, max(1, int(channels.counts.max()))
    total = int(channels.counts.sum()) + channels.num_beyond
    points = []
    for n in range(NUM_BINS + 1):
        height = total * step * exp(-((n * step - LIMIT) ** 2) / 2) / sqrt(2 * pi)
        points.append(f"{10 * n} {max(-50.0, 100 - 100 * height / most):.2f}")
    return "M" + "L".join(points)


def list_text_facts(text: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    empty = f", {text['empty_captions']:,} empty" if text["empty_captions"] else ""
    yield "captions", f"{text['captions']:,}{empty}"
    yield "prompts", f"{text['distinct_prompts']:,} different ones"
    if text["tokens"] is not None:
        tokens = text["tokens"]
        yield "tokens", f"{tokens['min']} to {tokens['max']}, median {tokens['median']}, of {text['max_tokens']}"
        yield "cut", counted(text["truncated_prompts"], "prompt") if text["truncated_prompts"] else "none"
    for long in text["longest_truncated"]:
        yield f"{long['tokens']:,} tokens", cut_end(long["prompt"], MOST_VALUE)
    shapes = ", ".join(f"{name} {show_shape(shape)}" for name, shape in text["cond"].items())
    yield "cond", f"{shapes}, stored as {text['cond_dtype']}" if shapes else "none"


def list_skips(report: Report, skipped: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    for count, examples in report.skips:
        reason = examples[0].reason
        yield {
            "reason": reason[:MOST_VALUE],
            "says": REASONS[reason][1] if reason in REASONS else "",
            "count": count,
            "examples": [
                {
                    "key": skip.key[-MOST_VALUE:],
                    "detail": cut_end(skip.detail, MOST_VALUE),
                    "jpeg": base64.b64encode(skipped.get(skip.key, b"")).decode(),
                }
                for skip in examples
            ],
        }


def tell_gallery(report: Report) -> str:
    total, shown = report.summary["images"], len(report.cards)
    if shown == total:
        return f"All {counted(total, 'image')}."
    named = f", and {shown - report.num:,} that are named above" if shown > report.num else ""
    return f"{report.num:,} of {total:,} images, chosen at random (seed {report.seed}){named}."


def flatten(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of each leaf of JSON values."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flatten(inner, f"{at}.{name}" if at else str(name))
    else:
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield at, cut_end(shown, MOST_VALUE)


def cut_end(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."
