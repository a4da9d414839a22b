"""Position: where an epoch stands, counted so that another batch size or number of ranks can go on from there."""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from latentprep.errors import UserError
from latentprep.read.arguments import check_int

MAX_STRETCHES = 1000  # times that an epoch may go on with another batch size or another number of ranks
MAX_NUMBER = 2**31  # of a stretch: more is nobody's batch size, and would overflow


@dataclass(frozen=True)
class Stretch:
    """Steps of an epoch that were taken one after the other, with one batch size and one number of ranks."""

    batch_size: int
    world_size: int
    num_steps: int


@dataclass(frozen=True)
class Position:
    """Where an epoch stands: behind these stretches of it."""

    epoch: int = 0
    stretches: tuple[Stretch, ...] = ()

    def split(self, batch_size: int, world_size: int) -> tuple[tuple[Stretch, ...], int]:
        """The stretches that were taken otherwise, and the step behind them that goes on in this way."""
        last = self.stretches[-1] if self.stretches else None
        if last is not None and (last.batch_size, last.world_size) == (batch_size, world_size):
            return self.stretches[:-1], last.num_steps
        return self.stretches, 0

    def after(self, num_steps: int, batch_size: int, world_size: int) -> "Position":
        """The position once so many steps were taken in this way: those that it has taken so already count."""
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
    def from_json(cls, state: dict[str, Any], count_steps: Callable[["Position", int, int], int]) -> "Position":
        """What to_json gave. Raises UserError if an epoch has no such stretches.

        count_steps: a position, a batch size, a number of ranks => steps that are left behind the position.
        """
        position = cls(check_int("load_state_dict: epoch", state.get("epoch"), 0))
        before = state.get("before")
        if not isinstance(before, list) or len(before) > MAX_STRETCHES:
            raise UserError(f"load_state_dict: before={before!r:.60}: expected what state_dict gave.")
        last = [state.get("batch_size"), state.get("world_size"), state.get("next_batch")]
        for numbers in (*before, last):
            if not isinstance(numbers, list) or len(numbers) != 3:
                raise UserError(f"load_state_dict: before has {numbers!r:.60}, expected [batch size, ranks, steps].")
            named = zip(("batch_size", "world_size", "next_batch"), numbers, (1, 1, 0), strict=True)
            batch_size, world_size, num_steps = (
                min(check_int(f"load_state_dict: {name}", number, low), MAX_NUMBER) for name, number, low in named
            )
            there = count_steps(position, batch_size, world_size)
            if num_steps > there:
                raise UserError(f"load_state_dict: next_batch={num_steps}: expected 0 to {there}.")
            if num_steps:
                position = cls(position.epoch, (*position.stretches, Stretch(batch_size, world_size, num_steps)))
        return position
