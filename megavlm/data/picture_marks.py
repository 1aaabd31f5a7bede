"""Tokens that stand round and between a picture's visual tokens (data.image.marks).

What stands round a picture is text, and is tokenised with the text beside it, as Hugging Face's processors do. What stands between its
visual tokens begins and ends at one of them, so it is tokenised by itself; only its number depends on the picture.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig, PictureMarks
from megavlm.data.resizing_base import PictureGrid, Resizing, check_cap
from megavlm.data.tokenizer import Tokenizer


def written_out(text: str, spans: list[tuple[int, int]], image_token: str, marks: PictureMarks) -> tuple[str, list[tuple[int, int]]]:
    """A rendered conversation with `before` and `after` round each picture, and where its supervised spans are then."""
    written = marks.written or image_token
    new = marks.before + image_token + marks.after
    if new == written and not marks.word_space:
        return text, spans
    pieces = text.split(written)
    shift, place, shifts = 0, 0, []
    out = pieces[0]
    for before, piece in pairwise(pieces):
        place += len(before)
        joined = marks.merge and marks.after == marks.before and marks.after and not before and out.endswith(marks.after)
        addition = image_token + marks.after if joined else new
        if marks.word_space and piece and not piece[0].isspace() and piece[0] != "<":
            addition += " "
        out += addition + piece
        place += len(written)
        shift += len(addition) - len(written)
        shifts.append((place, shift))

    def moved(at: int) -> int:
        return at + next((shift for place, shift in reversed(shifts) if place <= at), 0)

    return out, [(moved(begin), moved(end)) for begin, end in spans]


class Marked(Resizing):
    """Another policy, whose plans count the tokens between the visual ones too; caps on visual tokens then hold for all of them."""

    def __init__(self, policy: Resizing, image: ImageConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
        self.policy, self.native, self.marks, self.tokenizer = policy, policy.native, image.marks, tokenizer
        self.shuffle = model.projector.pixel_shuffle
        self._ids: dict[str, list[int]] = {}

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        plan = self._counted(self.policy.grid(width, height))
        if max_tokens is None or plan.tokens <= max_tokens:
            return plan
        check_cap(max_tokens, self.least(width, height), width, height, "with data.image.marks")
        low, high = self.policy.least(width, height), plan.tokens  # the policy's cap `low` fits, `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._counted(self.policy.grid(width, height, middle)).tokens <= max_tokens
            low, high = (middle, high) if fits else (low, middle)
        return self._counted(self.policy.grid(width, height, low))

    def least(self, width: int, height: int) -> int:
        return self._counted(self.policy.grid(width, height, self.policy.least(width, height))).tokens

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        return self.policy.cut(picture_HWC, grid)

    def grey(self, grid: PictureGrid) -> torch.Tensor:
        return self.policy.grey(grid)

    def feature_rows(self, grid: PictureGrid, width: int, height: int) -> np.ndarray | None:
        return self.policy.feature_rows(grid, width, height)

    def sequence(self, grid: PictureGrid) -> np.ndarray:
        """int64: the picture's tokens in the text, marks and placeholders."""
        ids: list[int] = []
        for part in self._parts(grid, grid.tokens - len(self._marks(grid))):
            ids += [self.tokenizer.image_token_id] * part if isinstance(part, int) else self._encoded(part)
        return np.asarray(ids, dtype=np.int64)

    def _counted(self, grid: PictureGrid) -> PictureGrid:
        return grid._replace(tokens=grid.tokens + len(self._marks(grid)))

    def _marks(self, grid: PictureGrid) -> list[int]:
        """Ids of all marks of a picture."""
        return [token for part in self._parts(grid, 0) if isinstance(part, str) for token in self._encoded(part)]

    def _encoded(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text).ids
        return self._ids[text]

    def _parts(self, grid: PictureGrid, num_visual: int) -> list[str | int]:
        """Texts and numbers of visual tokens, in turn; texts that meet are one."""
        marks = self.marks
        if self.native:
            rows = grid.rows // self.shuffle
            row = num_visual // rows
            return [part for _ in range(rows - 1) for part in (row, marks.row_end)] + [row, marks.last_row_end]
        tile = num_visual // grid.work.tiles
        if not grid.thumbnail:
            return [marks.single_before, tile]
        parts: list[str | int] = []
        text = ""
        for row in range(1, grid.rows + 1):
            for column in range(1, grid.cols + 1):
                parts += [text + marks.tile_before.replace("{row}", str(row)).replace("{column}", str(column)), tile]
                text = ""
            text = marks.tile_row_end
        return [*parts, text + marks.whole_before, tile]
