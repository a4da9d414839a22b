"""Encode an image folder once into a latent cache; train diffusion models from it many times."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["BucketBatchSampler", "LatentBatch", "LatentDataset", "LatentLoader", "__version__"]

if TYPE_CHECKING:
    from latentprep.read.dataset import LatentBatch, LatentDataset
    from latentprep.read.sampler import BucketBatchSampler, LatentLoader


def __getattr__(name: str) -> object:
    """The reader's classes, imported on first use: `latentprep --help` must not wait for torch."""
    if name in ("LatentBatch", "LatentDataset"):
        from latentprep.read import dataset

        return getattr(dataset, name)
    if name in ("BucketBatchSampler", "LatentLoader"):
        from latentprep.read import sampler

        return getattr(sampler, name)
    raise AttributeError(f"module 'latentprep' has no attribute {name!r}")
