"""Group: rows of one bucket, one column for each field of the table. Made from rows, or from the tensors of a file."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from latentprep.cache import schema
from latentprep.cache.schema import CONTROLS, LISTS, SIZES, STRINGS, Field
from latentprep.cache.strings import StringLists, Strings, Tensors, put_strings
from latentprep.records import Box, Row, Size

Column = Any  # a tensor [N,...] (in a TextGroup a numpy array), or a sequence of N strings, or of N lists of strings


class Group:
    """Rows of one bucket. Each field of its table is an attribute; an optional one that is not there is None."""

    kind: ClassVar[str]  # of its file

    # of both tables
    key: Sequence[str]
    nbytes: Any  # [N] int64
    version: Any  # [N] int64

    def __init__(self, label: str, **columns: Column) -> None:
        self.label, self.columns = label, columns

    @classmethod
    def table(cls) -> tuple[Field, ...]:
        return schema.TABLES[cls.kind]

    def __getattr__(self, name: str) -> Column:
        if name.startswith("_") or name == "columns":  # asked for by copy and pickle, before there are any
            raise AttributeError(name)
        try:
            return self.columns[name]
        except KeyError:
            if any(field.name == name for field in self.table()):
                return None
            raise AttributeError(f"a group of {self.kind} has no {name!r}") from None

    def __len__(self) -> int:
        return len(self.key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label}, {len(self)} rows of {', '.join(self.columns)})"

    @classmethod
    def stack(cls, label: str, rows: list[dict[str, Any]]) -> Self:
        """The group of rows, field name -> value. The rows are empty afterwards: a shard is not in memory twice."""
        columns = {}
        for field in cls.table():
            values = [row.pop(field.name, None) for row in rows]
            if all(value is None for value in values):
                if not field.is_optional:
                    raise ValueError(f"{label}: no row has {field.name}")
                continue
            columns[field.name] = cls._native(_stack(field, values))
            del values
        return cls(label, **columns)

    def row(self, number: int) -> dict[str, Any]:
        """A copy of one row, field name -> value, as stack() takes it."""
        found = {}
        for field in self.table():
            column = self.columns.get(field.name)
            if column is not None:
                value = column[number] if field.is_per_row else column
                found[field.name] = value.clone() if isinstance(value, Tensor) else value
        return found

    def take(self, rows: np.ndarray) -> Self:
        """Some of the rows, by their numbers."""
        columns = {
            field.name: _take(field, self.columns[field.name], rows)
            for field in self.table()
            if self.columns.get(field.name) is not None
        }
        return type(self)(self.label, **columns)

    def having(self, **columns: Column) -> Self:
        """The same group with some other columns."""
        return type(self)(self.label, **{**self.columns, **columns})

    def put(self, tensors: Tensors) -> None:
        """Add the tensors of this group to those of a file: name -> tensor."""
        for field in self.table():
            column, name = self.columns.get(field.name), f"{self.label}/{field.name}"
            if column is None:
                continue
            if field.kind == STRINGS:
                put_strings(tensors, name, column)
            elif field.kind == LISTS:
                rows = np.cumsum([0, *(len(texts) for texts in column)])
                put_strings(tensors, name, [text for texts in column for text in texts])
                tensors[f"{name}_rows"] = torch.from_numpy(rows.astype(np.int64))
            else:
                is_array = isinstance(column, np.ndarray)
                tensors[name] = torch.from_numpy(np.ascontiguousarray(column)) if is_array else column.contiguous()

    @classmethod
    def take_from(cls, tensors: Tensors, label: str, num_rows: int) -> Self:
        """The group of a file's tensors, which are checked first. Raises KeyError, ValueError."""
        sizes = {**SIZES, "N": num_rows}
        columns = {}
        for field in cls.table():
            name = f"{label}/{field.name}"
            if field.is_optional and name not in tensors:
                continue
            columns[field.name] = cls._open(field, tensors, name, sizes)
        check_keys(columns["key"])
        return cls(label, **columns)

    @classmethod
    def _native(cls, column: Column) -> Column:
        """A column of tensors as this kind of group holds it."""
        return column

    @classmethod
    def _open(cls, field: Field, tensors: Tensors, name: str, sizes: dict[str, int]) -> Column:
        if isinstance(field.kind, frozenset):
            check_numbers(field, tensors[name], name, sizes)
            return cls._native(tensors[name])
        strings = Strings(tensors, name)
        column = strings if field.kind == STRINGS else StringLists(strings, f"{name}_rows", tensors[f"{name}_rows"])
        if len(column) != sizes["N"]:
            raise ValueError(f"{name} has {len(column)} rows, expected {sizes['N']}")
        return column


