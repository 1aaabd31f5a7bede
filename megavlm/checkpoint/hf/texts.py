"""What a Hugging Face folder holds besides weights: tokenizer, chat template, processor, generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import ids_of
from megavlm.checkpoint.hf.families.base import Family, TokenIds
from megavlm.checkpoint.hf.reading import CONFIG, hf_config, read_json
from megavlm.checkpoint.hf.registry import family, family_of_folder
from megavlm.config.schema import ImageConfig, ModelConfig, Recipe
from megavlm.data.chat import TEMPLATES, Chat
from megavlm.data.instructions import FOLDER as INSTRUCTIONS
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.token_files import read_text

KEPT = "from_hf"
"""Subfolder of an imported checkpoint, or of a run that began with one, with the texts of the Hugging Face folder it came from."""
GENERATION = "generation_config.json"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt"),
)
_COPIED = (
    *_TOKENIZER,
    *("chat_template.jinja", "chat_template.json", GENERATION),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
_TOKENS = "token_ids.json"


@dataclass(frozen=True)
class Texts:
    """Everything of an export but the weights: what is kept of the folder that the model came from, and what is written anew."""

    model: ModelConfig
    chat: Chat | None
    """None: everything is kept."""
    image: ImageConfig
    ids: TokenIds
    kept: Path | None = None
    keeps_tokenizer: bool = False
    keeps_template: bool = False
    keeps_processor: bool = False
    instructions: Path | None = None
    """Folder of the tokenizer of a projector that reads text."""

    @classmethod
    def given(cls, model: ModelConfig, chat: Chat | None, image: ImageConfig | None, kept: Path | None = None) -> Texts | None:
        """Those of a tokenizer and chat template that were given; None without them."""
        return None if chat is None else cls(model, chat, image or ImageConfig(), token_ids(chat, model), kept)

    @classmethod
    def of_checkpoint(cls, checkpoint: Path, model: ModelConfig, chat: Chat | None, image: ImageConfig | None) -> Texts | None:
        """What is given, else what the run's recipe says, else what an import kept; None when there is none of them."""
        found, recipe = cls._of_checkpoint(checkpoint, model, chat, image), _recipe_of(checkpoint)
        if found is None:
            return None
        kept = found.kept / INSTRUCTIONS if found.kept is not None and (found.kept / INSTRUCTIONS).is_dir() else None
        given = recipe.data.instruction_tokenizer if recipe is not None else None
        return replace(found, instructions=kept if given is None else Path(given))

    @classmethod
    def _of_checkpoint(cls, checkpoint: Path, model: ModelConfig, chat: Chat | None, image: ImageConfig | None) -> Texts | None:
        recipe = _recipe_of(checkpoint)
        places = [checkpoint / KEPT, checkpoint.parent.parent / KEPT if recipe is not None else checkpoint / KEPT]
        kept = next((place for place in places if (place / _TOKENS).is_file()), None)
        if chat is not None:
            return cls.given(model, chat, image or (recipe.data.image if recipe is not None else None), kept)
        if recipe is None:
            if kept is None:
                return None
            chosen = image or ImageConfig()
            return cls(model, None, chosen, _kept_ids(kept), kept, True, True, keeps_processor=image is None)
        from megavlm.data.tokenizer import load_tokenizer

        data = recipe.data
        image = image or data.image
        chat = Chat(data.chat_template, load_tokenizer(data.tokenizer, data.image_token))
        if kept is None or recipe.init.from_hf is None or data.tokenizer != recipe.init.from_hf:
            return cls.given(model, chat, image, kept)
        kind = family(model.family)
        same_image = model.text_only or image == _image_of(kind, kept, model)
        same_template = data.chat_template == template_of(kept)
        return cls(model, chat, image, _kept_ids(kept), kept, True, same_template, keeps_processor=same_image)

    @property
    def base_config(self) -> dict[str, Any] | None:
        """The config.json of the folder that the model came from."""
        return read_json(self.kept / CONFIG) if self.kept is not None and (self.kept / CONFIG).is_file() else None

    def check(self) -> None:
        """Raise HuggingFaceError when the family's processor cannot make of a picture what training made of it."""
        if self.keeps_processor:
            return
        qformer = self.model.projector.qformer
        if qformer is not None and qformer.instruction is not None and self.instructions is None:
            raise HuggingFaceError(
                "the projector reads text, and its tokenizer is not known: give data.instruction_tokenizer in the recipe, or import a "
                f"folder with {INSTRUCTIONS}/"
            )
        check_pictures(self.model, self.image)
        self._processor()

    def write(self, folder: Path) -> None:
        """Tokenizer, chat template, processor and generation config."""
        if self.keeps_tokenizer:
            assert self.kept is not None
            copy_texts(self.kept, folder)
            if not (folder / GENERATION).is_file():
                _write(folder / GENERATION, {k: v for k, v in self.ids.special().items() if v is not None})
        if self.chat is not None and not self.keeps_template:
            if self.keeps_tokenizer:
                (folder / "chat_template.json").unlink(missing_ok=True)
                (folder / "chat_template.jinja").write_text(self.chat.jinja(), encoding="utf-8")
            else:
                self.chat.tokenizer.save_hf(folder, self.chat.jinja())
                self._name_tokens(folder / "tokenizer_config.json")
            _write(folder / GENERATION, generation_config(self.chat))
        if self.instructions is not None:
            (folder / INSTRUCTIONS).mkdir(exist_ok=True)
            _copy(_TOKENIZER, self.instructions, folder / INSTRUCTIONS)
        if not self.keeps_processor:
            for name, content in self._processor().items():
                _write(folder / name, content)

    def _name_tokens(self, file: Path) -> None:
        """The tokens that the family's processor looks up in the tokenizer."""
        if fields := family(self.model.family).tokenizer_fields:
            config = read_json(file)
            named = config.get("extra_special_tokens")
            _write(file, config | {"extra_special_tokens": (named if isinstance(named, dict) else {}) | dict(fields)})

    def picture_config(self) -> dict[str, Any]:
        """Fields of config.json that say how pictures are cut; {} where the processor is kept, and config.json's with it."""
        return {} if self.keeps_processor or self.model.text_only else family(self.model.family).picture_config(self.model, self.image)

    def _processor(self) -> dict[str, dict[str, Any]]:
        if self.chat is None:  # an imported model whose pictures are to be cut in another way
            raise HuggingFaceError("another data.image than the imported processor's needs a tokenizer too: give both")
        return family(self.model.family).processor_files(self.model, self.image, self.chat.tokenizer)


