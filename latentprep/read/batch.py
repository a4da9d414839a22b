"""LatentBatch: what a training loop gets. Samples, control latents and cond are computed when they are first used."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypeVar

from latentprep.cache.normalization import Normalization
from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.read.cond import finish_cond
from latentprep.read.describe import show_dtype, show_shape, show_tensors
from latentprep.read.noise import draw_sample
from latentprep.read.prompts import StoredPrompts

CondModel = Callable[[list[str]], "Tensor | dict[str, Tensor]"]  # B prompts -> [B,T,D], or name -> [B,...]
Cond = dict[str, Tensor]  # name -> [B,...]
# CondT is None without include_cond, WeightT is None without use_weight
CondT = TypeVar("CondT", bound=Cond | None, default=Cond | None, covariant=True)
WeightT = TypeVar("WeightT", bound=Tensor | None, default=Tensor | None, covariant=True)


def cond_model_elsewhere(prompts: list[str]) -> Cond:
    """Stands for a cond_model that was left behind in another process."""
    raise UserError(
        "batch.cond: cond_model stays in the training process, and this batch comes from a worker of a DataLoader. "
        "Read with LatentLoader, which puts it back, or with num_workers=0."
    )


@dataclass(eq=False, repr=False)
class LatentBatch(Generic[CondT, WeightT]):
    """B samples of one bucket. Latents and cond keep their stored dtype until used: few bytes go to the GPU."""

    index: Tensor  # [B] int64: indices into the dataset
    latent_mean: Tensor  # [B,C,h,w] in the store dtype; unscaled
    latent_std: Tensor | None  # the same; None: the mean is the sample
    noise_seed: Tensor | None  # [B] int64: what each sample's draw starts from
    normalization: Normalization
    # name -> [B,T,D] or [B,D] as stored. int8 has its scales under <name>_scale (cache/int8.py); `cond` is unpacked
    stored_cond: dict[str, Tensor] | None
    prompts: list[str] | StoredPrompts  # B
    # [B,1,h,w] float32: loss weight of every latent pixel, after the rule of use_weight; None without use_weight
    stored_weight: Tensor | None
    original_size: Tensor  # [B,2] int32: height, width before the resize
    resized_size: Tensor  # [B,2] int32
    crop: Tensor  # [B,4] int32: top, left, height, width in the resized image
    flipped: Tensor  # [B] bool
    cond_lengths: dict[str, Tensor] = field(default_factory=dict)  # name -> [B] int64: tokens before the padding
    stored_control: dict[str, Tensor] = field(default_factory=dict)  # of each control image: like latent_mean
    fields: dict[str, Tensor] = field(default_factory=dict)  # name -> [B,...]: what else the cache holds of each sample
    loss_weight: float | Tensor = 1.0  # of all samples, or of each: [B] float32
    set_numbers: np.ndarray | None = None  # [B]: the set of each sample, as an index into set_names; None: no sets
    set_names: tuple[str, ...] = ()
    member: int = 0  # with a LatentMix: which of its datasets the samples are from, counted from 0
    cond_model: CondModel | None = None  # makes cond of cond_text, if the dataset makes prompts of its own
    dtype: torch.dtype | None = None  # of latent_sample, control, weight and cond, as `to` was told; None: float32
    _drawn: Tensor | None = None
    _made_cond: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        mean = self.latent_mean
        stored = "mean" if self.latent_std is None else "mean and std"
        parts = [f"{counted(len(self), 'sample')} of {show_shape(mean.shape[1:])} {show_dtype(mean.dtype)}, {stored}"]
        if self.stored_control:
            parts.append(counted(len(self.stored_control), "control image"))
        if self.stored_cond is not None:
            parts.append(f"cond {show_tensors(self.stored_cond)}")
        elif self.cond_model is not None:
            parts.append("cond by cond_model")
        if self.stored_weight is not None:
            parts.append("weight")
        if self.fields:
            parts.append(show_tensors(self.fields))
        return f"LatentBatch({', '.join(parts)}, on {mean.device})"

    @property
    def cond_text(self) -> list[str]:
        """B prompts."""
        if not isinstance(self.prompts, list):
            self.prompts = self.prompts.read()
        return self.prompts

    def __getitem__(self, index: object) -> Any:
        """Refused: DataLoader's own collate would take a batch apart. Raises UserError."""
        raise UserError(
            f"a LatentBatch has no [{index!r:.40}]: it is a whole batch, with latent_sample, cond and weight. To a "
            "DataLoader give collate_fn=LatentDataset.collate, or read with LatentLoader."
        )

    @property
    def latent_sample(self) -> Tensor:
        """[B,C,h,w] float32, as the denoiser sees it: (patchify(mean + std * noise) - shift) * scale.

        After `batch.to(dtype)` it has that dtype. Without a std, or with "deterministic", there is no noise. FLUX.2's
        denoiser sees patches: [B,4C,h/2,w/2].

        The noise is drawn on the batch's device when this is first used. The same batch gives the same sample; on
        another device it is the same up to rounding.
        """
        if self._drawn is None and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # a sample that is kept must be fit for training too
                return self.latent_sample
        if self._drawn is None:
            if self.latent_std is None or self.noise_seed is None:
                self._drawn = self.normalization.apply(self.latent_mean.float())
            else:
                sample = draw_sample(self.latent_mean, self.latent_std, self.noise_seed)
                self._drawn = self.normalization.apply(sample, in_place=True)
        return self._drawn.to(self.dtype or torch.float32)

    @property
    def control(self) -> list[Tensor] | None:
        """Latents of the control images: one [B,C,h,w] for each, scaled like latent_sample; None if there are none.

        They are in the order of --control. They are the posterior's mean, without noise, as in the editing pipelines.
        """
        if not self.stored_control:
            return None
        means = (mean.float() for mean in self.stored_control.values())
        return [self.normalization.apply(mean).to(self.dtype or torch.float32) for mean in means]

    @property
    def weight(self) -> WeightT:
        """Loss weight of every number that the denoiser sees, like latent_sample: [B,1,h,w]; None without use_weight.

        If the denoiser sees patches it is [B,4C,h/2,w/2], since the four pixels of a patch may weigh differently.
        """
        if self.stored_weight is None:
            return None  # type: ignore[return-value]  # WeightT is None then
        weight = self.normalization.patch_weight(self.stored_weight, self.latent_mean.shape[1])
        return weight.to(self.dtype or torch.float32)  # type: ignore[return-value]

    @property
    def set(self) -> list[str]:
        """B names: the set of each sample; "" if the cache has no sets."""
        if self.set_numbers is None:
            return [""] * len(self)
        return [self.set_names[number] for number in self.set_numbers.tolist()]

    @property
    def sample_weight(self) -> Tensor:
        """[B] float32: how much each sample's loss counts: the dataset's sample_weight times that of its set.

        Use it like this:
        `(batch.sample_weight * loss.mean((1, 2, 3))).mean()`
        """
        if isinstance(self.loss_weight, Tensor):
            return self.loss_weight
        return torch.full((len(self),), self.loss_weight, dtype=torch.float32, device=self.latent_mean.device)

    @property
    def cond(self) -> CondT:
        """Text embeddings: {"prompt_embeds": [B,T,D], ...}, in the dtype of latent_sample; None if there are none.

        Positions ("..._ids") stay float32, masks are bool. Cond of a cond_model keeps its dtype, unless `to(dtype)` was
        called.

        If the prompts of a model differ in length, shorter ones are padded to the longest of the batch, and
        {"prompt_embeds_mask": [B,T] bool} says which tokens are their own; `cond_lengths` says how many. The padding
        is what the model's family wants: zeros, or the last vector again, as in stable-diffusion-webui. Some families
        want a minimum length, too.

        If there is a cond_model, it is called when this is first used, and its result is kept.
        """
        if self.stored_cond is not None:
            return finish_cond(self.stored_cond, self.cond_lengths, self.dtype or torch.float32)  # type: ignore[return-value]
        if self._made_cond is None and self.cond_model is not None:
            made = self.cond_model(self.cond_text)
            self._made_cond = made if isinstance(made, dict) else {"prompt_embeds": made}
        if self._made_cond is None or self.dtype is None:
            return self._made_cond  # type: ignore[return-value]
        return {  # type: ignore[return-value]
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in self._made_cond.items()
        }

    @property
    def time_ids(self) -> Tensor:
        """[B,6] float32 for SDXL: original height and width, crop top and left, target height and width.

        They are made as in diffusers' train_text_to_image_sdxl.py. Crop top and left: the corner of the crop in the
        resized image; for a mirrored view, in the mirrored resized image. The target is the size of the crop.
        """
        top, left, height, width = self.crop.unbind(1)
        mirrored = self.resized_size[:, 1] - left - width
        left = torch.where(self.flipped, mirrored, left)
        return torch.stack([*self.original_size.unbind(1), top, left, height, width], dim=1).float()

    def __copy__(self) -> "LatentBatch[CondT, WeightT]":
        return replace(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = None if self.cond_model is None else cond_model_elsewhere  # LatentLoader puts the real one back
        return {**self.__dict__, "cond_model": kept, "prompts": self.cond_text}  # another process has no open files

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "LatentBatch[CondT, WeightT]":
        """The batch on another device; with a dtype, latent_sample, control, weight and cond get that dtype.

        Latents are still computed in float32 first. time_ids, sizes, masks and position ids keep their dtypes.
        `batch.to(torch.bfloat16)` changes only the dtype. Raises UserError for a dtype that is not floating-point.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"batch.to: dtype={dtype}, expected a floating-point dtype, such as torch.bfloat16.")
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking)) if device is not None else self
        return moved if dtype is None else replace(moved, dtype=dtype)

    def pin_memory(self) -> "LatentBatch[CondT, WeightT]":
        """The batch in page-locked memory; a DataLoader with pin_memory=True calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> "LatentBatch[CondT, WeightT]":
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = move(value)
            elif isinstance(value, dict):
                moved[name] = {key: move(tensor) for key, tensor in value.items()}
        return replace(self, **moved)
