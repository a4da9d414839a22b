"""The summary of a cache as tables for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table

from latentprep.cache.ragged import show_shape
from latentprep.human import counted, human_bytes, printable, shortened
from latentprep.records import NOTES

MANY_SETS = 100  # are shown


def render_summary(summary: dict[str, Any]) -> Group:
    """Everything that summarize() found, a table for each part."""
    parts = [facts_table(summary)]
    if summary["notes"]:
        parts.append(notes_table(summary))
    if summary["sets"]:
        parts.append(sets_table(summary["sets"]))
    parts.append(buckets_table(summary))
    if summary["cropped"]["images"]:
        parts.append(cropped_table(summary))
    if summary["duplicates"]["groups"]:
        parts.append(duplicates_table(summary["duplicates"]))
    parts += [latents_table(summary), text_table(summary["text"])]
    if summary["skipped"]:
        parts.append(skips_table(summary))
    return Group(*parts)


def facts_table(summary: dict[str, Any]) -> Table:
    table = _table()
    for name, value in list_facts(summary):
        table.add_row(name, value)
    return table


def list_facts(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a cache is and what made it, each with its name."""
    made, recipe, latents = summary["made_with"], summary["recipe"]["latents"], summary["latents"]
    sizes, images, views = summary["bytes"], summary["images"], summary["views"]
    total = sum(sizes.values())
    yield "images", f"{images:,}" + (f" x {len(views)} views ({', '.join(views)})" if len(views) > 1 else "")
    if summary["control_images"]:
        yield "control images", f"{summary['control_images']} of each image"
    yield "shards", f"{summary['shards']:,}"
    parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in sizes.items())
    each = human_bytes((total - summary["dead_bytes"]) / max(1, images))
    yield "on disk", f"{human_bytes(total)} ({parts}), {each} an image"
    if summary["dead_rows"]:
        dead = human_bytes(summary["dead_bytes"])
        advice = ": latentprep compact" if summary["can_compact"] else ", too few to compact"
        yield "dead rows", f"{summary['dead_rows']:,} of changed or removed images, about {dead}{advice}"
    vae = f", VAE {_plain(made['vae'])}" if made.get("vae") else ""
    encoders = "".join(f", text encoder {_plain(name)}" for name in made["text_encoders"])
    yield "model", f"{_plain(made['model'])}{vae}{encoders}"
    yield "geometry", ", ".join(f"{name} {_plain(value)}" for name, value in recipe["geometry"].items())
    yield "pixels", ", ".join(f"{name} {_plain(value)}" for name, value in recipe["images"].items())
    tiles = f" in tiles of {_plain(recipe['tiling'])} pixels" if "tiling" in recipe else ""
    yield "precision", f"encoded in {recipe['dtype']}{tiles}, {recipe['store']} stored as {recipe['store_dtype']}"
    latent = summary["latent"]
    shift, scale = (", ".join(f"{n:g}" for n in latent["normalization"][name]) for name in ("shift", "scale"))
    yield "scaling", f"(latent - {shift}) * {scale}" if "," not in shift + scale else f"shift {shift}; scale {scale}"
    yield "weights", f"{counted(latents['rows_with_weight'], 'image')} with uneven weights{_read(summary)}"
    yield "made by", _plain(summary["recipe"]["libraries"])


def notes_table(summary: dict[str, Any]) -> Table:
    table = _table("Images, when they were encoded")
    for note, count in summary["notes"].items():
        table.add_row(f"{count:,}", NOTES[note])
    return table


def sets_table(sets: list[dict[str, Any]]) -> Table:
    table = _table("Sets", "name", "images", "repeats", "weight of the loss", "captions left out", "may be mirrored")
    for own in sets[:MANY_SETS]:
        table.add_row(
            printable(own["name"]), f"{own['images']:,}", f"{own['repeats']:,}", f"{own['sample_weight']:g}",
            f"{own['caption_dropout']:.0%}", "yes" if own["flip"] else "no",
        )  # fmt: skip
    if len(sets) > MANY_SETS:
        table.add_row(f"and {len(sets) - MANY_SETS:,} more")
    return table


def buckets_table(summary: dict[str, Any]) -> Table:
    table = _table("Buckets", "pixels", "images", "cropped away", "worst")
    for size, count in summary["buckets"].items():
        lost = summary["cropped"]["buckets"][size]
        table.add_row(size, f"{count:,}", f"{lost['mean']:.1%}", f"{lost['worst']:.1%}")
    return table


def cropped_table(summary: dict[str, Any]) -> Table:
    table = _table("Most cropped", "image", "cropped away")
    for image in summary["cropped"]["images"]:
        table.add_row(printable(image["key"]), f"{image['cropped_away']:.1%}")
    return table


