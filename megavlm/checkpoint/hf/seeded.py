"""Prompts drawn from a seed: random text and pictures through the very code that cuts pictures in training.

What comparisons of logits feed both implementations: text alone, one picture, several pictures, pictures of odd sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.prompt import Prompt
from megavlm.data.resizing import Resizing, make_resizing, plan_pictures
from megavlm.data.resizing_rows import feature_rows
from megavlm.data.types import PictureTiles

TEXT_TOKENS = (11, 7, 13, 6)
"""Text of each sample; its pictures stand behind the third token."""


def seeded_prompts(model: ModelConfig, image: ImageConfig, image_token: int | None, seed: int = 0) -> list[Prompt]:
    """Four samples: no picture, one, one of an odd size, two of unequal odd sizes."""
    side = model.vision.image_size_px
    sizes: list[list[tuple[int, int]]] = [[], [(side, side)], [(2 * side + 3, side - 1)], [(side - 1, 3 * side), (side + 5, side)]]
    if model.text_only or image_token is None:
        sizes = [[]] * 4
    return [
        seeded_prompt(model, image, image_token, own, text, seed + i) for i, (own, text) in enumerate(zip(sizes, TEXT_TOKENS, strict=True))
    ]


def seeded_prompt(
    model: ModelConfig, image: ImageConfig, image_token: int | None, sizes: Sequence[tuple[int, int]], num_text: int, seed: int
) -> Prompt:
    """`num_text` random tokens and one random picture for each (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(4, model.language.vocab_size, (num_text,), generator=generator)
    if image_token is not None:
        text[text == image_token] = 1 + (image_token + 1) % (model.language.vocab_size - 1)
        text[text == image_token] = 1
    if not sizes:
        return Prompt(text.tolist())
    pictures = [torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy() for width, height in sizes]
    return picture_prompt(model, image, text.tolist(), pictures, image_token)


def picture_prompt(
    model: ModelConfig, image: ImageConfig, text: Sequence[int], pictures: Sequence[np.ndarray], image_token: int | None
) -> Prompt:
    """The pictures' placeholders, one picture behind the other with a token of text between, behind the third token of `text`."""
    sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
    resizing: Resizing = make_resizing(image, model)
    grids = plan_pictures(sizes, resizing, image)
    assert image_token is not None
    visual: list[int] = []
    for grid in grids:
        visual += [image_token] * grid.tokens + [text[0]]
    ids = [*text[:3], *visual, *text[3:]]
    cut = torch.cat([resizing.cut(picture, grid) for picture, grid in zip(pictures, grids, strict=True)])
    if resizing.native:
        return Prompt(ids, pixels_X=cut, tile_grids=[(grid.rows, grid.cols) for grid in grids], sizes=sizes)
    rows = feature_rows(sizes, grids, resizing, model.visual_tokens_per_tile)
    cuts = [PictureTiles(grid.work.tiles, grid.rows, grid.cols) for grid in grids]
    tiles = [picture.tiles for picture in cuts]
    instructions = _instructions(model, text, len(pictures))
    return Prompt(ids, cut, feature_rows_N=rows, tiles_per_picture=tiles, picture_tiles=cuts, instructions=instructions, sizes=sizes)


def _instructions(model: ModelConfig, text: Sequence[int], num_pictures: int) -> list[list[int]] | None:
    """For projectors that read text: of another length for each picture."""
    words = model.projector.qformer.instruction if model.projector.qformer is not None else None
    if words is None:
        return None
    return [[1 + token % (words.vocab_size - 1) for token in text[: 4 - number % 3]] for number in range(num_pictures)]
