"""Position: where an epoch stands, counted so that another batch size or number of ranks can go on from there."""

from dataclasses import astuple, dataclass
from typing import Any

from latentprep.errors import UserError
from latentprep.read.arguments import check_epoch, check_int

MAX_STRETCHES = 100  # times that an epoch may go on with another batch size or number of ranks
MAX_NUMBER = 2**31  # of a stretch: larger ones would overflow int64


@dataclass(frozen=True)
class Stretch:
    """Steps of an epoch that were taken one after the other, with one batch size and one number of ranks."""

    batch_size: int
    world_size: int
    num_steps: int


@dataclass(frozen=True)
class Position:
    """A position in an epoch: all steps of these stretches were taken."""

    epoch: int = 0
    stretches: tuple[Stretch, ...] = ()

    def split(self, batch_size: int, world_size: int) -> tuple[tuple[Stretch, ...], int]:
        """(earlier stretches, steps already taken with this batch_size and world_size after them).

        The last stretch is taken apart only if it had the same batch_size and world_size.
        """
        last = self.stretches[-1] if self.stretches else None
        if last is not None and (last.batch_size, last.world_size) == (batch_size, world_size):
            return self.stretches[:-1], last.num_steps
        return self.stretches, 0

    def after(self, num_steps: int, batch_size: int, world_size: int) -> "Position":
        """The position after num_steps steps with this batch_size and world_size.

        If the last stretch had the same two, num_steps counts from the start of that stretch.
        """
        before, _ = self.split(batch_size, world_size)
        stretch = (Stretch(batch_size, world_size, num_steps),) if num_steps else ()
        return Position(self.epoch, before + stretch)

    def to_json(self, batch_size: int, world_size: int) -> dict[str, Any]:
        """As a state holds it: the last stretch as next_batch, batch_size and world_size, by default these."""
        *before, last = self.stretches or (Stretch(batch_size, world_size, 0),)
        return {
            "epoch": self.epoch, "next_batch": last.num_steps, "batch_size": last.batch_size,
            "world_size": last.world_size, "before": [list(astuple(stretch)) for stretch in before],
        }  # fmt: skip

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Position":
        """What to_json gave. Raises UserError for what it cannot have given."""
        before = state.get("before")
        if not isinstance(before, list) or len(before) > MAX_STRETCHES:
            raise UserError(f"load_state_dict: before={before!r:.60}: expected what state_dict gave.")
        stretches = []
        for numbers in (*before, [state.get("batch_size"), state.get("world_size"), state.get("next_batch")]):
            if not isinstance(numbers, list) or len(numbers) != 3:
                raise UserError(f"load_state_dict: before has {numbers!r:.60}, expected [batch size, ranks, steps].")
            named = zip(("batch_size", "world_size", "next_batch"), numbers, (1, 1, 0), strict=True)
            checked = (check_int(f"load_state_dict: {name}", number, low, MAX_NUMBER) for name, number, low in named)
            stretches.append(Stretch(*checked))
        epoch = check_epoch("load_state_dict: epoch", state.get("epoch"))
        return cls(epoch, tuple(stretch for stretch in stretches if stretch.num_steps))