def _recipe_of(checkpoint: Path) -> Recipe | None:
    """The recipe that lies beside a run's checkpoints; None outside a run."""
    recipe_file = checkpoint.parent.parent / "recipe.yaml"
    if checkpoint.parent.name != folders.CHECKPOINTS or not recipe_file.is_file():
        return None
    from megavlm.config.load import load_recipe

    return load_recipe(recipe_file)


def token_ids(chat: Chat, model: ModelConfig) -> TokenIds:
    """Ids that the config names, from the tokenizer.

    Raises:
        HuggingFaceError: the tokenizer has more tokens than the model has embeddings, or lacks one that the family's config names.
    """
    tokenizer, kind = chat.tokenizer, family(model.family)
    rows = tokenizer.num_rows(text_only=model.text_only)
    if rows > model.language.num_tokens:
        raise HuggingFaceError(
            f"the tokenizer has {rows} tokens, but model.language.vocab_size is {model.language.vocab_size}: "
            "it is not the tokenizer that this model was trained with"
        )
    needed = [*kind.token_fields.values(), *kind.tokenizer_fields.values()]
    lacking = [text for text in needed if text not in tokenizer.special_ids]
    if lacking:
        raise HuggingFaceError(f"{kind.hf_class} needs the special tokens {', '.join(lacking)}, which the tokenizer lacks")
    return TokenIds(
        image=None if model.text_only else tokenizer.image_token_id,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        pad=tokenizer.pad_id,
        more={field: tokenizer.special_ids[text] for field, text in kind.token_fields.items()},
    )


