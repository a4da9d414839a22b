"""Where a run takes place: devices of this machine, and its share of a run that several machines do together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from latentprep.errors import UserError

# rank, world size, the number on this machine, and how many there are on it: torchrun's names, SLURM's, Open MPI's
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),  # each has cores of its own
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


MAX_WORLD_SIZE = 2**20


@dataclass(frozen=True)
class Where:
    """Where a run takes place."""

    devices: tuple[str, ...]  # of this machine
    rank: int = 0  # of this run, 0 to world_size - 1
    world_size: int = 1  # runs that share the work
    local_size: int = 1  # those of them that share this machine's cores

    @property
    def engine(self) -> str:
        """One of engine.ENGINES."""
        return "ranks" if self.world_size > 1 else "local"


@dataclass(frozen=True)
class Share:
    """Which of several runs this is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None  # among the runs on this machine; None: it is not known
    origin: str = ""  # what said so
    local_size: int = 1  # runs on this machine; 1 where nothing says it


def find_share(rank: int | None, world_size: int | None, environment: Mapping[str, str] = os.environ) -> Share:
    """Which of several runs this is, as the options or the variables of torchrun or SLURM say. Raises UserError."""
    if rank is not None and world_size is not None:
        if world_size > MAX_WORLD_SIZE:
            raise UserError(f"--world-size {world_size}: expected at most {MAX_WORLD_SIZE}.")
        return Share(rank, world_size, None, "--rank")
    for names in VARIABLES:
        values = [environment.get(name) for name in names]
        if values[0] is None or values[1] is None or values[1] == "1":
            continue
        if names[0] == "SLURM_PROCID" and "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
            continue  # a batch script, or a shell of salloc: it runs once, whatever --ntasks says; srun makes steps
        try:
            found = [int(value) if value is not None else None for value in values]
        except ValueError:
            said = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True) if value is not None)
            raise UserError(f"{said}: expected whole numbers.") from None
        if found[0] is None or found[1] is None or not 0 <= found[0] < found[1] <= MAX_WORLD_SIZE:
            raise UserError(f"{names[0]}={values[0]}, {names[1]}={values[1]}: expected 0 <= rank < world size.")
        return Share(found[0], found[1], found[2], names[0], max(1, found[3] or 1))
    return Share()
