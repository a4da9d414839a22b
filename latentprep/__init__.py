"""Encode an image folder once into a latent cache; train diffusion models from it many times.

Make and check caches: encode, inspect, verify, diff, compact, merge; each is a command of the same name. Draw what is
in one: preview, report. Measure this machine: bench. Train from them: LatentDataset, LatentLoader. What the caller can
mend is raised as UserError.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from latentprep.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "Benched", "BucketBatchSampler", "Compacted", "Compared", "Encoded", "LatentBatch", "LatentDataset", "LatentLoader",
    "LatentMix", "Merged", "Summary", "UserError", "Verified", "__version__", "bench", "compact", "diff", "encode",
    "inspect", "merge", "preview", "report", "verify",
]  # fmt: skip

if TYPE_CHECKING:
    from latentprep.api import bench, compact, diff, encode, inspect, merge, preview, report, verify
    from latentprep.differences import Compared
    from latentprep.read.batch import LatentBatch
    from latentprep.read.dataset import LatentDataset
    from latentprep.read.loader import LatentLoader
    from latentprep.read.mix import LatentMix
    from latentprep.read.sampler import BucketBatchSampler
    from latentprep.results import Benched, Compacted, Encoded, Merged, Summary, Verified

# where the public names live; imported on first use, since `latentprep --help` must not wait for torch
_HOMES = {
    "bench": "api", "compact": "api", "diff": "api", "encode": "api", "inspect": "api", "merge": "api",
    "preview": "api", "report": "api", "verify": "api",
    "Benched": "results", "Compacted": "results", "Encoded": "results", "Merged": "results", "Summary": "results",
    "Verified": "results", "Compared": "differences",
    "LatentBatch": "read.batch", "LatentDataset": "read.dataset", "LatentMix": "read.mix",
    "BucketBatchSampler": "read.sampler", "LatentLoader": "read.loader",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"latentprep.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'latentprep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
