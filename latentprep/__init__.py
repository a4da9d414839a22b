"""Encode an image folder once into a latent cache; train diffusion models from it many times."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["BucketBatchSampler", "LatentBatch", "LatentDataset", "LatentLoader", "__version__"]

if TYPE_CHECKING:
    from latentprep.read.batch import LatentBatch
    from latentprep.read.dataset import LatentDataset
    from latentprep.read.loader import LatentLoader
    from latentprep.read.sampler import BucketBatchSampler


def __getattr__(name: str) -> object:
    """The reader's classes, imported on first use: `latentprep --help` must not wait for torch."""
    homes = {
        "LatentBatch": "batch", "LatentDataset": "dataset", "BucketBatchSampler": "sampler", "LatentLoader": "loader",
    }  # fmt: skip
    if name in homes:
        return getattr(import_module(f"latentprep.read.{homes[name]}"), name)
    raise AttributeError(f"module 'latentprep' has no attribute {name!r}")
