"""Hugging Face `config.json` <-> ModelConfig, by way of the family, refusing by name what the model here would compute differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import Family, TokenIds
from megavlm.checkpoint.hf.holding import which_holds
from megavlm.checkpoint.hf.language import canonical
from megavlm.checkpoint.hf.processors import pixel_statistics
from megavlm.checkpoint.hf.reading import CONFIG, Problems, hf_config, quiet_transformers, read_json
from megavlm.checkpoint.hf.registry import family, family_of_folder
from megavlm.checkpoint.hf.tied import as_stored
from megavlm.config.schema import ImageConfig, ModelConfig

__all__ = ["config_from_hf", "config_to_hf", "image_config_from_hf", "network", "quiet_transformers"]

_NOT_THE_NETWORK = {"family", "init_std"}
_QUANTISED = "quantization_config"
_NOT_KEPT = {_QUANTISED, "transformers_version", "dtype", "torch_dtype", "auto_map", "_name_or_path", "_attn_implementation"}
_TRAINING = {"router_aux_loss_coef", "output_router_logits"}
"""Say nothing of the network: what a recipe chose to train with leaves an imported model's alone."""
_NAMES_CLASS = {"architectures", "model_type"}


def config_from_hf(folder: str | Path) -> ModelConfig:
    """The model block of a recipe for this folder; pixel mean and std come from its processor when it has one.

    Raises:
        HuggingFaceError: a folder of no known family, or a setting that the model here does not have, named with its value.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    _check_number_format(folder / CONFIG, values)
    kind, config = family_of_folder(folder), hf_config(values)
    problems = Problems()
    try:
        model = kind.model_from_hf(config, problems)
    except ValueError as error:
        problems.check(folder / CONFIG)
        raise HuggingFaceError(f"{folder / CONFIG}: {_told(error)}") from error
    problems.check(folder / CONFIG)
    model = as_stored(folder, kind, model)
    if not model.text_only:
        mean, std = pixel_statistics(folder) or kind.statistics(config)
        model.vision = model.vision.model_copy(update={"image_mean": mean, "image_std": std})
    return model


def _told(error: ValueError) -> str:
    """What a block of the recipe refuses, each with its place, instead of pydantic's page."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(".".join(map(str, e["loc"])) + (": " if e["loc"] else "") + e["msg"] for e in error.errors())


def _check_number_format(file: Path, values: dict[str, Any]) -> None:
    """Raise HuggingFaceError for a folder of quantised weights, whatever library made them."""
    for block in ("", *(name for name, value in values.items() if isinstance(value, dict))):
        found = (values[block] if block else values).get(_QUANTISED)
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
            where = f"{block}.{_QUANTISED}" if block else _QUANTISED
            raise HuggingFaceError(
                f"{file} has {where} with quant_method={method!r}: quantised weights (bitsandbytes, GPTQ, AWQ, FP8) are not read here; "
                "dequantise them first (transformers' `dequantize` and `save_pretrained`), or take the folder that they were made from"
            )


def config_to_hf(model: ModelConfig, ids: TokenIds, *, dtype: str = "float32", base: dict[str, Any] | None = None) -> dict[str, Any]:
    """`config.json` of the family's class. `dtype` is torch's name of the weights' format.

    `base` is the config.json that an imported model came with: a field is written anew only where the model or its tokens were changed.

    Raises:
        HuggingFaceError: the model has a part that the class lacks, or the image token lies outside the vocabulary.
    """
    if ids.image is not None and not 0 <= ids.image < model.language.num_tokens:
        raise HuggingFaceError(f"the image token's id {ids.image} lies outside the {model.language.num_tokens} tokens of model.language")
    kind = family(model.family)
    values = kind.config_to_hf(model, ids)
    if base is not None and kind.handles(base):
        came = hf_config(base)
        unchanged = kind.config_to_hf(_read_again(kind, base, model), ids_of(came, kind))
        values = _changed(_without_clutter(came.to_dict(), base), unchanged, values)
    values |= {"dtype": dtype, "transformers_version": quiet_transformers().__version__}
    which_holds("model", network(model), {kind.hf_class: kind.hf_class}, lambda _: network(_read_again(kind, values, model)))
    return values


def _read_again(kind: Family, values: dict[str, Any], model: ModelConfig) -> ModelConfig:
    """A config's block, with what only the processor's file says as `model` has it."""
    problems = Problems()
    read = kind.model_from_hf(hf_config(values), problems)
    problems.check("the model block")
    if not read.text_only:
        read.vision = read.vision.model_copy(update={"image_mean": model.vision.image_mean, "image_std": model.vision.image_std})
    return read


def _without_clutter(read: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """What transformers reads of a config.json, without the defaults of every config class that the file does not write out."""
    clutter = quiet_transformers().PretrainedConfig().to_dict()
    kept = {name: value for name, value in read.items() if name in stored or name not in clutter or value != clutter[name]}
    for name, value in stored.items():
        if isinstance(value, dict) and isinstance(kept.get(name), dict) and name.endswith("_config"):
            kept[name] = _without_clutter(kept[name], value)
        elif name in _NAMES_CLASS:
            kept[name] = value
    return kept


def _changed(base: dict[str, Any], unchanged: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`base`, and ours where it is not what we would write for `base` itself; the blocks of encoder and language model one by one."""
    kept = {name: value for name, value in base.items() if name not in _NOT_KEPT}
    for name, value in ours.items():
        if name in _TRAINING and name in kept:
            continue
        before = unchanged.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and isinstance(kept.get(name), dict) and name.endswith("_config"):
            kept[name] = _changed(kept[name], before, value)
        elif name in _NAMES_CLASS or name not in unchanged or before != value:
            kept[name] = value
    return kept


def ids_of(config: Any, kind: Family) -> TokenIds:
    """Token ids that transformers' config object names, in itself or in its language model's block."""
    text = getattr(config, "text_config", config)

    def named(field: str) -> Any:
        value = getattr(config, field, None)
        return value if value is not None else getattr(text, field, None)

    return TokenIds(
        image=getattr(config, kind.image_token_field, None),
        bos=named("bos_token_id"),
        eos=named("eos_token_id"),
        pad=named("pad_token_id"),
        more={field: named(field) for field in kind.token_fields},
    )


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
