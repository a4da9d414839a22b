"""What a plan takes on disk, and how long its prompts are, in words for a person: part of the --dry-run page."""

from latentprep.human import counted, human_bytes, printable, shortened
from latentprep.prepare.models.family import FIXED
from latentprep.prepare.models.text_folder import TextFiles
from latentprep.prepare.plan.tokens import Lengths, TextSizes
from latentprep.prepare.survey import Prepared


def disk_lines(prepared: Prepared, sizes: TextSizes) -> list[str]:
    """The bytes of latents and text, in all and for each image."""
    plan, row_bytes = prepared.plan, prepared.row_bytes
    latents = sum(row_bytes.latents(placement.bucket, placement.controls) for _, placement in plan.rows())
    num_texts = plan.num_unit_items + plan.num_text_items
    if not num_texts:
        return []
    up_to = "up to " if sizes.is_bound else "about "
    each = [f"{human_bytes(latents // plan.num_unit_items)} of latents"] if plan.num_unit_items else []
    each.append(f"{up_to if sizes.is_bound else ''}{human_bytes(sizes.text // num_texts)} of text")
    return [
        f"disk: about {human_bytes(latents)} of latents, {up_to}{human_bytes(sizes.text)} of text, "
        f"{counted(len(plan.units), 'new shard')}",
        f"      for each image {' and '.join(each)}",
    ]


def token_lines(prepared: Prepared, lengths: Lengths | None, sizes: TextSizes) -> list[str]:
    """The longest prompt, how many are cut, and what another --max-tokens would save and change."""
    text = prepared.models.text
    if text is None or not (prepared.plan.units or prepared.plan.text_tasks):
        return []
    if lengths is None or not isinstance(text, TextFiles):
        return ["tokens: not counted, since this text encoder shows no tokenizer"]
    family = text.family
    if family.num_images:
        return [
            f"tokens: {lengths.longest:,} in the longest prompt, with those of its images; none is cut "
            f"({printable(lengths.key)}: {shortened(lengths.prompt)!r})"
        ]
    some = "" if lengths.num_counted == lengths.num_prompts else f", of the {lengths.num_counted:,} longest prompts"
    lines = [
        f"tokens: {lengths.longest:,} in the longest prompt{some}; {lengths.max_tokens:,} are kept "
        f"({printable(lengths.key)}: {shortened(lengths.prompt)!r})"
    ]
    if lengths.num_cut:
        more = text.more_tokens(lengths.max_tokens)
        hint = f" (--max-tokens {more} keeps more)" if more else ""
        lines.append(f"        {counted(lengths.num_cut, 'prompt')} will be cut{hint}")
    if family.length != FIXED:
        saves = ": a smaller --max-tokens saves nothing" if family.tokens_argument is not None else ""
        lines.append(f"        {family.name} stores each prompt at its own length{saves}")
    elif family.sequence is not None:
        kept = family.num_tokens(prepared.options.text.max_tokens, text.window)
        lines.append(f"        {family.name} stores {kept:,} tokens of each prompt, padding too")
    if family.length == FIXED and sizes.advised is not None:
        lines += [
            f"        --max-tokens {sizes.advised} cuts none, and stores {human_bytes(sizes.with_advised)} of text. "
            "But padding counts:",
            f"        to see the same, inference needs max_sequence_length={sizes.advised} too",
        ]
    return lines
