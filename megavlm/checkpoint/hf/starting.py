"""What a recipe that starts from Hugging Face folders (its `init` block) leaves unsaid: model, tokenizer, chat template, pictures."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf, image_config_from_hf, network
from megavlm.checkpoint.hf.encoders.folder import encoder_folder
from megavlm.checkpoint.hf.processors import image_fit, processor_block
from megavlm.checkpoint.hf.reading import CONFIG, read_json
from megavlm.checkpoint.hf.registry import family_of_folder
from megavlm.checkpoint.hf.texts import template_of
from megavlm.config.schema import InitConfig, ModelConfig
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.tokenizer import load_tokenizer

_GROWS = "language.vocab_size"
"""The one thing that a recipe may have more of: rows of new tokens are drawn."""


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values, with what its `init` folders say where the recipe says nothing.

    Values that are no recipe come back as they are: checking them is the schema's business.

    Raises:
        HuggingFaceError: a folder is missing or of no known family, or the recipe says otherwise than it; every such field is named.
    """
    values = copy.deepcopy(values)
    given, data = values.get("model") or {}, values.get("data") or {}
    try:
        init = InitConfig.model_validate(values.get("init") or {})
    except ValidationError:
        return values
    if not init.folders or not isinstance(given, dict) or not isinstance(data, dict):
        return values
    missing = [folder for folder in init.folders if not Path(folder).is_dir()]
    if missing:
        raise HuggingFaceError(f"init names {', '.join(missing)}: there is no such folder")
    found = _whole(Path(init.from_hf)) if init.from_hf is not None else _assembled(init, given)
    defaults = _data_defaults(init)
    if "image" in data:
        defaults.pop("image", None)
    data = data | {name: value for name, value in defaults.items() if not data.get(name)}
    merged = _merged(found, given)
    # Before the comparison: the block must be valid, and where it is not, the schema says so best.
    try:
        ours, theirs = (ModelConfig.model_validate_json(json.dumps(block)) for block in (merged, found))
    except ValidationError:
        return values | {"model": merged, "data": data}
    _check_agreement(ours, theirs, init)
    if "language" in found and data.get("tokenizer") and "vocab_size" not in (given.get("language") or {}):
        tokens = load_tokenizer(data["tokenizer"], data.get("image_token") or IMAGE_TOKEN).num_rows(text_only=ours.text_only)
        if tokens > ours.language.num_tokens:
            merged["language"]["vocab_size"] = tokens
    return values | {"model": merged, "data": data}


def _whole(folder: Path) -> dict[str, Any]:
    return config_from_hf(folder).model_dump(mode="json", exclude={"init_std"})


def _assembled(init: InitConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Blocks of the two folders; the projector is the recipe's."""
    found: dict[str, Any] = {}
    if init.vision_from_hf is not None:
        found["vision"] = dict(encoder_folder(init.vision_from_hf).fields)
        if given.get("text_only"):
            raise HuggingFaceError("init.vision_from_hf brings an encoder, and model.text_only=true wants none: leave one of them out")
    if init.language_from_hf is not None:
        model = config_from_hf(init.language_from_hf)
        if not model.text_only:
            raise HuggingFaceError(
                f"init.language_from_hf={init.language_from_hf} is a whole {model.family}, not a language model alone: use init.from_hf"
            )
        found["language"] = model.language.model_dump(mode="json")
        if given.get("text_only"):
            found |= {"family": model.family, "text_only": True}
    return found


def _data_defaults(init: InitConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    texts = init.from_hf or init.language_from_hf
    if texts is not None and (Path(texts) / "tokenizer.json").is_file():
        found |= {"tokenizer": texts, "chat_template": template_of(Path(texts))}
    if init.from_hf is not None and not config_from_hf(init.from_hf).text_only:
        found |= {"image": image_config_from_hf(init.from_hf).model_dump(mode="json"), "image_token": image_token_of(Path(init.from_hf))}
    if init.vision_from_hf is not None:
        block, file = processor_block(Path(init.vision_from_hf))
        # A processor for another use of the encoder says nothing: how pictures become tiles is then data.image's default.
        with contextlib.suppress(HuggingFaceError):
            found |= {"image": {"fit": image_fit(block, file)}} if "size" in block else {}
    return {name: value for name, value in found.items() if value is not None}


def image_token_of(folder: Path) -> str | None:
    """Text of the token that the folder's config names as the image's; None where its tokenizer has none of that id."""
    number = read_json(folder / CONFIG).get(family_of_folder(folder).image_token_field)
    if number is None or not (folder / "tokenizer.json").is_file():
        return None
    added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    return next((token["content"] for token in added if token["id"] == number), None)


def _check_agreement(ours: ModelConfig, theirs: ModelConfig, init: InitConfig) -> None:
    """Every field of the recipe that a folder determines must be as the folder has it."""
    here, there = network(ours), network(theirs)
    wanted = {"vision.": init.vision_from_hf, "language.": init.language_from_hf}
    blocks = ("",) if init.from_hf is not None else tuple(block for block, folder in wanted.items() if folder is not None)
    choices = set() if init.from_hf is not None else _CHOICES
    wrong = [
        f"model.{name}={here.get(name)!r} (the folder has {there.get(name)!r})"
        for name in here | there
        if name.startswith(blocks) and name not in choices and here.get(name) != there.get(name) and not _is_growth(name, here, there)
    ]
    if init.from_hf is not None and ours.family != theirs.family:
        wrong.append(f"model.family={ours.family!r} (the folder has {theirs.family!r})")
    if wrong:
        raise HuggingFaceError(f"the recipe's model is not that of {' and '.join(init.folders)}: " + "; ".join(wrong))


_CHOICES = {f"vision.{name}" for name in ("feature_layer", "final_norm", "keep_class_token", "pooled", "image_mean", "image_std")}
"""What an encoder's folder leaves to whoever uses it."""


def _is_growth(name: str, here: dict[str, Any], there: dict[str, Any]) -> bool:
    return name == _GROWS and here[name] > there[name]


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        merged[name] = _merged(merged[name], value) if isinstance(value, dict) and isinstance(merged.get(name), dict) else value
    return merged
