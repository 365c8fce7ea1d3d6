"""What can go wrong while training or predicting, as one small tree.

    TrainerError            1   the run failed
    ├── ConfigError         2   an option, a combination of options, or a folder that does not fit
    │   └── EncoderError        a class of the user's own that is no encoder
    ├── CheckpointError     1   a checkpoint is missing or cannot be used
    │   └── DamagedCheckpointError  a checkpoint is incomplete, or a byte of it has changed
    ├── ElsewhereError      *   another process of the launch failed, with this code
    ├── DivergedError       1   loss or gradient was not finite for too many steps in a row
    ├── ExportError         1   a model cannot be exported, or the file gives other results
    └── PredictionError     1   a checkpoint, a data set and a label file do not match

The number is the exit code of the process. Other codes: 130 and 143 mean that Ctrl-C or SIGTERM
ended a run after it saved, 124 that no process did a step for `train.hang_seconds`. A disk or a
machine that refuses is a StorageError of `shardprep`, 6.
"""

from __future__ import annotations


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the host or the device has no memory left.

    PyTorch has an exception class for accelerators, but raises a plain RuntimeError for the host.
    """
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    return known or any(text in str(error) for text in texts)


def is_lost_peer(error: Exception) -> bool:
    """Whether an error says that the connection to another process is lost.

    PyTorch has exception classes for NCCL and for its store; gloo raises a plain RuntimeError.
    """
    known = type(error).__name__ in ("DistBackendError", "DistNetworkError")
    texts = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
    return known or any(text in str(error) for text in texts)


class TrainerError(Exception):
    """Base of all errors that a user can correct; the message says how."""

    exit_code = 1


class ConfigError(TrainerError):
    """An option, a combination of options, or a folder that does not fit; found before any work."""

    exit_code = 2


class EncoderError(ConfigError):
    """A class of the user's own cannot be imported or built, or breaks the contract of encoders."""


class CheckpointError(TrainerError):
    """A checkpoint is missing or cannot be used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete, or a byte of it has changed; an older one may be intact."""


class DivergedError(TrainerError):
    """The loss or the gradient was not a finite number for too many steps in a row."""


class ElsewhereError(TrainerError):
    """Another process of the launch failed.

    Args:
        message: The message of its error, with the process and its machine.
        exit_code: The exit code of its error.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PredictionError(TrainerError):
    """A checkpoint, a data set and a label file do not match."""


class ExportError(TrainerError):
    """A model cannot be exported, or the exported file gives other results than the model."""
