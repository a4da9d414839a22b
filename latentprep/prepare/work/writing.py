"""What becomes of a file that cannot be written: its own task's failure; two in a row end the run."""

from latentprep.errors import WriteError
from latentprep.prepare.work.events import Failure

MAX_FAILURES = 2  # in a row: then the disk is full, or gone, and nothing more can be kept


class Writing:
    """How the writes of a run went, one after the other."""

    def __init__(self) -> None:
        self.num_failures = 0  # of the disk, in a row

    def went_well(self) -> None:
        self.num_failures = 0

    def failed(self, task_id: str, error: Exception) -> Failure:
        """The failure of the task whose file it was. Raises WriteError if nothing can be written any more."""
        if not isinstance(error, WriteError):  # of a library, or ours: it is not to be the next task's
            return Failure.of(task_id, error)
        self.num_failures += 1
        if self.num_failures == MAX_FAILURES:
            raise error
        return Failure(task_id, str(error))