def duplicates_table(duplicates: dict[str, Any]) -> Table:
    examples, groups = duplicates["examples"], duplicates["groups"]
    table = _table("Duplicates")
    table.add_row(f"{duplicates['images']:,} images in {counted(groups, 'group')} of equal content")
    for group in examples:
        left = group["images"] - len(group["keys"])
        table.add_row(", ".join(map(printable, group["keys"])) + (f" and {left:,} more" if left else ""))
    if groups > len(examples):
        table.add_row("...")
    return table


def row_line(row: dict[str, Any]) -> str:
    """An image as one line: key, bucket, its own size and its captions, with tabs between."""
    sizes = (f"{width}x{height}" for height, width in (row["bucket"], row["original_size"]))
    return "\t".join([printable(row["key"]), *sizes, " | ".join(map(printable, row["caption"]))])


def latents_table(summary: dict[str, Any]) -> Table:
    latents = summary["latents"]
    title = f"Latents per channel, unscaled{_read(summary)}"
    table = _table(title, "channel", "mean", "std", "posterior std")
    posterior = latents["posterior_std"] or [None] * len(latents["mean"])
    for n, (mean, std, spread) in enumerate(zip(latents["mean"], latents["std"], posterior, strict=True)):
        table.add_row(str(n), f"{mean:.4f}", f"{std:.4f}", "not stored" if spread is None else f"{spread:.4f}")
    return table


def text_table(text: dict[str, Any]) -> Table:
    table = _table("Text")
    empty = f", {text['empty_captions']:,} empty" if text["empty_captions"] else ""
    table.add_row("captions", f"{text['captions']:,}{empty}")
    example = f", such as {shortened(text['example_prompt'])}" if text["example_prompt"] else ""
    table.add_row("prompts", f"{text['distinct_prompts']:,}{example}")
    shapes = ", ".join(f"{name} {show_shape(shape)}" for name, shape in text["cond"].items())
    table.add_row("cond", f"{shapes}, stored as {text['cond_dtype']}" if shapes else "none")
    if text["tokens"] is not None:
        tokens, cut = text["tokens"], text["truncated_prompts"]
        table.add_row(
            "tokens", f"{tokens['min']} to {tokens['max']}, median {tokens['median']}, of {text['max_tokens']}"
        )
        table.add_row("cut", f"{counted(cut, 'prompt')}, the longest:" if cut else "none")
        for long in text["longest_truncated"]:
            table.add_row("", f"{long['tokens']:,} tokens: {shortened(long['prompt'], 48)!r}")
    return table


def skips_table(summary: dict[str, Any]) -> Table:
    table = _table("Skipped")
    for reason, count in summary["skipped"].items():
        table.add_row(reason, f"{count:,}")
    for example in summary["skipped_examples"]:
        table.add_row("", printable(example))
    return table


def render_sample(sample: dict[str, Any]) -> Table:
    """One sample as a table for a terminal."""
    table = _table()
    for name, value in sample.items():
        is_size = name in ("original_size", "resized_size")
        if name in ("caption", "prompt"):  # there may be several, with commas of their own
            shown = "\n".join(map(printable, value))
        else:
            shown = f"{value[1]}x{value[0]}" if is_size else show_crops(value) if name == "crop" else _plain(value)
        table.add_row(name.replace("_", " "), shown)
    return table


def show_crops(crops: list[list[int]]) -> str:
    """Boxes of the views, (top, left, height, width) each; a mirrored view has that of the plain one."""
    boxes = dict.fromkeys(map(tuple, crops))
    return "; ".join(f"{width}x{height} at left {left}, top {top}" for top, left, height, width in boxes)


def render_problems(found: dict[str, Any]) -> str:
    """The outcome of a verify: a line for each problem, and the verdict last."""
    problems = found["problems"]
    lines = [printable(f"{p['problem']:<10} {p['name']}: {p['detail']}") for p in problems]
    for name, what in (("largest_difference", ""), ("largest_cond_difference", "cond ")):
        if found.get(name) is not None:
            lines.append(f"{what}encoded again: at most {found[name]:.2g} standard deviations from what is stored")
    size = f"{counted(found['images'], 'image')} in {counted(found['shards'], 'shard')}, " if "images" in found else ""
    lines.append(f"{found['cache']}: {size}{counted(len(problems), 'problem') if problems else 'nothing wrong'}")
    return "\n".join(lines)


def _table(title: str | None = None, *columns: str) -> Table:
    """A table without lines: named facts, or with columns, of which all but the first are numbers."""
    heading = f"\n{title}" if title else None
    table = Table(
        title=heading, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=bool(columns)
    )
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left")
    return table


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ("; " if any(isinstance(inner, list) for inner in value) else ", ").join(map(_plain, value))
    return printable(str(value))


def _read(summary: dict[str, Any]) -> str:
    """Says so where not all rows were read for a statistic."""
    read, images = summary["latents"]["rows_read"], summary["images"]
    return f" ({read:,} of {images:,} images read)" if read < images else ""
