"""The fields of a shard's files: ONE table, from which writer, checks, compact and reader are made.

Add a field here, and give its value in the rows: then it is written, checked, kept by compact, and read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta

from latentprep.errors import UserError
from latentprep.records import MAX_CONTROLS

FORMAT = 2
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = frozenset(TORCH_DTYPES.values())  # of latents: --store-dtype
COND_DTYPES = {**TORCH_DTYPES, "int8": torch.int8}  # --cond-dtype
COND_STORED = frozenset(COND_DTYPES.values())
STRINGS = "strings"  # a text per row, as cache/strings.py stores them
LISTS = "lists"  # one or more texts per row
SIZES = {"2": 2, "4": 4, "D": 16}  # letters of a shape with a fixed size; the file decides the size of the others

Count = Annotated[int, Meta(ge=1, le=2**40)]
# [C,h,w] of a latent; and behind it [h,w] of each control image, if any of them has another size than the latent
Shape = Annotated[tuple[Count, ...], Meta(min_length=3, max_length=3 + 2 * MAX_CONTROLS)]
Groups = tuple[tuple[str, Count, Shape], ...]  # label, rows, shape


@dataclass(frozen=True, slots=True)
class Field:
    """One field: what a file holds for every row of a group, or once for the group.

    shape: a letter for each dimension; the same letter is the same number in all fields of a group. N: rows (images),
    V: views of each, C, h, w: a latent, K: prompts of an image. A field without N is the same for all rows.
    """

    name: str
    kind: str | frozenset[torch.dtype]  # STRINGS, LISTS, or the number types that it may have
    shape: str = "N"
    is_optional: bool = False
    fill: float | None = None  # the value for rows without this field, if other rows of the group have it; None: 0

    @property
    def is_per_row(self) -> bool:
        return self.shape.startswith("N")

    @property
    def is_per_view(self) -> bool:
        return self.shape.startswith("NV")


CONTROLS = tuple(f"control_{k}" for k in range(1, MAX_CONTROLS + 1))  # in the order of --control
CONTROL_SIZES = ("ab", "de", "fg", "ij")  # letters of their shapes: height and width
INT32, INT64, UINT8 = frozenset({torch.int32}), frozenset({torch.int64}), frozenset({torch.uint8})
KEY = (
    Field("key", STRINGS),  # path of the image in its source
    Field("nbytes", INT64),  # of the image, its mask and its control images
    Field("version", INT64),  # what says cheaply that they may have changed
)
LATENTS = (
    Field("latent_mean", STORED, "NVChw"),  # unscaled
    Field("latent_std", STORED, "NVChw", is_optional=True),  # none with --store mean
    # means of control images; unscaled. Each may have a size of its own
    *(Field(name, STORED, f"NVC{size}", is_optional=True) for name, size in zip(CONTROLS, CONTROL_SIZES, strict=True)),
    Field("weight", frozenset({torch.float16}), "NVhw", is_optional=True, fill=1.0),  # 0..1; none: all weigh 1
    Field("original_size", INT32, "N2"),  # height, width after orientation
    Field("resized_size", INT32, "NV2"),
    Field("crop", INT32, "NV4"),  # top, left, height, width in the resized image
    Field("flipped", UINT8, "V"),  # 1 where the view is mirrored
    Field("digest", UINT8, "ND"),  # content hash of the image, its mask and its control images
    *KEY,  # as they were when it was encoded
)
TEXT = (
    *KEY,  # as they are now
    Field("caption", LISTS),
    Field("prompt_of", INT32, "NK"),  # its prompts, by their numbers in the file
    Field("uncond_of", INT32, is_optional=True),  # likewise the empty prompt, if its cond depends on the image
)


def num_values(shape: Sequence[int]) -> int:
    """Numbers of one image: of its latent, and of its control images if they have sizes of their own."""
    sizes = zip(shape[1::2], shape[2::2], strict=True)
    return shape[0] * sum(height * width for height, width in sizes)


TABLES = {"latents": LATENTS, "partial": LATENTS, "text": TEXT}  # kind of a file -> fields of its groups


def check_format(found: object, where: str) -> None:
    """Raise UserError unless this version of latentprep reads the format."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{where}: no format number, so not a latentprep cache.")
    if found > FORMAT:
        raise UserError(f"{where}: format {found}, this latentprep reads up to format {FORMAT}. Upgrade latentprep.")
    if found < FORMAT:
        raise UserError(f"{where}: format {found}, of an older latentprep. Encode the images again into another --out.")
