"""Hugging Face `config.json` <-> ModelConfig, by way of the family, refusing by name what the model here would compute differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import TokenIds
from megavlm.checkpoint.hf.holding import which_holds
from megavlm.checkpoint.hf.language import canonical
from megavlm.checkpoint.hf.processors import pixel_statistics
from megavlm.checkpoint.hf.reading import CONFIG, Problems, hf_config, quiet_transformers, read_json
from megavlm.checkpoint.hf.registry import family, family_of_folder
from megavlm.config.schema import ImageConfig, ModelConfig

__all__ = ["config_from_hf", "config_to_hf", "image_config_from_hf", "network", "quiet_transformers"]

_NOT_THE_NETWORK = {"family", "init_std"}
_NOT_KEPT = {"transformers_version", "dtype", "torch_dtype", "auto_map", "_name_or_path", "_attn_implementation"}


def config_from_hf(folder: str | Path) -> ModelConfig:
    """The model block of a recipe for this folder; pixel mean and std come from its processor when it has one.

    Raises:
        HuggingFaceError: a folder of no known family, or a setting that the model here does not have, named with its value.
    """
    folder = Path(folder)
    kind, config = family_of_folder(folder), hf_config(read_json(folder / CONFIG))
    problems = Problems()
    try:
        model = kind.model_from_hf(config, problems)
    except ValueError as error:
        problems.check(folder / CONFIG)
        raise HuggingFaceError(f"{folder / CONFIG}: {error}") from error
    problems.check(folder / CONFIG)
    if not model.text_only:
        mean, std = pixel_statistics(folder) or kind.statistics(config)
        model.vision = model.vision.model_copy(update={"image_mean": mean, "image_std": std})
    return model


def config_to_hf(model: ModelConfig, ids: TokenIds, *, dtype: str = "float32", base: dict[str, Any] | None = None) -> dict[str, Any]:
    """`config.json` of the family's class. `dtype` is torch's name of the weights' format.

    `base` is the config.json that an imported model came with: what we do not know of it, and need not, is kept.

    Raises:
        HuggingFaceError: the model has a part that the class lacks, or the image token lies outside the vocabulary.
    """
    if ids.image is not None and not 0 <= ids.image < model.language.num_tokens:
        raise HuggingFaceError(f"the image token's id {ids.image} lies outside the {model.language.num_tokens} tokens of model.language")
    kind = family(model.family)
    values = kind.config_to_hf(model, ids)
    if base is not None and kind.handles(base):
        values = _overlaid(hf_config(base).to_dict(), values)
    values["dtype"] = dtype

    def back(_: str) -> dict[str, Any]:
        problems = Problems()
        read = kind.model_from_hf(hf_config(values), problems)
        problems.check("the model block")
        if not read.text_only:
            read.vision = read.vision.model_copy(update={"image_mean": model.vision.image_mean, "image_std": model.vision.image_std})
        return network(read)

    which_holds("model", network(model), {kind.hf_class: kind.hf_class}, back)
    return values


def _overlaid(base: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Ours wherever we have a value; the blocks of encoder and language model one by one."""
    kept = {name: value for name, value in base.items() if name not in _NOT_KEPT}
    nested = {
        name: _overlaid(kept[name], value)
        for name, value in ours.items()
        if name.endswith("_config") and isinstance(value, dict) and isinstance(kept.get(name), dict)
    }
    return kept | ours | nested


def image_config_from_hf(folder: str | Path) -> ImageConfig:
    """What the folder's processor does to a picture and writes round it, as a data.image block. Raises HuggingFaceError."""
    kind = family_of_folder(folder)
    image = kind.image_from_hf(Path(folder), config_from_hf(folder))
    return image.model_copy(update={"marks": kind.marks(image)})


def network(model: ModelConfig) -> dict[str, Any]:
    """Field -> value of everything that shapes the network, following values written out."""
    projector = model.projector.model_dump()
    if projector.get("num_layers") != 1 and projector.get("hidden_size") is None:
        projector["hidden_size"] = model.language.hidden_size
    blocks = {"language": canonical(model.language)}
    if not model.text_only:
        vision = model.vision.model_dump()
        if not model.vision.num_position_rows:
            del vision["image_size_px"]  # without a table of positions it shapes nothing
        blocks |= {"vision": vision, "projector": projector}
    top = model.model_dump(exclude=_NOT_THE_NETWORK | {"vision", "projector", "language"})
    return top | {f"{block}.{name}": value for block, values in blocks.items() for name, value in values.items()}
