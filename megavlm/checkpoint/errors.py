"""What is wrong with a checkpoint or a Hugging Face folder, in words for the person who gave it."""

from __future__ import annotations

from collections.abc import Sequence

from megavlm.config.exits import Exit


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged or of another model."""


class Unreadable(CheckpointError):
    """A checkpoint of which the disk or the file server gives nothing now. What it holds may be as good as ever."""

    exit_code = Exit.UNREADABLE


class SaveFailed(CheckpointError):
    """A checkpoint that could not be written: a disk or a file system that may be well again at the next start."""

    exit_code = Exit.SAVE_FAILED


class DiskFull(SaveFailed):
    """A checkpoint for which there is no room."""

    exit_code = Exit.DISK_FULL


class HuggingFaceError(ValueError):
    """A Hugging Face folder that cannot be read as this model, or a model that no Hugging Face class can hold."""


def some(names: Sequence[str], limit: int = 8) -> str:
    """Names for a message: the first few, and how many more."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
