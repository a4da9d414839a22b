"""Shapes and names in one line, for the reprs of the reader's classes. Nothing is opened or computed for them."""

from collections.abc import Iterable, Sequence

from torch import Tensor, dtype

from latentprep.human import printable


def show_shape(shape: Iterable[int | None]) -> str:
    """[4,77,768]; a length that differs from prompt to prompt is T."""
    return f"[{','.join('T' if size is None else str(size) for size in shape)}]"


def show_bucket(shape: Sequence[int]) -> str:
    """[4,64,64]; and + [64,96] for each control image, if they have sizes of their own."""
    controls = zip(shape[3::2], shape[4::2], strict=True)
    return "+".join([show_shape(shape[:3]), *map(show_shape, controls)])


def show_dtype(value: dtype) -> str:
    return str(value).removeprefix("torch.")


def show_tensors(tensors: dict[str, Tensor]) -> str:
    """prompt_embeds [4,77,768], pooled_prompt_embeds [4,1280]."""
    return ", ".join(f"{printable(name)} {show_shape(value.shape)}" for name, value in tensors.items())


def show_cond(rows: dict[str, tuple[dtype, tuple[int | None, ...]]]) -> str:
    """prompt_embeds [T,768] float16, pooled [768] float16: names, shapes and dtypes of one prompt's cond."""
    return ", ".join(
        f"{printable(name)} {show_shape(shape)} {show_dtype(kind)}" for name, (kind, shape) in rows.items()
    )
