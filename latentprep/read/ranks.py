"""Which rank this process is, of how many: looked up when a batch is asked for, and not before."""

import os
import sys

from latentprep.errors import UserError


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
