"""What the reader does for accelerate (1.0 to 1.15), so that its loops see each sample once.

`Accelerator.prepare` wraps the sampler of a DataLoader: each process takes every n-th batch of it (BatchSamplerShard).
So the sampler has to give the batches of all ranks in turn. It is not told that it was wrapped: it finds out from the
call stack.
It has no batch_size, since its batches differ. accelerate before 1.14 refuses that, unless even_batches=False.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from latentprep.errors import UserError


def find_world_size(asking: FrameType | None) -> int | None:
    """How many processes accelerate shares these batches among; None if the caller is not accelerate."""
    shard = find_caller(asking, "BatchSamplerShard")
    return None if shard is None else int(shard.num_processes)


def refuse_dispatch(asking: FrameType | None) -> None:
    """Raise UserError for accelerate's dispatch_batches: one process would read for all, and cut batches into parts."""
    if find_caller(asking, "DataLoaderDispatcher") is not None:
        raise UserError(
            "accelerate's dispatch_batches: one process would read batches for all and cut them, and batches of "
            "latents cannot be cut. Leave it out: each process reads its own."
        )


def find_caller(asking: FrameType | None, name: str) -> Any:
    """The nearest caller on the stack that is an instance of class `name` of accelerate.data_loader; None if none is.

    asking: the frame to start from.
    """
    module = sys.modules.get("accelerate.data_loader")
    while module is not None and asking is not None:
        caller = asking.f_locals.get("self")
        if getattr(module, name) in type(caller).__mro__:  # isinstance would believe a __class__ that is made up
            return caller
        asking = asking.f_back
    return None


@contextmanager
def end_is_known(loader: Any) -> Iterator[None]:
    """Tells accelerate which loader is running, so that `Accelerator.accumulate` makes a step on its last batch."""
    module = sys.modules.get("accelerate.state")
    if module is None:
        yield
        return
    state = module.GradientState()
    state._add_dataloader(loader)
    try:
        yield
    finally:
        state._remove_dataloader(loader)
