"""What becomes of a sample that fits no pack: lowered in resolution, split between turns, or left out, in the order of data.over_long.

Split: a piece begins at a user message, the system message stands before each, and the pictures of earlier turns are shown again, so
that no piece talks about a picture that it does not see. Every assistant message is supervised in exactly one piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megavlm.config.schema import DataConfig, ImageConfig
from megavlm.data.chat import Chat
from megavlm.data.resizing import PictureGrid, Resizing, ResizingError, plan_pictures
from megavlm.data.sample import IMAGE_TOKEN, Sample
from megavlm.data.sample_index import piece_of
from megavlm.data.token_table import TextTokens, encode_text


@dataclass(frozen=True)
class Piece:
    """A sample or a part of it that fits a pack. Fields as in SampleIndex."""

    message_start: int
    message_stop: int
    """-1: the whole sample."""
    num_repeated: int
    numbers: list[int]
    """Its images by their number in the sample."""
    grids: list[PictureGrid]
    text: TextTokens
    lowered: bool


class OverLong:
    """Applies data.over_long to samples of one source and counts what it did in `notes`."""

    def __init__(self, data: DataConfig, image: ImageConfig, resizing: Resizing, chat: Chat) -> None:
        self.data, self.image, self.resizing, self.chat = data, image, resizing, chat
        self.notes: Counter[str] = Counter()

    def fits(self, num_tokens: int, grids: list[PictureGrid]) -> bool:
        """Whether a sample of so many text tokens and these pictures goes into a pack."""
        limit = self.data.max_patches_per_pack
        within = num_tokens + sum(g.tokens for g in grids) <= self.data.seq_len_tokens
        return within and (limit is None or sum(g.work.patches for g in grids) <= limit)

    def resolve(self, sizes: list[tuple[int, int]], text: TextTokens, read: Callable[[], Sample]) -> list[Piece] | None:
        """What stands in the place of a sample that does not fit: one piece, several, none; None where no policy helps.

        Args:
            sizes: width and height of its pictures.
            text: its text tokens.
            read: gives the sample; called only when it must be split.
        """
        tried: set[str] = set()
        for policy in self.data.over_long:
            tried.add(policy)
            pieces: list[Piece] | None = None
            if policy == "drop":
                self.notes["dropped"] += 1
                return []
            if policy == "lower_resolution":
                grids = self._lowered(sizes, text.num_tokens)
                if grids is not None:
                    pieces = [Piece(0, -1, 0, list(range(len(sizes))), grids, text, True)]
            if pieces is None and "split_turns" in tried:
                pieces = self._split(read(), lower="lower_resolution" in tried)
            if pieces is not None:
                self.notes["lowered"] += any(p.lowered for p in pieces)
                self.notes["split"] += len(pieces) > 1
                return pieces
        return None

    def _lowered(self, sizes: list[tuple[int, int]], num_tokens: int) -> list[PictureGrid] | None:
        """The plan of the highest resolution with which the sample fits."""
        room = self.data.seq_len_tokens - num_tokens
        if not sizes or room < 1:
            return None
        limit = self.data.max_patches_per_pack
        best: list[PictureGrid] | None = None
        low, high = 0, room  # tokens that are surely few enough for the patches, tokens to try
        while low < high:
            middle = high if best is None and low == 0 and high == room else (low + high + 1) // 2
            try:
                grids = plan_pictures(sizes, self.resizing, self.image, middle)
            except ResizingError:
                if middle == high:
                    return best
                low = middle
                continue
            if limit is None or sum(g.work.patches for g in grids) <= limit:
                best, low = grids, middle
            else:
                high = middle - 1
        return best

    def _split(self, sample: Sample, lower: bool) -> list[Piece] | None:
        """Pieces of as many turns as fit, from the first turn on; None where a single turn does not fit or there is only one."""
        groups = turn_groups(sample)
        pieces: list[Piece] = []
        at = 0
        while at < len(groups):
            found: Piece | None = None
            behind = at
            for end in range(at, len(groups)):
                longer = self._piece(sample, groups[at][0], groups[end][1], lower=False)
                if longer is None:
                    break
                found, behind = longer, end + 1
            if found is None and lower:
                found, behind = self._piece(sample, *groups[at], lower=True), at + 1
            if found is None:
                return None
            pieces.append(found)
            at = behind
        return pieces if len(pieces) > 1 else None

    def _piece(self, sample: Sample, start: int, stop: int, lower: bool) -> Piece | None:
        shown = [m.content.count(IMAGE_TOKEN) for m in sample.messages]
        in_system = shown[0] if start > 0 and sample.messages[0].role == "system" else 0
        before = sum(shown[:start])
        numbers = list(range(before + sum(shown[start:stop])))
        piece = piece_of(sample, start, stop, numbers, before - in_system)
        sizes = [(i.width, i.height) for i in piece.images]
        text = encode_text(self.chat, [m.model_dump() for m in piece.messages], len(sizes))
        grids: list[PictureGrid] | None
        try:
            grids = plan_pictures(sizes, self.resizing, self.image)
        except ResizingError:  # so many pictures are over data.image.max_tokens_per_sample even at their least
            return None
        is_lowered = not self.fits(text.num_tokens, grids)
        if is_lowered:
            grids = self._lowered(sizes, text.num_tokens) if lower else None
        if grids is None:
            return None
        return Piece(start, stop, before - in_system, numbers, grids, text, is_lowered)


def turn_groups(sample: Sample) -> list[tuple[int, int]]:
    """(first message, behind the last) of the smallest pieces: each begins with a user message behind an assistant's and has an answer.

    The first begins with the conversation's first message, the system message included.
    """
    roles = [m.role for m in sample.messages]
    starts = [0] + [i for i in range(1, len(roles)) if roles[i] == "user" and roles[i - 1] == "assistant"]
    if len(starts) > 1 and "assistant" not in roles[starts[-1] :]:
        starts.pop()  # a last question without an answer belongs to the turn before it
    return list(zip(starts, [*starts[1:], len(roles)], strict=True))
