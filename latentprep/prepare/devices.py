"""Where the models run, in which precision, and how many images at once."""

from collections.abc import Iterable

from latentprep.errors import UserError
from latentprep.records import Size


def choose_device(device: str, dtype: str) -> tuple[str, str, str]:
    """device, dtype and the reason for them. Raises UserError where the device is not there."""
    import torch

    reason = "asked for"
    if device == "auto":
        if torch.cuda.is_available():
            device, reason = "cuda", "auto: " + torch.cuda.get_device_name()
        elif torch.backends.mps.is_available():
            device, reason = "mps", "auto: Apple GPU"
        else:
            device, reason = "cpu", "auto: no GPU that torch can use"
    else:
        kind, _, index = device.partition(":")
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if kind not in there or (index and (kind != "cuda" or not index.isdigit())):
            raise UserError(f"--device {device}: expected auto, cuda, cuda:N, mps or cpu.")
        if not there[kind]:
            raise UserError(f"--device {device}: torch {torch.__version__} finds none here. Use --device auto or cpu.")
        if index and int(index) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0.")
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    return device, dtype, reason


def default_batch_size(device: str, buckets: Iterable[Size]) -> int:
    """1 on a CPU, where more gain nothing (benchmarks/encode.py); on a GPU as many pixels as 8 images of 512x512."""
    if device == "cpu":
        return 1
    return max(1, 8 * 512 * 512 // max((height * width for height, width in buckets), default=1))


def quiet_libraries() -> None:
    """Keep other libraries' loading bars and logs off the terminal; warnings are the caller's to filter."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
