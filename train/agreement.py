"""What stops one process stops all of them, with the same message, told once."""

from types import TracebackType

from accelerate import Accelerator
from accelerate.utils import gather_object

from latent_ae.config import ToldElsewhere, UserError
from latent_ae.disk import disk_trouble


class Agreed:
    """A `with` block that every process enters: a UserError, or a file that one cannot reach, in it on any process is
    raised on all of them at the end of the block.

    The block must not wait for other processes: one that has failed would not come. Any other exception is a bug,
    keeps its traceback and ends the process that met it; the launcher ends the others.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        reason = str(error) if isinstance(error, UserError) else None
        if isinstance(error, OSError) and disk_trouble(error):
            reason = f"{error.filename or 'a file'}: {error.strerror}"
        if error is not None and reason is None:
            return
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if processes == 1:
            return
        reasons = gather_object([reason])
        failed = [number for number, text in enumerate(reasons) if text is not None]
        if not failed:
            return
        # one that struck every process alike needs no number
        alike = len(failed) == processes and len(set(reasons)) == 1
        message = reasons[failed[0]] if alike or failed[0] == 0 else f"process {failed[0]}: {reasons[failed[0]]}"
        raise (UserError if rank == 0 else ToldElsewhere)(message) from error
