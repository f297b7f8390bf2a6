"""The one exception type for a user's mistakes.

The command line prints a :class:`UserError` as one line and exits with status 2, without a stack trace. Everything
else that escapes is a defect of gn_det and keeps its trace.
"""

from __future__ import annotations

import sys

#: torch's allocator for host memory raises a bare RuntimeError (torch 2.6 to 2.14), which its name alone tells apart.
_HOST_ALLOCATOR = "DefaultCPUAllocator"


class UserError(Exception):
    """A mistake in what the user gave us (path, key, annotation, weights ...).

    The message is one line that names the file, key or id and says what to do.
    """


class ConfigError(UserError):
    """A configuration key or value that is unknown, contradictory or not implemented by the engine."""


class DataError(UserError):
    """A dataset, image or annotation that cannot be used."""


class WeightsError(UserError):
    """A weights file that cannot be read, or that does not fit the configured model."""


class WriteError(UserError):
    """A file that cannot be written (full disk, no permission ...); an older file of that name is kept."""


class TrainingError(UserError):
    """A run that had to stop (non-finite loss, disk full ...); the last good checkpoint is kept."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that the device or the machine has no memory left; imports no torch."""
    if isinstance(error, RuntimeError) and _HOST_ALLOCATOR in str(error):
        return True
    torch = sys.modules.get("torch")  # without it none of its exceptions can have been raised
    return isinstance(error, MemoryError if torch is None else (torch.OutOfMemoryError, MemoryError))
