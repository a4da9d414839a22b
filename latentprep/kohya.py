"""A dataset.toml of kohya's sd-scripts -> sets of ours. What has no equivalent is said.

The rules are those of its library/config_util.py and library/train_util.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.sets import check_names, is_number

FILTERS = {
    "lanczos": "lanczos", "lanczos4": "lanczos", "bicubic": "bicubic", "cubic": "bicubic", "bilinear": "bilinear",
    "linear": "bilinear", "nearest": "nearest", "area": "box", "box": "box",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One entry of [[datasets]]: arguments of encode."""

    name: str  # of its folder, if there are several
    options: Mapping[str, Any]
    sets: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


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


# key -> what it takes, and that in words. A subset may take these from its dataset, and from [general]
FLAG, WHOLE, NUMBER, TEXT = (
    (is_bool, "true or false"),
    (is_int, "a whole number"),
    (is_number, "a number"),
    (is_text, "a text"),
)
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
    "debug_dataset": "has no equivalent; --dry-run shows what would be done",
    "conditioning_data_dir": "has no equivalent: control images are not stored",
}
# values of those that change nothing
IDLE = {"network_multiplier": (1,), "caption_separator": (",",), "token_warmup_min": (1,), "batch_size": ()}


def is_kohya(table: Mapping[str, Any]) -> bool:
    """Whether a TOML file is one of sd-scripts."""
    return "datasets" in table or "general" in table


def read_dataset_config(path: Path, table: Mapping[str, Any]) -> list[Run]:
    """The runs that a dataset.toml asks for, one for each of its [[datasets]]. Raises UserError."""
    try:
        check_names(table, ["general", "datasets"])
        general, datasets = table.get("general", {}), table.get("datasets", [])
        if not isinstance(general, dict) or not is_tables(datasets):
            raise UserError("expected a table [general], and [[datasets]] with [[datasets.subsets]].")
        runs = [read_dataset(path, n, dataset, general) for n, dataset in enumerate(datasets, 1)]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return [Run(name, run.options, run.sets, run.notes) for name, run in zip(unlike(runs), runs, strict=True)]


def is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


def unlike(runs: Sequence[Run]) -> list[str]:
    """The names of runs, each once."""
    names: list[str] = []
    for run in runs:
        count = sum(name == run.name or name.startswith(f"{run.name}-") for name in names)
        names.append(f"{run.name}-{count + 1}" if count else run.name)
    return names


def read_dataset(path: Path, number: int, dataset: Mapping[str, Any], general: Mapping[str, Any]) -> Run:
    """One of [[datasets]]. Raises UserError."""
    where = f"[[datasets]] {number}"
    every = {**OF_DATASET, **OF_SUBSET}
    check_table("[general]", general, every)
    check_table(where, dataset, {**every, "subsets": (is_tables, "[[datasets.subsets]]")})
    merged = {**general, **dataset}
    subsets = merged.pop("subsets", None)
    if subsets is None:
        raise UserError(f"{where}: has no [[datasets.subsets]].")
    for n, subset in enumerate(subsets, 1):
        check_table(f"{where}, subset {n}", subset, {**OF_SUBSET, **OF_SUBSET_ALONE})
    notes = list_notes([("", merged), *((f"subset {n}", subset) for n, subset in enumerate(subsets, 1))])
    chosen, more = choose_subsets([{**merged, **subset} for subset in subsets])
    if not chosen:
        raise UserError(f"{where}: none of its subsets has a num_repeats of at least 1.")
    size = merged.get("resolution")
    if size is None:
        raise UserError(f"{where}: resolution: is missing. Give resolution = 512, or [width, height].")
    width, height = (size, size) if isinstance(size, int) else size
    options = {**bucket_options(where, merged, width, height), **common_options(where, chosen)}
    sets = name_sets([make_set(path, subset) for subset in chosen])
    return Run(f"{width}x{height}", options, sets, tuple(notes + more + say_choices(chosen)))


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
                lines.append(f"{said}: {words.format(value=shortened(str(value), 40))}")
    return lines