def _kept_ids(kept: Path) -> TokenIds:
    return TokenIds(**read_json(kept / _TOKENS))


def generation_config(chat: Chat) -> dict[str, Any]:
    """Greedy, until one of the template's end tokens."""
    generation: dict[str, Any] = {"eos_token_id": chat.stop_ids, "pad_token_id": chat.tokenizer.pad_id, "do_sample": False}
    if chat.tokenizer.bos_id is not None:
        generation["bos_token_id"] = chat.tokenizer.bos_id
    return generation


def template_of(folder: Path) -> str | None:
    """What data.chat_template says of a folder: a name of ours that renders as its own template does, else "tokenizer".

    A folder without a template has its family's; None: neither.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        text = read_text(file).strip()
        tokens = {IMAGE_TOKEN, (image_token_of(folder) if (folder / CONFIG).is_file() else None) or IMAGE_TOKEN}
        ours = ((name, template.jinja(token)) for name, template in TEMPLATES.items() for token in tokens)
        return next((name for name, template in ours if text == template.strip()), "tokenizer")
    others = [folder / "chat_template.json", folder / "tokenizer_config.json"]
    if any(f.is_file() and read_json(f).get("chat_template") for f in others):
        return "tokenizer"
    return family_of_folder(folder).chat_template if (folder / CONFIG).is_file() else None


def image_token_of(folder: Path) -> str | None:
    """Text of the token that the folder's config names as the image's; None where its tokenizer has none of that id."""
    number = read_json(folder / CONFIG).get(family_of_folder(folder).image_token_field)
    if number is None or not (folder / "tokenizer.json").is_file():
        return None
    added = read_json(folder / "tokenizer.json").get("added_tokens", [])
    return next((token["content"] for token in added if token["id"] == number), None)


def instructions_of(folder: Path) -> str | None:
    """The folder of a projector's own tokenizer inside a Hugging Face folder; None where there is none."""
    return str(folder / INSTRUCTIONS) if (folder / INSTRUCTIONS / "tokenizer.json").is_file() else None


def _image_of(kind: Family, kept: Path, model: ModelConfig) -> ImageConfig | None:
    """What the kept processor makes of pictures; None where that is nothing that can be trained here."""
    try:
        image = kind.image_from_hf(kept, model)
    except HuggingFaceError:
        return None
    return image.model_copy(update={"marks": kind.marks(image)})


def check_pictures(model: ModelConfig, image: ImageConfig) -> None:
    """Can the family's processor make of a picture what training made of it? Raises HuggingFaceError when it cannot."""
    if model.text_only:
        return
    kind = family(model.family)
    kind.check_pictures(model, image)
    if image.marks != kind.marks(image):
        raise HuggingFaceError(
            f"the model was trained with data.image.marks={image.marks.model_dump(exclude_defaults=True)}, but Hugging Face's "
            f"{kind.processor_class} writes {kind.marks(image).model_dump(exclude_defaults=True)}: train with these"
        )


def keep_texts(source: Path, kept: Path) -> None:
    """Keep an imported folder's config, tokenizer, processor and token ids beside its checkpoint, for a lossless export."""
    config, kind = hf_config(read_json(source / CONFIG)), family_of_folder(source)
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / CONFIG, kept / CONFIG)
    _write(kept / _TOKENS, asdict(ids_of(config, kind)))
    copy_texts(source, kept)


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the files that are there; a folder without tokenizer stays one."""
    _copy(_COPIED, source, folder)
    if (source / INSTRUCTIONS).is_dir():
        (folder / INSTRUCTIONS).mkdir(exist_ok=True)
        _copy(_TOKENIZER, source / INSTRUCTIONS, folder / INSTRUCTIONS)


def _copy(names: Sequence[str], source: Path, folder: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
