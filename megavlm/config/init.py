"""The recipe's `init` block: what a run starts from."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator, model_validator

from megavlm.config.blocks import Block


class InitConfig(Block):
    """Hugging Face folders whose weights a run starts from; nothing given: all of it is drawn from run.seed.

    `model`, data.tokenizer, data.chat_template, data.image_token and data.image then need not be given: they are the folder's. What is
    given must agree with it, but for model.language.vocab_size, which may be larger (rows of new tokens are drawn from run.seed), and for
    choices of training: model.language.moe.aux_loss, and model.language.max_positions where no weight or rotary frequency hangs on it.
    """

    from_hf: str | None = None
    """A folder of a whole model: a vision-language model, or a language model alone."""
    vision_from_hf: str | list[str] | None = None
    """A folder with an encoder (alone, or in a CLIP or SigLIP): model.vision is its, and the projector is drawn from run.seed. A list: that
    of model.vision, then those of model.vision_beside."""
    language_from_hf: str | None = None
    """A folder of a language model: model.language is its."""

    @property
    def folders(self) -> list[str]:
        """Those that are given."""
        return [folder for folder in (self.from_hf, *self.encoders, self.language_from_hf) if folder is not None]

    @property
    def encoders(self) -> list[str]:
        """Folders of encoders."""
        found = self.vision_from_hf if self.vision_from_hf is not None else []
        return [found] if isinstance(found, str) else found

    @model_validator(mode="after")
    def _check(self) -> InitConfig:
        if self.from_hf is not None and len(self.folders) > 1:
            raise ValueError("from_hf is a whole model: give it alone, or vision_from_hf and language_from_hf without it")
        for name in ("from_hf", "vision_from_hf", "language_from_hf"):
            value = getattr(self, name)
            if value == [] or any(not folder.strip() for folder in ([value] if isinstance(value, str) else value or [])):
                raise ValueError(f"{name}={value!r} is empty, or holds an empty entry: give a folder, or null")
        return self

    @field_validator("from_hf", "vision_from_hf", "language_from_hf")
    @classmethod
    def _home(cls, value: str | list[str] | None) -> str | list[str] | None:
        """`~` is the home folder, as in a shell."""
        if isinstance(value, list):
            return [_expanded(folder) for folder in value]
        return value if value is None else _expanded(value)


def _expanded(folder: str) -> str:
    return str(Path(folder).expanduser()) if folder.startswith("~") else folder
