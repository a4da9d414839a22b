"""Subsets of sd-scripts -> sets of ours."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.human import expand_user, printable
from latentprep.kohya.folders import has_images
from latentprep.sets import exists, has_controls


def choose_subsets(path: Path, subsets: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The subsets that count, their folders found; and a line for each that sd-scripts leaves out. Raises UserError."""
    chosen: dict[Path, Mapping[str, Any]] = {}
    notes = []
    for number, subset in enumerate(subsets, 1):
        if "image_dir" not in subset:
            of_file = ", in which the images of its metadata_file are" if "metadata_file" in subset else ""
            raise UserError(f"subset {number}: has no image_dir. Give the folder{of_file}.")
        said = printable(subset["image_dir"])
        if subset.get("num_repeats", 1) < 1:
            notes.append(f"{said}: left out, its num_repeats is less than 1")
            continue
        folder = find_place(path, subset["image_dir"], f"subset {number}: image_dir")
        table = subset.get("metadata_file")
        place = folder if table is None else find_place(path, table, f"subset {number}: metadata_file")
        if folder.is_dir() and not has_images(folder):
            notes.append(f"{said}: left out, no images are in it")
        elif place.resolve() in chosen:
            notes.append(f"{said}: left out, an earlier subset has it too")
        else:
            found = {"image_dir": folder} if table is None else {"image_dir": folder, "metadata_file": place}
            chosen[place.resolve()] = {**subset, **found}
            if table is None and folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder)):
                notes.append(f"{said}: folders below it are left out, since sd-scripts does not look into them")
    return list(chosen.values()), notes


def find_place(path: Path, given: str, what: str) -> Path:
    """A folder or file that a dataset.toml names: beside it, or else in the folder that we are started in.

    The latter is where sd-scripts looks. Raises UserError.
    """
    if has_controls(given):
        raise UserError(
            f"{what} = {given!r:.80}: has an escape in it. In TOML write \\ as / or put single quotes around it."
        )
    places = [path.parent / expand_user(given), expand_user(given)]
    found = next((place for place in places if exists(place)), None)
    if found is None:
        looked = " and ".join(dict.fromkeys(str(place.absolute().parent) for place in places))
        raise UserError(f"{what} = {given!r:.200}: is not there. Looked in {looked}.")
    return found


def is_beside(path: Path, subset: Mapping[str, Any]) -> bool:
    """Whether a subset is where the file says, whatever folder we are started in."""
    return all(
        Path(subset[name]).is_absolute() or path.parent in Path(subset[name]).parents
        for name in ("image_dir", "metadata_file")
        if name in subset
    )


# key of a subset -> that of a set, if they mean the same
SAME = {
    "caption_extension": "caption_extension", "caption_prefix": "caption_prefix", "caption_suffix": "caption_suffix",
    "class_tokens": "default_caption", "shuffle_caption": "shuffle_tags", "caption_tag_dropout_rate": "tag_drop_out",
    "caption_dropout_rate": "caption_dropout", "enable_wildcard": "wildcards",
}  # fmt: skip


def make_set(subset: Mapping[str, Any]) -> dict[str, Any]:
    """One subset as a set of ours. If it says nothing of captions, what is typed counts."""
    own: dict[str, Any] = {ours: subset[name] for name, ours in SAME.items() if name in subset}
    own |= {
        "source": str(subset["image_dir"]),
        "repeats": "auto" if subset.get("is_reg") else subset.get("num_repeats", 1),
        "first_line": not subset.get("enable_wildcard", False),
        "flip": subset.get("flip_aug", False),
    }
    if subset.get("enable_wildcard"):
        own["caption_lines"] = True
    if "metadata_file" in subset:
        own["captions_file"] = str(subset["metadata_file"])
    else:
        own["exclude"] = ["*/*"]  # folders below it
    if own.get("shuffle_tags") or own.get("tag_drop_out"):
        own["keep_tags"] = subset.get("keep_tokens", 0)
    return own


def without_flips(sets: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The sets, which say nothing of flips if none of them has any: --flip may be typed."""
    if any(own["flip"] for own in sets):
        return sets
    return [{name: value for name, value in own.items() if name != "flip"} for own in sets]


def name_sets(sets: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The sets with the names of their folders; with those above before it, as far as it takes to tell them apart."""
    parts = [Path(own["source"]).absolute().parts[1:] for own in sets]
    for number, own in enumerate(sets):
        for depth in range(1, 5):
            own["name"] = "-".join(parts[number][-depth:])
            if sum(own["name"] == "-".join(other[-depth:]) for other in parts) == 1:
                break
        else:
            own["name"] = f"{parts[number][-1]}-{number + 1}"
    return tuple(without_flips(sets))


# keys -> what is done otherwise, or by the reader, if a subset has one of them
CHOICES = {
    "is_reg": (
        "its images are repeated until there are about as many as others. Their loss counts in full, as with "
        "--prior_loss_weight 1; a file of sets can give another sample_weight"
    ),
    "flip_aug": "mirrored views are stored; the reader takes them with LatentDataset(flip_p=0.5)",
    "shuffle_caption": "an image keeps its order of tags in all epochs; --prompts-per-image 4 stores four of them",
    "enable_wildcard": "an image keeps its prompt in all epochs; --prompts-per-image 4 stores four of them",
    "random_crop": "each image is cropped once, at random; --crops 4 stores four crops of each",
}


def say_choices(subsets: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each key that is done otherwise here."""
    lines = [f"{name}: {words}" for name, words in CHOICES.items() if any(subset.get(name) for subset in subsets)]
    with_mask = [subset for subset in subsets if subset.get("alpha_mask")]
    if 0 < len(with_mask) < len(subsets):
        lines.append("alpha_mask: is true for some subsets; transparency weighs in all of them")
    return lines