class LatentGroup(Group):
    """N images in V views each, as tensors. Tensors of an open file use the mapped memory of the file: no copy."""

    kind = "latents"
    latent_mean: Tensor  # [N,V,C,h,w] in the store dtype; unscaled
    latent_std: Tensor | None  # like latent_mean; None: the cache holds means only
    weight: Tensor | None  # [N,V,h,w] float16 in 0..1; None: all weights are 1
    original_size: Tensor  # [N,2] int32: height, width after orientation
    resized_size: Tensor  # [N,V,2] int32
    crop: Tensor  # [N,V,4] int32: top, left, height, width in the resized image
    flipped: Tensor  # [V] uint8: 1 where the view is mirrored
    digest: Tensor  # [N,16] uint8: content hash of the image, its mask and its control images

    @property
    def shape(self) -> tuple[int, ...]:
        """[C,h,w] of a latent; and behind it [h,w] of each control image, if any of them has another size."""
        own = tuple(self.latent_mean.shape[2:])
        sizes = [tuple(values.shape[-2:]) for values in self.controls.values()]
        return own if set(sizes) <= {own[1:]} else (*own, *(side for size in sizes for side in size))

    def geometry(self, row: int, view: int) -> tuple[Size, Size, Box]:
        """The size of a row's image, its size when it was cropped, and the crop of a view."""
        height, width = self.original_size[row].tolist()
        resized_height, resized_width = self.resized_size[row, view].tolist()
        top, left, box_height, box_width = self.crop[row, view].tolist()
        return (height, width), (resized_height, resized_width), (top, left, box_height, box_width)

    @property
    def controls(self) -> dict[str, Tensor]:
        """Means of the control images, like latent_mean: control_1, control_2, ..."""
        return {name: self.columns[name] for name in CONTROLS if self.columns.get(name) is not None}


class TextGroup(Group):
    """The same rows as the LatentGroup of this label; numbers are arrays, which a reader indexes faster."""

    kind = "text"
    caption: Sequence[list[str]]  # one or more per row
    prompt_of: np.ndarray  # [N,K] int32: row -> its K prompts
    uncond_of: np.ndarray | None  # [N] int32: row -> its empty prompt; None: one is the same for all rows

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """[n,K] int32: the prompts of some rows, with the empty one of each if there is one."""
        own = self.prompt_of[rows]
        return own if self.uncond_of is None else np.concatenate([own, self.uncond_of[rows, None]], axis=1)

    @classmethod
    def _native(cls, column: Column) -> Column:
        return column.numpy() if isinstance(column, Tensor) else column


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """A Row for each image of all groups, in order. Groups of a latents file give rows without captions."""
    found = []
    for group in groups:
        captions = group.caption if isinstance(group, TextGroup) else ((),) * len(group)
        columns = (group.key, group.nbytes.tolist(), group.version.tolist(), captions)
        found += [Row(key, nbytes, version, tuple(own)) for key, nbytes, version, own in zip(*columns, strict=True)]
    return found


def _stack(field: Field, values: list[Any]) -> Column:
    """A field of all rows; what a row lacks is filled."""
    if not isinstance(field.kind, frozenset):
        return values
    if not field.is_per_row:
        return _as_tensor(field, values[0])
    if any(value is None for value in values):
        there = next(_as_tensor(field, value) for value in values if value is not None)
        filling = torch.full_like(there, 0 if field.fill is None else field.fill)
        values = [filling if value is None else value for value in values]
    if not isinstance(values[0], Tensor) and len(field.kind) == 1:
        return torch.from_numpy(np.asarray(values)).to(next(iter(field.kind)))
    return torch.stack([_as_tensor(field, value) for value in values])


def _as_tensor(field: Field, value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
    assert isinstance(field.kind, frozenset)
    return tensor if tensor.dtype in field.kind else tensor.to(next(iter(field.kind)))


def _take(field: Field, column: Column, rows: np.ndarray) -> Column:
    if not field.is_per_row:
        return column
    if isinstance(column, Tensor):
        return column[torch.from_numpy(rows)]
    return column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows.tolist()]


def check_numbers(field: Field, tensor: Tensor, name: str, sizes: dict[str, int]) -> None:
    """Raise ValueError unless a tensor has its field's dtype, and a shape that agrees with the other fields'."""
    found = list(tensor.shape)
    wanted = [sizes.setdefault(letter, size) for letter, size in zip(field.shape, found, strict=False)]
    if tensor.dtype not in field.kind or len(found) != len(field.shape) or found != wanted or 0 in found:
        raise ValueError(f"{name} is {tensor.dtype} {found}, expected [{','.join(field.shape)}]")


def check_keys(keys: Strings) -> None:
    """Raise ValueError if a key is no path inside the source: absolute, with .. or a zero byte in it, or empty."""
    data, starts = keys.data.tobytes(), keys.offsets[:-1]
    if len(starts) and (starts == keys.offsets[1:]).any():
        raise ValueError("a key is empty")
    if b".." not in data and b"\0" not in data and not (keys.data[starts] == ord("/")).any():
        return  # the usual case, without decoding a string
    for key in keys:
        path = PurePosixPath(key)
        if path.is_absolute() or ".." in path.parts or "\0" in key:
            raise ValueError(f"key {key!r} leads outside the image folder")
