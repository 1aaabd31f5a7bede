"""Resizing policies: how one picture becomes tiles or patches, and how many visual tokens that is, from its size alone.

A policy has two halves that must agree: `grid` plans from width and height, `cut` makes the pixels of that plan. The index stores
each picture's grid, so that whatever lowered a resolution is decided once. The policies: resizing_tiles (fixed, tiles),
resizing_anyres, resizing_split, resizing_canvas, resizing_native; docs/data/pictures.md compares them.
"""

from __future__ import annotations

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.picture_marks import Marked
from megavlm.data.resizing_anyres import AnyRes
from megavlm.data.resizing_base import PictureGrid, Resizing, ResizingError
from megavlm.data.resizing_canvas import Canvas
from megavlm.data.resizing_native import Native
from megavlm.data.resizing_read import OneToken
from megavlm.data.resizing_split import Split
from megavlm.data.resizing_tiles import Fixed, Tiles
from megavlm.data.tokenizer import Tokenizer

__all__ = ["PictureGrid", "Resizing", "ResizingError", "make_resizing", "plan_pictures"]

_POLICIES: dict[str, type[Fixed | Tiles | AnyRes | Split | Canvas | Native]] = {
    "fixed": Fixed,
    "tiles": Tiles,
    "anyres": AnyRes,
    "split": Split,
    "canvas": Canvas,
    "native": Native,
}


def make_resizing(image: ImageConfig, model: ModelConfig, tokenizer: Tokenizer | None = None) -> Resizing:
    """The policy that the recipe asks for. `tokenizer` is needed where data.image.marks stand between visual tokens.

    Raises:
        ResizingError: the model keeps its class token, and the policy has no place for it.
    """
    policy: Resizing = _POLICIES[image.policy](image, model)
    if model.language.cross_attention is not None:
        return OneToken(policy)
    if not image.marks.inner:
        return policy
    if tokenizer is None:
        raise ResizingError("data.image.marks stand between visual tokens: counting them takes the tokenizer")
    return Marked(policy, image, model, tokenizer)


def plan_pictures(sizes: list[tuple[int, int]], resizing: Resizing, image: ImageConfig, max_tokens: int | None = None) -> list[PictureGrid]:
    """Plans of one sample's pictures (width, height) under data.image.max_tokens_per_image and max_tokens_per_sample.

    Over the sample's cap, one ceiling for all its pictures is lowered until their sum fits: the largest lose resolution first, and
    pictures of one size stay alike. A picture that cannot go that low keeps its least.

    `max_tokens`: a lower cap on their sum, for a sample that is too long for a pack.

    Raises:
        ResizingError: no plan fits; names the least.
    """
    resizing = resizing.for_several() if len(sizes) > 1 else resizing
    grids = [resizing.grid(width, height, image.max_tokens_per_image) for width, height in sizes]
    caps = [cap for cap in (image.max_tokens_per_sample, max_tokens) if cap is not None]
    if not caps or sum(g.tokens for g in grids) <= min(caps):
        return grids
    cap, leasts = min(caps), [resizing.least(width, height) for width, height in sizes]
    lowered = _under(sizes, resizing, leasts, 0)
    if sum(g.tokens for g in lowered) > cap:
        raise ResizingError(
            f"{len(sizes)} pictures may have {cap} visual tokens together, and data.image.policy={image.policy} needs at least "
            f"{sum(g.tokens for g in lowered)}: raise data.image.max_tokens_per_sample or data.seq_len_tokens, or use fewer pictures"
        )
    low, high = 0, max(g.tokens for g in grids)  # the ceiling `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        tried = _under(sizes, resizing, leasts, middle)
        if sum(g.tokens for g in tried) <= cap:
            low, lowered = middle, tried
        else:
            high = middle
    return lowered


def _under(sizes: list[tuple[int, int]], resizing: Resizing, leasts: list[int], ceiling: int) -> list[PictureGrid]:
    return [resizing.grid(width, height, max(ceiling, least)) for (width, height), least in zip(sizes, leasts, strict=True)]
