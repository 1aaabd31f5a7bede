"""What is wrong with a checkpoint or a Hugging Face folder, in words for the person who gave it."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged or of another model."""


class HuggingFaceError(ValueError):
    """A Hugging Face folder that cannot be read as this model, or a model that no Hugging Face class can hold."""
