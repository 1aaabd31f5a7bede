"""A SentencePiece model as the equal pipeline of Hugging Face's `tokenizers`."""

from __future__ import annotations

import re
from typing import Any

SPACE = "\u2581"
"""SentencePiece's sign for a space."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
SPECIAL_TYPES = (_UNKNOWN, _CONTROL, _USER_DEFINED)
"""Types of pieces that are split off before the text is encoded."""


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or a token it lacks."""


def is_marker(token: str, kind: int) -> bool:
    """Whether a special piece marks structure (generation drops it) rather than being ordinary text such as a run of spaces."""
    return kind in (_UNKNOWN, _CONTROL) or token == "<image>" or re.fullmatch(r"<\|.*\|>|\[[A-Z_]+\]", token) is not None


def to_tokenizers(model: Any, dummy_prefix: bool) -> Any:
    """The `tokenizers` pipeline equal to a SentencePiece model with identity normalisation.

    Source of the BPE merge order: a pair merges by the score of the piece it makes (sentencepiece/src/bpe_model.cc), which is
    minus the rank; Hugging Face's SentencePieceExtractor derives merges the same way.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces, spec = model.pieces, model.trainer_spec
    unknown = next((p.piece for p in pieces if p.type == _UNKNOWN), None)
    core: Any
    if spec.model_type == 1:
        unk_id = next((i for i, p in enumerate(pieces) if p.type == _UNKNOWN), None)
        core = models.Unigram([(p.piece, p.score) for p in pieces], unk_id=unk_id, byte_fallback=spec.byte_fallback)
    elif spec.model_type == 2:
        vocab = {p.piece: i for i, p in enumerate(pieces)}
        mergeable = {p.piece: p.score for p in pieces if p.type == _NORMAL}
        core = models.BPE(vocab, _bpe_merges(mergeable, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)
    else:
        raise TokenizerError(
            f"SentencePiece model type {spec.model_type} (word or char) has no Hugging Face equal: train type unigram or bpe"
        )
    tokenizer = Tokenizer(core)
    if dummy_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _bpe_merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
