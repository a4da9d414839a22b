"""Where the models run, in which precision, and how many images at once."""

import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from latentprep.errors import UserError
from latentprep.records import Size

if TYPE_CHECKING:
    import numpy as np
    import torch

DEVICE = re.compile(r"(?P<kind>cpu|mps|cuda)(?P<number>(?<=cuda):(0|[1-9][0-9]{0,3}))?")
T = TypeVar("T")
P = TypeVar("P", "np.ndarray", "torch.Tensor", "np.ndarray | torch.Tensor")


def choose_device(asked: str, local_rank: int | None = None, option: str = "--device") -> tuple[str, str]:
    """The device that --device, or another option, asks for, and why.

    With "auto" each of several runs on one machine has the GPU of its number there, `local_rank`. Raises UserError if
    the device is not there.
    """
    import torch

    if asked != "auto":
        check_device(asked, option)
        return asked, "asked for"
    if torch.cuda.is_available():
        number = (local_rank or 0) % torch.cuda.device_count()
        found, reason = f"cuda:{number}" if local_rank is not None else "cuda", torch.cuda.get_device_name(number)
    elif torch.backends.mps.is_available():
        found, reason = "mps", "Apple GPU"
    else:
        found, reason = "cpu", "no GPU that torch can use" + ("" if has_cuda_build() else "; it is built without CUDA")
    return found, f"auto: {reason}"


def choose_devices(device: str, devices: str | None, local_rank: int | None = None) -> tuple[tuple[str, ...], str]:
    """The devices of --devices ("all", or names with commas between), or else the one of --device; and why.

    Raises UserError.
    """
    import torch

    if devices is None:
        one, reason = choose_device(device, local_rank)
        return (one,), reason
    if devices == "all":
        if not torch.cuda.is_available():
            raise UserError(f"--devices all: {why_no_cuda()}, or use --device cpu.")
        return tuple(f"cuda:{n}" for n in range(torch.cuda.device_count())), "all that torch can use"
    names = tuple(name.strip() for name in devices.split(","))
    for name in names:
        check_device(name, "--devices")
    known = set()
    for name in names:
        same = "cuda:0" if name == "cuda" else name
        if same in known and name != "cpu":
            raise UserError(f"--devices {devices}: {same} stands twice in it.")
        known.add(same)
    return names, "asked for"


def check_device(device: str, option: str) -> None:
    """Raise UserError unless torch has such a device here."""
    import torch

    match, cpu = DEVICE.fullmatch(device), "--text-device cpu" if option == "--text-device" else "--device cpu"
    if match is None:
        several = " Several are for --devices." if option == "--device" and ("," in device or device == "all") else ""
        raise UserError(f"{option} {device}: expected auto, cuda, cuda:N, mps or cpu.{several}")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[match["kind"]] and match["kind"] == "cuda":
        raise UserError(f"{option} {device}: {why_no_cuda()}, or use {cpu}.")
    if not there[match["kind"]]:
        raise UserError(
            f"{option} {device}: torch {torch.__version__} finds none here. Use {cpu.removesuffix('cpu')}auto or cpu."
        )
    if match["number"] and int(match["number"][1:]) >= torch.cuda.device_count():
        raise UserError(f"{option} {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0.")


def has_cuda_build() -> bool:
    """Whether torch is built for CUDA, or for AMD's ROCm, which it calls CUDA too."""
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None


def why_no_cuda() -> str:
    """Why torch finds no CUDA device, and what to do."""
    import torch

    if not has_cuda_build():
        return (
            f"torch {torch.__version__} is built without CUDA. Install a build that has it, with the pip command that "
            "https://pytorch.org/get-started/locally shows for your system"
        )
    built = f"torch {torch.__version__} is built for {'CUDA' if torch.version.cuda else 'ROCm'}, but finds no GPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"{built}: CUDA_VISIBLE_DEVICES is {visible!r}, which may hide it. Unset that, check the GPU's driver"
    return f"{built}: its driver is missing or too old (nvidia-smi shows it). Install the driver"


def choose_dtype(dtype: str, device: str) -> str:
    """The number type of models; auto: float16 on CUDA, else float32."""
    if dtype != "auto":
        return dtype
    return "float16" if device.startswith("cuda") else "float32"


def default_batch_size(device: str, buckets: Iterable[Size]) -> int:
    """Images that the VAE sees at once. On a CPU 1: more gain nothing (benchmarks/encode.py). On a GPU as many of the
    largest bucket as have the pixels of 8 images of 512x512, at least 1.
    """
    if device == "cpu":
        return 1
    return max(1, 8 * 512 * 512 // max((height * width for height, width in buckets), default=1))


def default_threads(num_sharing: int) -> int:
    """Threads that decode images for one device: its share of the cores that this process may use, up to 16.

    With 16 cores and an H200, 8 gave 86 images/s of 1600x1200 and 16 gave 127 (benchmarks/encode.py).
    """
    return max(1, min(16, count_cores() // num_sharing))


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_shard_bytes(device: str) -> int:
    """256 MB on a GPU. On a CPU 16 MB, since it may need an hour for more, and a run that is stopped loses a shard."""
    return 16_000_000 if device == "cpu" else 256_000_000


class OutOfMemoryError(UserError):
    """Not even one image fits."""


class BatchLimit:
    """How much fits into the device's memory at once: found out by running out of it, and remembered."""

    def __init__(self) -> None:
        self.pixels: int | None = None  # of all images of a batch together; None: memory has always sufficed
        self.said = ""

    def run(self, work: Callable[[P], T], pixels: P) -> list[T]:
        """What `work` gives for pixels [N,H,W,...]: one result for each part, in as few parts as fit into memory.

        Raises OutOfMemoryError.
        """
        _, height, width = pixels.shape[:3]
        results: list[T] = []
        start = 0
        while start < len(pixels):
            count = len(pixels) - start
            if self.pixels is not None:
                count = min(count, max(1, self.pixels // (height * width)))
            try:
                results.append(work(pixels[start : start + count]))
                start += count
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # after `except`, since inside it the exception still holds the tensors that did not fit
            empty_cache()
            if count == 1:
                image = f"one image of {width}x{height}"
                raise OutOfMemoryError(f"{image} does not fit into the device's memory; --tiling takes less")
            self.pixels = count // 2 * height * width
            self.said = f"out of memory with {count} images of {width}x{height} at once: went on with {count // 2}"
        return results


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory; CUDA has a class for it, MPS and the CPU have only words."""
    import torch

    words = ("MPS backend out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in words)


def empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quiet_libraries() -> None:
    """Keep other libraries' loading bars and logs off the terminal; warnings are the caller's to filter."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
