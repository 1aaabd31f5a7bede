"""From Hugging Face folders straight into a model of any parallel layout; a rank reads only the rows that it holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megavlm.checkpoint.errors import HuggingFaceError, some
from megavlm.checkpoint.hf.config import config_from_hf
from megavlm.checkpoint.hf.encoders.folder import encoder_folder
from megavlm.checkpoint.hf.families.base import Family
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.links import Link, prefixed
from megavlm.checkpoint.hf.reading import CONFIG
from megavlm.checkpoint.hf.registry import family, family_of_folder
from megavlm.checkpoint.hf.tensors import to_ours
from megavlm.checkpoint.hf.tied import EMBEDDING, head_names
from megavlm.config.schema import InitConfig, ModelConfig
from megavlm.models.init import random_provider
from megavlm.models.weights import Provider, Where, assign, is_vocabulary
from megavlm.parallel.context import ParallelContext

_MODULES = ("vision.", "projector.", "language.")


def load_hf(chunks: Sequence[torch.nn.Module], folder: str | Path, model: ModelConfig, ctx: ParallelContext) -> int:
    """Fill this rank's part of the model; returns the number of tensors written. Numbers are cast to the parameters' format.

    Chunks may lack modules (a text-only stage): their weights are then left out, but the folder must hold the whole model.

    Raises:
        HuggingFaceError: the folder is damaged, or its weights are not those of `model`.
    """
    with open_weights(folder, model) as weights:
        return assign(chunks, hf_provider(weights, links_of(model, folder)), ctx)


def start_from(chunks: Sequence[torch.nn.Module], init: InitConfig, model: ModelConfig, seed: int, ctx: ParallelContext) -> None:
    """Fill this rank's part of the model as the recipe's `init` block says; what its folders do not hold is drawn from `seed`.

    Raises:
        HuggingFaceError: a folder is missing, damaged or of another model than the recipe describes.
    """
    drawn = random_provider(model, seed)
    with _providers(init) as providers:

        def provide(key: str, shape: tuple[int, ...], where: Where) -> torch.Tensor:
            read = next((provider for prefix, provider in providers.items() if key.startswith(prefix)), None)
            if read is None:
                return drawn(key, shape, where)
            found = read(key, shape, where)
            rows = min(where[0].stop, model.language.vocab_size) - where[0].start
            if is_vocabulary(key) and found.shape[0] < rows:  # tokens that the folder's model did not have
                found = torch.cat([found, drawn(key, shape, where)[found.shape[0] :].to(found.dtype)])
            return found

        assign(chunks, provide, ctx)


def check_start(init: InitConfig) -> None:
    """What `start_from` refuses of the folders themselves, from their files' headers. Raises HuggingFaceError."""
    with _providers(init):
        pass


@contextmanager
def _providers(init: InitConfig) -> Iterator[dict[str, Provider]]:
    """Prefix of our keys -> what reads them."""
    opened: list[WeightFolder] = []
    found: dict[str, Provider] = {}
    try:
        # Those beside the first come first: their keys begin as its keys do.
        for number, folder in reversed(list(enumerate(init.encoders))):
            prefix = f"vision.beside_{number - 1}." if number else "vision."
            encoder = encoder_folder(folder)
            opened.append(WeightFolder(folder, encoder.disk_name))
            found[prefix] = hf_provider(opened[-1], prefixed(encoder.links, prefix, ""))
        whole = init.from_hf or init.language_from_hf
        if whole is not None:
            theirs = config_from_hf(whole)
            opened.append(open_weights(whole, theirs))
            read = hf_provider(opened[-1], links_of(theirs, whole))
            found |= dict.fromkeys(_MODULES if init.from_hf is not None and not theirs.text_only else ("language.",), read)
        yield found
    finally:
        for weights in opened:
            weights.close()


def links_of(model: ModelConfig, folder: str | Path | None = None) -> list[Link]:
    """Every weight of the model by its family's names, or those that `folder` has. A tied head, which some folders hold again, is an alias
    of the embedding."""
    kind = _family_of_weights(folder, model)
    links = kind.links(model)
    if not model.language.tie_embeddings:
        return links
    heads = head_names(kind, model)
    return [replace(link, aliases=(*link.aliases, *heads)) if link.key == EMBEDDING else link for link in links]


def open_weights(folder: str | Path, model: ModelConfig) -> WeightFolder:
    """The folder's weights, by the names of the model's family, or of a layout that is read as that family."""
    return WeightFolder(folder, _family_of_weights(folder, model).disk_name)


def _family_of_weights(folder: str | Path | None, model: ModelConfig) -> Family:
    kind = family_of_folder(folder) if folder is not None and (Path(folder) / CONFIG).is_file() else None
    return kind if kind is not None and kind.becomes == model.family else family(model.family)


def hf_provider(weights: WeightFolder, links: Collection[Link]) -> Provider:
    """(checkpoint key, shape, slice) -> that slice, read when asked for. The folder is checked against `links` at once.

    Raises:
        HuggingFaceError: weights are missing, unknown or of another shape; every one is named.
    """
    table = {link.key: link for link in links}
    check_weights(weights, links)

    def provide(key: str, shape: tuple[int, ...], where: Where) -> torch.Tensor:
        if key not in table:
            raise HuggingFaceError(f"the model has a weight {key} that no Hugging Face weight belongs to: check the recipe's model block")
        link = table[key]
        if link.shape != shape and not (is_vocabulary(key) and link.shape[1:] == shape[1:]):
            raise HuggingFaceError(f"{key} has shape {shape}, the folder's weights make {link.shape}: check the recipe's model block")
        return to_ours(link, weights.rows, where)

    return provide


def check_weights(weights: WeightFolder, links: Collection[Link]) -> None:
    """Every weight must be there, in its shape, and no other. Raises HuggingFaceError naming those that are not."""
    wanted = {part.name: part.shape for link in links for part in link.parts}
    found = weights.names
    for link in links:
        for alias in link.aliases:
            # Some exporters store a tied weight again; it must then be the same.
            if alias in found:
                if not torch.equal(weights.tensor(alias), weights.tensor(link.names[0])):
                    raise HuggingFaceError(f"{weights.folder}: {alias} differs from {link.names[0]}, though the config ties them")
                found.discard(alias)
    missing, unknown = sorted(wanted.keys() - found), sorted(found - wanted.keys())
    problems = [f"lacks {some(missing)}"] * bool(missing) + [f"holds unknown weights {some(unknown)}"] * bool(unknown)
    if problems:
        raise HuggingFaceError(f"{weights.folder} " + " and ".join(problems) + ": its weights are not those that its config describes")
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise HuggingFaceError(f"{weights.folder}: {name} has shape {weights.shape(name)}, its config makes it {shape}")
