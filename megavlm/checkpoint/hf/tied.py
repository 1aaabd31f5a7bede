"""Is the output head the embedding? As transformers decides: the class's config says so, and stored weights that differ overrule it."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import Family
from megavlm.checkpoint.hf.folder import INDEX, SINGLE, WeightFolder
from megavlm.checkpoint.hf.registry import family_of_folder
from megavlm.config.schema import ModelConfig

log = logging.getLogger(__name__)
EMBEDDING, HEAD = "language.embedding.word_embeddings.weight", "language.output_layer.weight"
_ROWS = 16384
"""Compared at a time."""


def untied(model: ModelConfig) -> ModelConfig:
    """The same model with a head of its own."""
    return model.model_copy(update={"language": model.language.model_copy(update={"tie_embeddings": False})})


def head_names(kind: Family, model: ModelConfig) -> list[str]:
    """Names under which a folder of a tied model may hold the embedding again, as a head; none where the class has no such."""
    try:
        return [name for link in kind.links(untied(model)) if link.key == HEAD for name in link.names]
    except HuggingFaceError:  # a class whose head is always tied has no name for it
        return []


def as_stored(folder: Path, kind: Family, model: ModelConfig) -> ModelConfig:
    """`model`, untied with a warning where its config ties head and embedding and the folder holds both with different numbers.

    Source: transformers 5.23, modeling_utils.PreTrainedModel.tie_weights.
    """
    if not model.language.tie_embeddings:
        return model
    files = tuple((file.name, file.stat().st_mtime_ns) for file in (folder / INDEX, folder / SINGLE) if file.is_file())
    embeddings = [name for link in kind.links(model) if link.key == EMBEDDING for name in link.names]
    heads = head_names(kind, model)
    if not files or len(embeddings) != 1 or len(heads) != 1 or not _differ(folder.resolve(), embeddings[0], heads[0], files):
        return model
    return untied(model)


@lru_cache(maxsize=64)
def _differ(folder: Path, embedding: str, head: str, files: tuple[tuple[str, int], ...]) -> bool:
    """Asked several times in a start; `files` tells another download from the one that was read."""
    with WeightFolder(folder, family_of_folder(folder).disk_name) as weights:
        if not {embedding, head} <= weights.names or weights.shape(embedding) != weights.shape(head):
            return False
        rows = weights.shape(embedding)[0]
        places = [(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]
        same = all(torch.equal(weights.rows(embedding, *place), weights.rows(head, *place)) for place in places)
    if not same:
        log.warning(
            "%s: the config ties %s to %s, but the folder holds both and they differ: taken as untied, as transformers does "
            "(tie_word_embeddings=false in the config says so)",
            folder,
            head,
            embedding,
        )
    return not same
