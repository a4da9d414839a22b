"""How far stored numbers are from others of the same image or prompt."""

from math import isnan

from torch import Tensor

from latentprep.cache.int8 import POSITIONS

EXACT = ("_mask", POSITIONS)  # endings of the names of masks and positions: these must be equal, no distance is taken


def larger(one: float, other: float) -> float:
    """The larger of two differences; NaN if one of them is, which max() would pass over."""
    return one if isnan(one) or other <= one else other


def difference_of(fresh: Tensor, stored: Tensor) -> float:
    """Root mean square difference of the worst token of two [T,D] or [D], in standard deviations of `fresh`."""
    spread = float(fresh.std()) or 1.0  # all of one value: then the difference itself counts
    return float((fresh - stored).square().mean(-1).sqrt().max()) / spread
