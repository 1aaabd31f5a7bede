"""From a Hugging Face folder straight into a model of any parallel layout; a rank reads only the rows that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megavlm.checkpoint.errors import HuggingFaceError, some
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.links import Link
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.tensors import to_ours
from megavlm.config.schema import ModelConfig
from megavlm.models.weights import Provider, Where, assign, is_vocabulary
from megavlm.parallel.context import ParallelContext


def load_hf(chunks: Sequence[torch.nn.Module], folder: str | Path, model: ModelConfig, ctx: ParallelContext) -> int:
    """Fill this rank's part of the model; returns the number of tensors written. Numbers are cast to the parameters' format.

    Chunks may lack modules (a text-only stage): their weights are then left out, but the folder must hold the whole model.

    Raises:
        HuggingFaceError: the folder is damaged, or its weights are not those of `model`.
    """
    with open_weights(folder, model) as weights:
        return assign(chunks, hf_provider(weights, model), ctx)


def open_weights(folder: str | Path, model: ModelConfig) -> WeightFolder:
    """The folder's weights, by the names of the model's family."""
    return WeightFolder(folder, family(model.family).disk_name)


def hf_provider(weights: WeightFolder, model: ModelConfig) -> Provider:
    """(checkpoint key, shape, slice) -> that slice, read when asked for. The folder is checked against `model` at once.

    Raises:
        HuggingFaceError: weights are missing, unknown or of another shape; every one is named.
    """
    table = {link.key: link for link in family(model.family).links(model)}
    check_weights(weights, table.values())

    def provide(key: str, shape: tuple[int, ...], where: Where) -> torch.Tensor:
        if key not in table:
            raise HuggingFaceError(f"the model has a weight {key} that no Hugging Face weight belongs to: check the recipe's model block")
        link = table[key]
        if link.shape != shape and not (is_vocabulary(key) and link.shape[1:] == shape[1:]):
            raise HuggingFaceError(f"{key} has shape {shape}, the folder's weights make {link.shape}: check the recipe's model block")
        return to_ours(link, weights.rows, where)

    return provide


def check_weights(weights: WeightFolder, links: Sequence[Link]) -> None:
    """Every weight must be there, in its shape, and no other. Raises HuggingFaceError naming those that are not."""
    wanted = {part.name: part.shape for link in links for part in link.parts}
    found = weights.names
    for link in links:
        for alias in link.aliases:
            # Some exporters store a tied weight again; it must then be the same.
            if alias in found:
                if not torch.equal(weights.tensor(alias), weights.tensor(link.names[0])):
                    raise HuggingFaceError(f"{weights.folder}: {alias} differs from {link.names[0]}, though the config ties them")
                found = found - {alias}
    missing, unknown = sorted(wanted.keys() - found), sorted(found - wanted.keys())
    problems = [f"lacks {some(missing)}"] * bool(missing) + [f"holds unknown weights {some(unknown)}"] * bool(unknown)
    if problems:
        raise HuggingFaceError(
            f"{weights.folder} " + " and ".join(problems) + ": it is not the model that the recipe's model block describes"
        )
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise HuggingFaceError(f"{weights.folder}: {name} has shape {weights.shape(name)}, the recipe's model block wants {shape}")
