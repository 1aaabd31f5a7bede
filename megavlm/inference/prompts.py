"""From messages and pictures to a `Prompt`, by the very code that made the training samples.

Shape legend: C channels, H height, W width.
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
from megavlm.data.images import ImageError
from megavlm.data.instructions import instruction_tokenizer
from megavlm.data.prompt import Prompt
from megavlm.data.resizing import make_resizing, plan_pictures
from megavlm.data.resizing_rows import feature_rows
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.types import PictureTiles
from megavlm.inference.sampling import GenerationError

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
        GenerationError: pictures for a language model alone.
        ResizingError: pictures that no plan fits into data.image.max_tokens_per_sample.
        TokenizerError: the projector reads text, and data.instruction_tokenizer does not fit it.
    """
    if pictures and model.text_only:
        raise GenerationError(f"the model is a language model alone (model.family={model.family}): it sees no pictures; leave out --image")
    decoded = [_decode(picture, data) for picture in pictures]
    sizes = [(pixels_HWC.shape[1], pixels_HWC.shape[0]) for pixels_HWC in decoded]
    resizing = make_resizing(data.image, model, chat.tokenizer)
    grids = plan_pictures(sizes, resizing, data.image)
    ids = chat.encode_prompt(messages, [resizing.sequence(grid) for grid in grids]).tolist()
    if not decoded:
        return Prompt(ids)
    cut = torch.cat([resizing.cut(pixels_HWC, grid) for pixels_HWC, grid in zip(decoded, grids, strict=True)])
    if resizing.native:
        return Prompt(ids, pixels_X=cut, tile_grids=[(grid.rows, grid.cols) for grid in grids], sizes=sizes)
    rows = feature_rows(sizes, grids, resizing, model.visual_tokens_per_tile)
    cuts = [PictureTiles(grid.work.tiles, grid.rows, grid.cols) for grid in grids]
    tiles, reader = [picture.tiles for picture in cuts], instruction_tokenizer(data, model)
    instructions = None if reader is None else reader(messages)
    return Prompt(ids, cut, feature_rows_N=rows, tiles_per_picture=tiles, picture_tiles=cuts, instructions=instructions, sizes=sizes)


def _decode(picture: Picture, data: DataConfig) -> np.ndarray:
    if isinstance(picture, Image.Image):
        return np.array(to_rgb(picture))
    if isinstance(picture, bytes):
        return make_decoder(data.image.decoder).decode(picture)
    try:
        return make_decoder(data.image.decoder).decode(Path(picture).read_bytes())
    except ImageError as error:
        raise ImageError(f"{picture}: {error}") from error
