"""From messages and pictures to a `Prompt`, by the very code that made the training samples.

Shape legend: T tiles, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megavlm.config.schema import DataConfig, ModelConfig
from megavlm.data.chat import Chat
from megavlm.data.decode import make_decoder, to_rgb
from megavlm.data.images import ImageError, cut_tiles, tile_grid
from megavlm.data.tokenizer import IMAGE_TOKEN
from megavlm.inference.generate import Prompt

Picture = str | Path | bytes | Image.Image
"""A file, an encoded picture, or a decoded one."""


def question(text: str, num_pictures: int) -> list[dict[str, str]]:
    """One user message; pictures that the text does not place with "<image>" come first, each on a line of its own."""
    missing = num_pictures - text.count(IMAGE_TOKEN)
    return [{"role": "user", "content": f"{IMAGE_TOKEN}\n" * max(missing, 0) + text}]


def make_prompt(
    messages: Sequence[Mapping[str, str]], pictures: Sequence[Picture], *, chat: Chat, data: DataConfig, model: ModelConfig
) -> Prompt:
    """Conversation so far and its pictures in order -> what `generate` continues with the assistant's answer.

    Raises:
        ChatError: number of "<image>" and of pictures differ, or the template cannot render the messages.
        ImageError: a picture that cannot be read; names the file.
    """
    tiles = [picture_tiles(p, data, model) for p in pictures]
    ids = chat.encode_prompt(messages, [len(t) * model.visual_tokens_per_tile for t in tiles])
    return Prompt(ids.tolist(), torch.cat(tiles) if tiles else None)


def picture_tiles(picture: Picture, data: DataConfig, model: ModelConfig) -> torch.Tensor:
    """uint8 tiles (T, C, side, side) of one picture. Raises ImageError when it cannot be read."""
    pixels_HWC = _decode(picture, data)
    height, width = pixels_HWC.shape[:2]
    side = model.vision.image_size_px
    return cut_tiles(pixels_HWC, tile_grid(width, height, data.image, side), side)


def _decode(picture: Picture, data: DataConfig) -> np.ndarray:
    if isinstance(picture, Image.Image):
        return np.array(to_rgb(picture))
    if isinstance(picture, bytes):
        return make_decoder(data.image.decoder).decode(picture)
    try:
        return make_decoder(data.image.decoder).decode(Path(picture).read_bytes())
    except ImageError as error:
        raise ImageError(f"{picture}: {error}") from error
