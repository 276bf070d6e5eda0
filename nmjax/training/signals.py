"""SIGTERM and SIGINT ask for a checkpoint and an orderly end."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax


class TrainingInterrupted(SystemExit):  # noqa: N818 (it is no error)
    """A signal ended the run after a checkpoint was written.

    Uncaught, it ends the process with the code that a shell gives for the signal.

    Attributes:
      code: 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT.
      step: Steps done.
      checkpoint: Folder of the checkpoint.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path | None):
        """Takes the signal, the step and its checkpoint."""
        super().__init__(128 + signum)
        self.step, self.checkpoint = step, checkpoint


class StopRequested(Exception):  # noqa: N818 (it is no error)
    """A signal came during an evaluation, which need not be finished."""


class StopSignals:
    """Notes SIGTERM and SIGINT while a `with` block runs; a second one ends it at once.

    Attributes:
      signum: The signal that came, or None.
    """

    def __init__(self, *, every: int):
        """Listens once the block is entered, and in the main thread only.

        Args:
          every: Steps between two questions of one host to the others; a host alone
            looks at every step.
        """
        self.signum: int | None = None
        self._every = every
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        """Puts back the handlers that were there."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def interrupted(self, step: int, checkpoint: Path | None) -> TrainingInterrupted:
        """The exception with which to end; says on standard error what to do."""
        signum = self.signum or signal.SIGTERM
        name = signal.Signals(signum).name
        print(
            f"{name}: stopped after step {step}; checkpoint {checkpoint}. The same "
            "command continues from there",
            file=sys.stderr,
        )
        return TrainingInterrupted(signum, step, checkpoint)

    def raise_if_stopped(self) -> None:
        """Ends what can be done again later, by `StopRequested`."""
        if self.stop(0):
            raise StopRequested

    def stop(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on every host."""
        if jax.process_count() == 1:
            return self.signum is not None
        if step % self._every:
            return False
        from jax.experimental import multihost_utils

        # A signal that came to one host alone must stop all of them at one step.
        came = multihost_utils.process_allgather(self.signum or 0).max()
        self.signum = int(came) or None
        return self.signum is not None
