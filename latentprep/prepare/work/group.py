"""Rows of one bucket on their way to a LatentGroup."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.shard import LatentGroup
from latentprep.records import Box, Placement, Size, is_flipped


@dataclass(eq=False)
class GroupBuilder:
    """Rows of one bucket on their way to a LatentGroup."""

    bucket: Size
    views: list[str]
    mean: list[Tensor] = field(default_factory=list)
    std: list[Tensor] = field(default_factory=list)
    weight: list[np.ndarray | None] = field(default_factory=list)
    original_size: list[Size] = field(default_factory=list)
    placement: list[Placement] = field(default_factory=list)
    crops: list[tuple[Box, ...]] = field(default_factory=list)
    digest: list[bytes] = field(default_factory=list)

    def cut(self, count: int) -> None:
        """Leave the first `count` rows: a signal may have come in the middle of adding one."""
        for rows in (
            self.mean, self.std, self.weight, self.original_size, self.placement, self.crops, self.digest,
        ):  # fmt: skip
            del rows[count:]  # type: ignore[attr-defined]

    def build(self) -> LatentGroup:
        """The group; the builder is empty afterwards, so that a shard is not in memory twice."""

        mirrors = len(self.views) // len(self.crops[0])  # views of each crop
        return LatentGroup(
            label=group_label(self.bucket),
            latent_mean=_stack_and_free(self.mean),
            latent_std=_stack_and_free(self.std) if self.std else None,
            weight=self._build_weight(),
            original_size=torch.tensor(self.original_size, dtype=torch.int32),
            resized_size=torch.tensor([[p.resized_size] * len(self.views) for p in self.placement], dtype=torch.int32),
            crop=torch.tensor(self.crops, dtype=torch.int32).repeat_interleave(mirrors, dim=1),
            flipped=torch.tensor([is_flipped(view) for view in self.views], dtype=torch.uint8),
            digest=torch.from_numpy(np.frombuffer(b"".join(self.digest), np.uint8).reshape(-1, 16).copy()),
        )

    def _build_weight(self) -> Tensor | None:
        shapes = {weight.shape for weight in self.weight if weight is not None}
        if not shapes:
            return None
        ones = np.ones(shapes.pop(), np.float32)
        plain = torch.from_numpy(np.stack([ones if weight is None else weight for weight in self.weight])).half()
        crops = plain.repeat_interleave(len(self.views) // plain.shape[1], dim=1).unbind(1)
        return torch.stack(
            [crop.flip(-1) if is_flipped(view) else crop for view, crop in zip(self.views, crops, strict=True)], dim=1
        )


def _stack_and_free(rows: list[Tensor]) -> Tensor:
    stacked = torch.stack(rows)
    rows.clear()
    return stacked


def group_label(bucket: Size) -> str:
    """Name of a bucket's group; a label only, shapes are read from tensors."""
    return f"h{bucket[0]}w{bucket[1]}"
