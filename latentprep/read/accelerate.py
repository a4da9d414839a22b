"""What accelerate has to know, and what it must be kept from, so that its loops see each sample once. (1.0 to 1.15)

`Accelerator.prepare` wraps the sampler of a DataLoader: each process takes every n-th batch of it (BatchSamplerShard).
So the sampler has to give the batches of all ranks in turn. That it was wrapped it only knows by who asks it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from latentprep.errors import UserError


def find_world_size(asking: FrameType) -> int | None:
    """The number of processes that accelerate shares the asked-for batches out to; None if it is not accelerate."""
    module = sys.modules.get("accelerate.data_loader")
    asks = asking.f_locals.get("self") if module is not None else None
    return int(asks.num_processes) if module is not None and isinstance(asks, module.BatchSamplerShard) else None


def refuse_dispatch(asking: FrameType | None) -> None:
    """Raise UserError for accelerate's dispatch_batches: one process would read for all, and cut batches into parts."""
    module = sys.modules.get("accelerate.data_loader")
    while module is not None and asking is not None:
        if type(asking.f_locals.get("self")) is module.DataLoaderDispatcher:  # isinstance would believe its __class__
            raise UserError(
                "accelerate's dispatch_batches: batches of latents cannot be cut and sent by one process. "
                "Leave it out: each process reads its own."
            )
        asking = asking.f_back


@contextmanager
def end_is_known(loader: Any) -> Iterator[None]:
    """While batches of a loader are trained on, `Accelerator.accumulate` looks at its `end_of_dataloader`."""
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
