"""From a Hugging Face folder straight into a model of any parallel layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megavlm.checkpoint.errors import HuggingFaceError, some
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.links import HEAD, LANGUAGE, Link, links, part_sizes
from megavlm.config.schema import ModelConfig
from megavlm.models.weights import Provider, assign
from megavlm.parallel.context import ParallelContext


def load_hf(chunks: Sequence[torch.nn.Module], folder: str | Path, model: ModelConfig, ctx: ParallelContext) -> int:
    """Fill this rank's part of the model; returns the number of tensors written. Numbers are cast to the parameters' format.

    Chunks may lack modules (a text-only stage): their weights are then left out, but the folder must hold the whole model.

    Raises:
        HuggingFaceError: the folder is damaged, or its weights are not those of `model`.
    """
    with WeightFolder(folder) as weights:
        return assign(chunks, hf_provider(weights, model), ctx)


def hf_provider(folder: str | Path | WeightFolder, model: ModelConfig) -> Provider:
    """(checkpoint key, shape) -> full tensor, read when asked for. The folder is checked against `model` at once.

    Raises:
        HuggingFaceError: weights are missing, unknown or of another shape; every one is named.
    """
    weights = folder if isinstance(folder, WeightFolder) else WeightFolder(folder)
    table = {link.key: link for link in links(model)}
    _check_names(weights, table, model)

    def provide(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        if key not in table:
            raise HuggingFaceError(f"the model has a weight {key} that no Hugging Face weight belongs to: check the recipe's model block")
        link = table[key]
        parts = [weights.tensor(name) for name in link.names]
        _check_parts(link, parts, shape, model, weights.folder)
        return link.to_ours(parts)

    return provide


def _check_names(weights: WeightFolder, table: dict[str, Link], model: ModelConfig) -> None:
    wanted = {name for link in table.values() for name in link.names}
    found = weights.names
    if model.language.tie_embeddings and HEAD in found:
        # Some exporters store a tied head; it must then be the embedding.
        if not torch.equal(weights.tensor(HEAD), weights.tensor(f"{LANGUAGE}embed_tokens.weight")):
            raise HuggingFaceError(f"{weights.folder}: {HEAD} differs from the embedding, though tie_word_embeddings is true")
        found = found - {HEAD}
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    problems = [f"lacks {some(missing)}"] * bool(missing) + [f"holds unknown weights {some(unknown)}"] * bool(unknown)
    if problems:
        raise HuggingFaceError(
            f"{weights.folder} " + " and ".join(problems) + ": it is not the model that the recipe's model block describes"
        )


def _check_parts(link: Link, parts: list[torch.Tensor], shape: tuple[int, ...], model: ModelConfig, folder: Path) -> None:
    """Fused weights are cut by sizes of the config; a part of another size would be cut in the wrong place."""
    if link.kind in ("concat", "qkv"):
        expected = [(size, *shape[1:]) for size in part_sizes(link, model)]
    elif link.kind == "reshape":
        expected = [link.shape]
    else:
        expected = [(link.rows, *shape[1:])] if link.rows is not None else [shape]
    for name, part, wanted in zip(link.names, parts, expected, strict=True):
        if tuple(part.shape) != tuple(wanted):
            raise HuggingFaceError(f"{folder}: {name} has shape {tuple(part.shape)}, the recipe's model block wants {tuple(wanted)}")
