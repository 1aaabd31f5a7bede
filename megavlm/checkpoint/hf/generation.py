"""What a folder's generation_config.json says of greedy answers, so that they are those of transformers' `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.reading import CONFIG, read_json

GENERATION = "generation_config.json"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1, 1.0),
    "stop_strings": ([],),
}
"""Settings that change greedy answers and that we do not have -> values that change nothing (beside none)."""
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generate` does when nobody says otherwise."""

    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer, beside the chat template's."""
    repetition_penalty: float = 1.0
    not_taken: tuple[str, ...] = ()
    """What the folder asks for and greedy answers here go without, as `name=value`."""


def generation_defaults(folder: Path) -> GenerationDefaults:
    """Of a Hugging Face folder; without a generation_config.json what config.json says of generation, as at transformers.

    Raises HuggingFaceError for end tokens or a penalty that are no numbers.
    """
    file = folder / GENERATION
    if file.is_file():
        values = read_json(file)
    else:
        file = folder / CONFIG
        config = read_json(file)
        text = config.get("text_config")
        values = (text if isinstance(text, dict) else {}) | {name: value for name, value in config.items() if value is not None}
    penalty = values.get("repetition_penalty")
    penalty = 1.0 if penalty is None else penalty
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not penalty > 0:
        raise HuggingFaceError(f"{file}: repetition_penalty is {penalty!r}, and must be a positive number")
    wanted = {name: values[name] for name, neutral in _NEUTRAL.items() if values.get(name) is not None and values[name] not in neutral}
    if values.get("do_sample"):
        wanted |= {name: values[name] for name in ("do_sample", *_DRAWING) if values.get(name) is not None}
    return GenerationDefaults(_ids(file, values.get("eos_token_id")), float(penalty), tuple(f"{k}={v}" for k, v in wanted.items()))


def _ids(file: Path, named: Any) -> tuple[int, ...]:
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in ids):
        raise HuggingFaceError(f"{file}: eos_token_id is {named!r}, and must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))