def choose_subsets(subsets: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The subsets that count, and a line for each other: as sd-scripts leaves them out."""
    chosen: dict[str, Mapping[str, Any]] = {}
    notes = []
    for subset in subsets:
        folder = subset.get("image_dir")
        if folder is None:
            raise UserError("a subset has no image_dir. Give the folder of its images.")
        if subset.get("num_repeats", 1) < 1:
            notes.append(f"{folder}: left out, its num_repeats is less than 1")
        elif (place := subset.get("metadata_file", folder)) in chosen:
            notes.append(f"{place}: left out, an earlier subset has it too")
        else:
            chosen[place] = subset
    return list(chosen.values()), notes


def bucket_options(where: str, dataset: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    """How images become buckets."""
    if not dataset.get("enable_bucket", False):
        return {"width": width, "height": height}
    step = dataset.get("bucket_reso_steps", 64)
    if step < 1:
        raise UserError(f"{where}: bucket_reso_steps = {step}: expected at least 1.")
    options = {"resolution": width if width == height else f"{width}x{height}", "bucket_step": step}
    if dataset.get("bucket_no_upscale", False):  # sd-scripts looks at no limits then
        return {**options, "no_upscale": True}
    low, high = dataset.get("min_bucket_reso", 256), dataset.get("max_bucket_reso", 1024)
    low, high = low - low % step, -(-high // step) * step
    if not 0 < low <= min(width, height) or high < max(width, height):
        raise UserError(
            f"{where}: min_bucket_reso {low} and max_bucket_reso {high}: expected the one at most, the other at least "
            f"the resolution of {width}x{height}."
        )
    return {**options, "min_side": low, "max_side": high, "max_aspect": float(high) / low}


def common_options(where: str, subsets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all subsets of a cache have alike."""
    options: dict[str, Any] = {
        "flip": any(subset.get("flip_aug") for subset in subsets),
        "weights": "alpha" if any(subset.get("alpha_mask") for subset in subsets) else "none",
    }
    if any(subset.get("random_crop") for subset in subsets):
        options["crop"] = "random"
    names = {subset.get("resize_interpolation") for subset in subsets}
    if len(names) > 1:
        raise UserError(f"{where}: resize_interpolation differs between its subsets, and a cache has one. Part them.")
    if (name := names.pop()) is not None:
        if name not in FILTERS:
            raise UserError(f"{where}: resize_interpolation = {shortened(name)}: expected one of {', '.join(FILTERS)}.")
        options["filter"] = FILTERS[name]
    return options


def make_set(path: Path, subset: Mapping[str, Any]) -> dict[str, Any]:
    """One subset as a set of ours."""
    get = subset.get
    own: dict[str, Any] = {
        "source": str(find_folder(path, subset["image_dir"])),
        "exclude": ["*/*"],  # sd-scripts looks into no folder below it
        "repeats": "auto" if get("is_reg") else get("num_repeats", 1),
        "caption_from": "file",
        "caption_extension": get("caption_extension", ".caption"),
        "caption_lines": get("enable_wildcard", False),
        "first_line": not get("enable_wildcard", False),
        "wildcards": get("enable_wildcard", False),
        "caption_prefix": get("caption_prefix", ""),
        "caption_suffix": get("caption_suffix", ""),
        "default_caption": get("class_tokens", ""),
        "shuffle_tags": get("shuffle_caption", False),
        "tag_drop_out": float(get("caption_tag_dropout_rate", 0)),
        "caption_dropout": float(get("caption_dropout_rate", 0)),
        "flip": get("flip_aug", False),
    }
    if "metadata_file" in subset:
        own |= {"captions_file": str(find_folder(path, subset["metadata_file"])), "exclude": []}
    if own["shuffle_tags"] or own["tag_drop_out"]:
        own["keep_tags"] = get("keep_tokens", 0)
    return own


def find_folder(path: Path, folder: str) -> Path:
    """A folder or file: sd-scripts has it from the folder that it is started in; else it may lie beside the TOML."""
    given = Path(folder).expanduser()
    return given if given.exists() or not (path.parent / given).exists() else path.parent / given


def name_sets(sets: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The sets with the names of their folders; of equal ones those above stand before it."""
    names = [Path(own["source"]).absolute().name for own in sets]
    for number, own in enumerate(sets):
        above = Path(own["source"]).absolute().parent.name
        own["name"] = f"{above}-{names[number]}" if names.count(names[number]) > 1 else names[number]
    return tuple(sets)


def say_choices(subsets: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is done otherwise, or by the reader."""
    lines = []
    if any(subset.get("is_reg") for subset in subsets):
        lines.append(
            "is_reg: its images are repeated until there are about as many as others. Their loss counts in full, as "
            "with --prior_loss_weight 1; a sets file gives another sample_weight"
        )
    if any(subset.get("flip_aug") for subset in subsets):
        lines.append("flip_aug: mirrored views are stored; the reader takes them with LatentDataset(flip_p=0.5)")
    if any(subset.get("shuffle_caption") or subset.get("enable_wildcard") for subset in subsets):
        lines.append(
            "shuffle_caption, enable_wildcard: an image keeps its prompt in all epochs; --prompts-per-image 4 stores "
            "four of each"
        )
    if any(subset.get("random_crop") for subset in subsets):
        lines.append("random_crop: each image is cropped once, at random; --crops 4 stores four crops of each")
    with_mask = [subset for subset in subsets if subset.get("alpha_mask")]
    if 0 < len(with_mask) < len(subsets):
        lines.append("alpha_mask: is true for some subsets; transparency weighs in all of them")
    return lines
