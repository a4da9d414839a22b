"""PersonalizedBase and PersonalizedDataLoader: stable-diffusion-webui's dataset over a latent cache.

Old training code moves over with one changed import. The images are encoded once, into a cache beside them, and from
the second start on only what is new. What is different from the ancestor stands in docs/coming-from.md.
"""

from latentprep.personalized.dataset import PersonalizedBase
from latentprep.personalized.entries import DatasetEntry, LatentDist
from latentprep.personalized.loader import BatchLoader, PersonalizedDataLoader

__all__ = ["BatchLoader", "DatasetEntry", "LatentDist", "PersonalizedBase", "PersonalizedDataLoader"]
