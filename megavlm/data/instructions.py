"""The text that a projector reads with a picture, in a vocabulary of its own: InstructBLIP's Q-Former."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from megavlm.config.schema import DataConfig, ModelConfig
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.sentencepiece_export import TokenizerError
from megavlm.data.token_files import read_tokenizer

FOLDER = "qformer_tokenizer"
"""Where a Hugging Face folder keeps that tokenizer."""


class InstructionTokenizer:
    """Messages -> ids of the instruction of each picture: the text of the message that the picture stands in, pictures left out.

    That is what InstructBlipProcessor gives to the Q-Former (transformers 5.23, models/instructblip), special tokens included. Longer
    texts than `max_positions` are cut. Thread-safe.

    Raises:
        TokenizerError: the folder has no tokenizer.json, or its ids exceed `vocab_size`.
    """

    def __init__(self, folder: str | Path, vocab_size: int, max_positions: int) -> None:
        self._tok = read_tokenizer(Path(folder), "data.instruction_tokenizer takes")
        self._tok.no_padding()
        self._tok.enable_truncation(max_positions)
        highest = max(self._tok.get_vocab(with_added_tokens=True).values())
        if highest >= vocab_size:
            raise TokenizerError(f"{folder} has ids up to {highest}, model.projector.qformer.instruction.vocab_size is {vocab_size}")

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """Ids for each picture, in order."""
        found: list[list[int]] = []
        for message in messages:
            if pictures := message["content"].count(IMAGE_TOKEN):
                ids = list(self._tok.encode(message["content"].replace(IMAGE_TOKEN, "").strip()).ids)
                found += [ids] * pictures
        return found


def instruction_tokenizer(data: DataConfig, model: ModelConfig) -> InstructionTokenizer | None:
    """The recipe's; None where the projector reads no text. Raises TokenizerError when there is none, or it does not fit the model."""
    words = model.projector.qformer.instruction if model.projector.qformer is not None else None
    if words is None:
        return None
    if data.instruction_tokenizer is None:
        raise TokenizerError(
            "model.projector.qformer.instruction reads text in a vocabulary of its own, and data.instruction_tokenizer is not given "
            f"(a Hugging Face folder keeps it in {FOLDER}/)"
        )
    return _opened(data.instruction_tokenizer, words.vocab_size, words.max_positions)


_opened = lru_cache(maxsize=4)(InstructionTokenizer)
