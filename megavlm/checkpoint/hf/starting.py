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
from megavlm.checkpoint.hf.processors import image_fit, interpolation_of, processor_block
from megavlm.checkpoint.hf.texts import image_token_of, instructions_of, template_of
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
    defaults = _data_defaults(init, reads_pictures="image" not in data)
    data = data | {name: value for name, value in defaults.items() if not data.get(name)}
    if values.get("stages") and not data.get("tokenizer"):
        raise HuggingFaceError(_no_tokenizer(init))
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


def _no_tokenizer(init: InitConfig) -> str:
    name = "init.from_hf" if init.from_hf is not None else "init.language_from_hf"
    folder = init.from_hf or init.language_from_hf
    if folder is None:
        return f"init.vision_from_hf brings an encoder alone: {name} is missing (or data.tokenizer, and a model.language that is drawn)"
    return f"data.tokenizer is empty: {name}={folder} has no tokenizer.json; give a *.model file or another folder"


def _whole(folder: Path) -> dict[str, Any]:
    return config_from_hf(folder).model_dump(mode="json", exclude={"init_std"})


def _assembled(init: InitConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Blocks of the two folders; the projector is the recipe's."""
    found: dict[str, Any] = {}
    if init.encoders:
        first, *others = [dict(encoder_folder(folder).fields) for folder in init.encoders]
        found |= {"vision": first, "vision_beside": others}
        wanted = 1 + len(given.get("vision_beside") or [])
        if wanted not in (1, len(init.encoders)):
            raise HuggingFaceError(f"init.vision_from_hf names {len(init.encoders)} folders, and model has {wanted} encoders")
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


def _data_defaults(init: InitConfig, reads_pictures: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    texts = init.from_hf or init.language_from_hf
    if texts is not None and (Path(texts) / "tokenizer.json").is_file():
        found |= {"tokenizer": texts, "chat_template": template_of(Path(texts))}
    if init.from_hf is not None and not config_from_hf(init.from_hf).text_only:
        found |= {"image_token": image_token_of(Path(init.from_hf))}
        if reads_pictures:
            found |= {"image": image_config_from_hf(init.from_hf).model_dump(mode="json")}
        found |= {"instruction_tokenizer": instructions_of(Path(init.from_hf))}
    if init.vision_from_hf is not None and reads_pictures:
        block, file = processor_block(Path(init.encoders[0]))
        if "size" in block:
            found["image"] = {"interpolation": interpolation_of(block, file, "CLIPImageProcessor")}
            # A processor for another use of the encoder does not say how pictures become tiles: that is then data.image's default.
            with contextlib.suppress(HuggingFaceError):
                found["image"] |= {"fit": image_fit(block, file)}
    return {name: value for name, value in found.items() if value is not None}


def _check_agreement(ours: ModelConfig, theirs: ModelConfig, init: InitConfig) -> None:
    """Every field of the recipe that a folder determines must be as the folder has it."""
    here, there = _fields(ours), _fields(theirs)
    wanted = {"vision": init.vision_from_hf, "language.": init.language_from_hf}
    blocks = ("",) if init.from_hf is not None else tuple(block for block, folder in wanted.items() if folder is not None)
    differing = [name for name in here | there if name.startswith(blocks) and here.get(name) != there.get(name)]
    if init.from_hf is None:
        differing = [name for name in differing if not name.startswith("vision") or name.partition(".")[2] not in _CHOICES]
    wrong = [
        f"model.{name}={here.get(name)!r} (the folder has {there.get(name)!r})"
        for name in differing
        if name != _GROWS or here[name] < there[name]
    ]
    if init.from_hf is not None and ours.family != theirs.family:
        wrong.append(f"model.family={ours.family!r} (the folder has {theirs.family!r})")
    if wrong:
        raise HuggingFaceError(f"the recipe's model is not that of {' and '.join(init.folders)}: " + "; ".join(wrong))


def _fields(model: ModelConfig) -> dict[str, Any]:
    found = network(model)
    found.pop("vision_beside", None)
    if _reach_is_free(model):
        found.pop("language.max_positions")
    beside = enumerate(model.vision_beside)
    return found | {f"vision_beside[{i}].{name}": value for i, encoder in beside for name, value in encoder.model_dump().items()}


def _reach_is_free(model: ModelConfig) -> bool:
    """Is max_positions but a limit on prompts? Not where it is the size of a table, or rotary frequencies follow from it."""
    scaling = model.language.rope_scaling
    follows = scaling is not None and (
        scaling.kind == "dynamic" or (scaling.kind in ("yarn", "longrope") and not scaling.parameters.get("factor"))
    )
    return model.language.positions != "learned" and not follows


_CHOICES = {"feature_layer", "final_norm", "keep_class_token", "pooled", "image_mean", "image_std"}
"""What an encoder's folder leaves to whoever uses it."""


def _merged(base: Any, over: Any) -> Any:
    """`over` where it says something; lists of blocks element by element."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {name: _merged(base[name], value) if name in base else value for name, value in over.items()}
    if isinstance(base, list) and isinstance(over, list) and len(base) == len(over) and all(isinstance(b, dict) for b in base):
        return [_merged(b, o) for b, o in zip(base, over, strict=True)]
    return over
