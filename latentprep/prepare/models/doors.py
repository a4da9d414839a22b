"""The doors of a model: what a plan may know of it, and what a worker may have it do.

A description is small and can be sent to another process; it opens the model there. Whatever has these attributes will
do: folders and single files do (vae_folder, text_folder, single_file), and objects in memory (personalized.models).
"""

from typing import TYPE_CHECKING, Any, Protocol

from latentprep.cache.normalization import Normalization
from latentprep.options import TextOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import torch

    from latentprep.cache.ragged import Conds
    from latentprep.prepare.devices import BatchLimit
    from latentprep.prepare.models.vae_encoder import Posterior


class ImageEncoder(Protocol):
    """A VAE at work: pixels -> posterior. `encode` is `finish` of `start`; two threads may do one each."""

    limit: "BatchLimit"  # what an overfull memory has taught

    @property
    def num_retried(self) -> int:
        """Encodings that were done again in float32, because half precision overflowed."""
        ...

    def start(self, pixels: "np.ndarray | torch.Tensor") -> "Posterior":
        """pixels [N,H,W,3] uint8 sRGB => their posterior on the device, in its dtype. Waits for nothing.

        If memory does not suffice, the batch is halved. Raises OutOfMemoryError if it does not for one image.
        """
        ...

    def finish(self, started: "Posterior", pixels: "np.ndarray | torch.Tensor") -> "Posterior":
        """What `start` gave, and the pixels it was given => the posterior on the CPU in float32.

        Images whose numbers overflowed are encoded again. Where memory does not suffice for that, they stay not finite,
        and `too_large` says so.
        """
        ...

    def encode(self, pixels: "np.ndarray | torch.Tensor") -> "Posterior":
        """pixels [N,H,W,3] uint8 => their posterior on the CPU in float32."""
        ...


class PromptEncoder(Protocol):
    """Text encoders at work: prompts -> cond."""

    max_tokens: int | None  # tokens of a prompt that are kept; None: unknown
    batch_limit: str  # what an overfull memory has taught; empty: nothing

    def encode(self, prompts: list[str]) -> "Conds":
        """Cond of P prompts, float32 on the CPU: name -> [P,...], or rows of lengths of their own.

        Raises RuntimeError if the device's memory does not suffice for one prompt.
        """
        ...

    def count_tokens(self, prompts: list[str]) -> "np.ndarray | None":
        """[P] int32: tokens that each whole prompt takes; None if the encoder does not say."""
        ...


class SeeingEncoder(PromptEncoder, Protocol):
    """Text encoders whose prompts see control images."""

    def encode_seeing(self, prompts: list[str], images: "Iterable[Sequence[np.ndarray]]") -> "Conds":
        """Cond of P prompts, each with its control images [H,W,3] uint8, as `encode` gives it; none is cut."""
        ...


class VaeModel(Protocol):
    """A VAE that is not opened yet."""

    @property
    def digest(self) -> str: ...
    @property
    def factor(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def normalization(self) -> Normalization: ...
    @property
    def force_upcast(self) -> bool: ...
    @property
    def has_std(self) -> bool: ...

    def open(
        self,
        device: "torch.device",
        dtype: "torch.dtype",
        *,
        tiling: int | None = None,
        compile: bool = False,  # noqa: A002
    ) -> ImageEncoder: ...


class TextModel(Protocol):
    """Text encoders that are not opened yet."""

    @property
    def digest(self) -> str: ...
    @property
    def where(self) -> str:
        """The files or folders of their weights, for a person."""
        ...

    def settings(self, options: TextOptions) -> dict[str, Any]: ...
    def num_values(self, options: TextOptions) -> int: ...
    def more_tokens(self, max_tokens: int) -> int | None: ...
    def open(
        self, device: "torch.device", dtype: "torch.dtype", options: TextOptions | None = None
    ) -> PromptEncoder: ...
