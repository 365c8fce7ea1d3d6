"""What can go wrong while training or predicting, as one small tree.

    TrainerError            1   the run failed
    ├── ConfigError         2   an option, a combination of options, or a folder that does not fit
    ├── CheckpointError     1   a checkpoint is missing, cannot serve or cannot be written
    │   └── DamagedCheckpointError  a checkpoint is torn, or a byte of it has changed
    ├── ElsewhereError      *   another process of the launch failed, with this code
    ├── DivergedError       1   too many steps in a row had no finite loss and gradient
    ├── ExportError         1   a model cannot be exported, or the file computes something else
    └── PredictionError     1   a checkpoint, a data set and a label file do not fit together

The number is the exit code of the process. Beside these, 130 and 143 mean that Ctrl-C or SIGTERM
ended a run, after it saved, and 124 that no process got on for `train.hang_seconds`.
"""

from __future__ import annotations


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the host or the device has no memory left.

    PyTorch tells of an accelerator by a class of its own, of the host by a plain RuntimeError.
    """
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    return known or any(text in str(error) for text in texts)


def is_lost_peer(error: Exception) -> bool:
    """Whether an error says that the exchange with another process has ended.

    PyTorch has classes of its own for NCCL and for its store; gloo raises a plain RuntimeError.
    """
    known = type(error).__name__ in ("DistBackendError", "DistNetworkError")
    texts = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
    return known or any(text in str(error) for text in texts)


class TrainerError(Exception):
    """Base of all errors that a user can put right; the message says how."""

    exit_code = 1


class ConfigError(TrainerError):
    """An option, a combination of options, or a folder that does not fit; found before any work."""

    exit_code = 2


class CheckpointError(TrainerError):
    """A checkpoint is missing, cannot serve or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is torn, or a byte of it has changed; the one before it may serve."""


class DivergedError(TrainerError):
    """The loss or the gradient was not a finite number for too many steps in a row."""


class ElsewhereError(TrainerError):
    """Another process of the launch could not do its part.

    Args:
        message: Of its error, with the process and its machine.
        exit_code: Of its error.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PredictionError(TrainerError):
    """A checkpoint, a data set and a label file do not fit together."""


class ExportError(TrainerError):
    """A model cannot be exported, or the exported file does not compute what the model does."""
