"""Tokens as text, in runs of one kind.

Shape legend: L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from megavlm.data.inspect.views import TokenKind, TokenPiece, TokenRun
from megavlm.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"
_MAX_TOKENS_OF_A_CHARACTER = 8
_KINDS: tuple[TokenKind, ...] = ("context", "target", "muted", "visual")


def token_runs(tokenizer: Tokenizer, ids_L: np.ndarray, target_L: np.ndarray, muted_L: np.ndarray, visual_L: np.ndarray) -> list[TokenRun]:
    """Runs of a sample's tokens.

    Args:
        target_L: bool, tokens that are predicted.
        muted_L: bool, of these the ones with loss weight 0.
        visual_L: bool, placeholders.
    """
    kinds = np.where(visual_L, 3, np.where(target_L, np.where(muted_L, 2, 1), 0))
    runs = []
    for kind, group in groupby(range(len(ids_L)), key=lambda i: int(kinds[i])):
        ids = [int(ids_L[i]) for i in group]
        pieces = () if kind == 3 else tuple(token_pieces(tokenizer, ids))
        runs.append(TokenRun(_KINDS[kind], len(ids), pieces))
    return runs


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[TokenPiece]:
    """Text of each token. Tokens that only together make a character are one piece; where pieces do not add up to the text of
    the whole (a tokenizer that cleans up when decoding), the run is one piece: what is shown is always the true text."""
    whole = tokenizer.decode(list(ids))
    pieces: list[TokenPiece] = []
    start = 0
    while start < len(ids):
        stop = start + 1
        text = tokenizer.decode(list(ids[start:stop]))
        while _BROKEN in text and stop < len(ids) and stop - start < _MAX_TOKENS_OF_A_CHARACTER:
            stop += 1
            text = tokenizer.decode(list(ids[start:stop]))
        pieces.append(TokenPiece(text, tuple(ids[start:stop])))
        start = stop
    if "".join(piece.text for piece in pieces) != whole:
        return [TokenPiece(whole, tuple(ids))]
    return pieces
