"""The keys of a dataset.toml of sd-scripts: what they take, and which of them have no equivalent here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.sets import check_names, is_number

Check = Callable[[Any], bool]


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_int(value: Any) -> bool:
    return is_number(value, int)


def is_size(value: Any) -> bool:
    return is_int(value) or (isinstance(value, list) and len(value) == 2 and all(map(is_int, value)))


def is_anything(_: Any) -> bool:
    return True


# a check, and in words what it lets through
FLAG, WHOLE, NUMBER, TEXT = (
    (is_bool, "true or false"),
    (is_int, "a whole number"),
    (is_number, "a number"),
    (is_text, "a text"),
)
# key -> what it takes. A subset may take these from its dataset, and from [general]
OF_SUBSET: dict[str, tuple[Check, str]] = {
    "num_repeats": WHOLE, "caption_extension": TEXT, "class_tokens": TEXT, "caption_prefix": TEXT,
    "caption_suffix": TEXT, "shuffle_caption": FLAG, "keep_tokens": WHOLE, "caption_tag_dropout_rate": NUMBER,
    "caption_dropout_rate": NUMBER, "enable_wildcard": FLAG, "flip_aug": FLAG, "random_crop": FLAG,
    "resize_interpolation": TEXT,
}  # fmt: skip
OF_SUBSET_ALONE: dict[str, tuple[Check, str]] = {
    "image_dir": TEXT, "is_reg": FLAG, "alpha_mask": FLAG, "metadata_file": TEXT,
}  # fmt: skip
OF_DATASET: dict[str, tuple[Check, str]] = {
    "resolution": (is_size, "a number of pixels, or [width, height]"), "enable_bucket": FLAG, "min_bucket_reso": WHOLE,
    "max_bucket_reso": WHOLE, "bucket_reso_steps": WHOLE, "bucket_no_upscale": FLAG,
}  # fmt: skip
# keys that nothing here does: what to do instead, or why there is nothing to do
NO_EQUIVALENT = {
    "batch_size": "is the loader's: LatentLoader(data, batch_size={value})",
    "validation_split": "is the reader's: train, val = data.split({value})",
    "validation_seed": "is the reader's: data.split(..., seed={value})",
    "network_multiplier": "is the trainer's",
    "color_aug": "has no equivalent: colours are encoded as they are",
    "face_crop_aug_range": "has no equivalent; --crop focus keeps where there is most to see",
    "caption_separator": "has no equivalent: tags are parted by commas",
    "keep_tokens_separator": "has no equivalent: keep_tokens counts tags",
    "secondary_separator": "has no equivalent: it stays in the prompt",
    "caption_dropout_every_n_epochs": "has no equivalent: caption_dropout_rate leaves captions out at random",
    "token_warmup_min": "has no equivalent: prompts are encoded once, and whole",
    "token_warmup_step": "has no equivalent: prompts are encoded once, and whole",
    "custom_attributes": "has no equivalent",
    "cache_info": "is not needed: sizes and captions are in the cache",
    "skip_image_resolution": "has no equivalent: --min-side leaves out small images",
    "debug_dataset": "has no equivalent; --dry-run shows what would be done",
    "conditioning_data_dir": "is not read: control images are --control DIR, or control of a set",
}
# values of those that change nothing
IDLE = {"network_multiplier": (1,), "caption_separator": (",",), "token_warmup_min": (1,)}


def check_table(where: str, table: Mapping[str, Any], known: Mapping[str, tuple[Check, str]]) -> None:
    """Raise UserError for keys that sd-scripts does not have, and for values of another type."""
    try:
        check_names(table, [*known, *NO_EQUIVALENT])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for name, value in table.items():
        is_good, expected = known.get(name, (is_anything, ""))
        if not is_good(value):
            raise UserError(f"{where}: {name} = {shortened(repr(value), 60)}: expected {expected}.")


def list_notes(tables: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A line for each key that nothing here does, and each place where it stands."""
    lines = []
    for where, table in tables:
        for name, words in NO_EQUIVALENT.items():
            value = table.get(name)
            if value and value not in IDLE.get(name, ()):
                said = f"{name} = {shortened(str(value), 40)}" + (f" ({where})" if where else "")
                lines.append(f"{said} {words.format(value=shortened(str(value), 40))}")
    return lines
