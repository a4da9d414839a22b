"""Which rank this process is, of how many: looked up whenever it matters, since process groups are made late."""

import os
import sys

from latentprep.errors import UserError
from latentprep.read.arguments import check_int


def find_rank() -> tuple[int, int]:
    """Rank and world size: torch.distributed's if it is initialized, else torchrun's RANK and WORLD_SIZE, else 0 of 1.

    Raises UserError if the variables are no such numbers.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world_size is None:
        return 0, 1
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(f"RANK={rank!r}, WORLD_SIZE={world_size!r}: expected 0 <= RANK < WORLD_SIZE.")
    return int(rank), int(world_size)


def check_rank(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """(rank, world_size) as given; None if neither is given. Raises UserError if only one is, or unless
    0 <= rank < world_size."""
    if rank is None and world_size is None:
        return None
    rank = rank if rank is None else check_int("rank", rank)
    world_size = world_size if world_size is None else check_int("world_size", world_size)
    if rank is None or world_size is None:
        raise UserError(f"rank={rank}, world_size={world_size}: give both, or neither.")
    if not 0 <= rank < world_size:
        raise UserError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size.")
    return rank, world_size
