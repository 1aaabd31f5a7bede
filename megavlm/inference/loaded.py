"""A model with all that is needed to talk to it: the Python side of `megavlm generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megavlm.config.schema import Recipe
from megavlm.data.chat import Chat
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer
from megavlm.inference.generate import OnToken, generate
from megavlm.inference.prompts import Picture, make_prompt, question
from megavlm.inference.stop import StopStrings
from megavlm.models.vlm import VisionLanguageModel

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}; "<image>" in a user's text places a picture."""


@dataclass(frozen=True)
class LoadedModel:
    """What `load_for_inference` returns. `ask` answers one question; the other methods are its steps."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    chat: Chat
    recipe: Recipe
    """Of the run; for a Hugging Face folder it says how the model and its data are read, and has no stages."""
    repetition_penalty: float = 1.0
    """Of `generate` when none is asked for: a Hugging Face folder's own."""

    def __iter__(self) -> Iterator[Any]:
        """(model, tokenizer, chat, recipe)."""
        return iter((self.model, self.tokenizer, self.chat, self.recipe))

    def _replace(self, **fields: Any) -> LoadedModel:
        """The same with other fields, by the name that tuples with named fields have for it."""
        return replace(self, **fields)

    def ask(self, text: str, pictures: Sequence[Picture] = (), *, stop_strings: Sequence[str] = (), **options: int | float | None) -> str:
        """The answer to one question about pictures. `options` are those of `generate`."""
        stop = StopStrings(stop_strings, self.text)
        answers = self.generate([self.prompt(text, pictures)], stop=stop, **options)  # type: ignore[arg-type]
        return stop.cut(self.text(answers[0]))

    def prompt(self, text: str, pictures: Sequence[Picture] = ()) -> Prompt:
        """One question about pictures, as a prompt. Raises ChatError and ImageError as `make_prompt`."""
        return self.conversation(question(text, len(pictures)), pictures)

    def conversation(self, messages: Sequence[Message], pictures: Sequence[Picture] = ()) -> Prompt:
        """A conversation so far, with its pictures in order, as a prompt for the next answer."""
        return make_prompt(messages, pictures, chat=self.chat, data=self.recipe.data, model=self.recipe.model)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        first_number: int = 0,
        repetition_penalty: float | None = None,
        stop: StopStrings | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """`megavlm.inference.generate` with this model's stop tokens and, where none is given, penalty; all prompts in one batch."""
        return generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.chat.stop_ids,
            image_token_id=-1 if self.recipe.model.text_only else self.tokenizer.image_token_id,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            first_number=first_number,
            repetition_penalty=self.repetition_penalty if repetition_penalty is None else repetition_penalty,
            is_over=stop.is_over if stop is not None else None,
            on_token=on_token,
        )

    def text(self, ids: Sequence[int]) -> str:
        """Answer as text, without the token that ended it; any other special token is written out."""
        ended = bool(ids) and ids[-1] in self.chat.stop_ids
        return self.tokenizer.decode(ids[:-1] if ended else ids)
