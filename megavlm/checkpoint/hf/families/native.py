"""Pictures in their own size as Hugging Face's models take them: padded below and to the right to the largest of a prompt.

Shape legend: I pictures, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import normalised
from megavlm.checkpoint.hf.processors import processor_block
from megavlm.config.schema import ImageConfig, VisionConfig
from megavlm.data.prompt import Prompt
from megavlm.models.vision.pictures import split_pictures


def padded_pictures(vision: VisionConfig, prompt: Prompt) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """(I, C, H, W) normalised, with zeros where a picture is smaller; and (height, width) of each."""
    assert prompt.pixels_X is not None and prompt.tile_grids is not None, "the prompt has pictures in their own size"
    pictures = split_pictures(prompt.pixels_X, prompt.tile_grids, vision.num_channels, vision.patch_size_px)
    sizes = [(int(p.shape[1]), int(p.shape[2])) for p in pictures]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    padded = [F.pad(normalised(vision, p), (0, width - w, 0, height - h)) for p, (h, w) in zip(pictures, sizes, strict=True)]
    return torch.stack(padded), sizes


def edges_of(folder: Path) -> dict[str, int | None]:
    """`longest_edge` and `shortest_edge` of the folder's image processor; {} when it has none.

    Raises HuggingFaceError for sizes of another kind.
    """
    block, file = processor_block(folder)
    if "size" not in block:
        return {}
    size = block["size"]
    if not isinstance(size, dict) or "longest_edge" not in size or not block.get("do_resize", True):
        raise HuggingFaceError(f"{file}: size {size}, do_resize={block.get('do_resize', True)}: pictures must be resized to a longest_edge")
    return {"longest_edge": int(size["longest_edge"]), "shortest_edge": size.get("shortest_edge")}


def check_native(hf_class: str, image: ImageConfig, whole_patches: str, least_tokens: int = 1) -> None:
    """Raise HuggingFaceError unless pictures keep their shape under longest_edge_px and sides become patches as `whole_patches` says."""
    wanted = {
        "policy": (image.policy, "native"),
        "whole_patches": (image.whole_patches, whole_patches),
        "longest_edge_px": (image.longest_edge_px, image.longest_edge_px or "a number"),
        "min_tokens_per_image": (image.min_tokens_per_image, min(image.min_tokens_per_image, least_tokens)),
        "max_tokens_per_image": (image.max_tokens_per_image, None),
    }
    wrong = [f"data.image.{name}={got} ({fitting} would fit)" for name, (got, fitting) in wanted.items() if got != fitting]
    if wrong:
        raise HuggingFaceError(
            f"the model was trained with {', '.join(wrong)}, and {hf_class}'s processor cannot do that: "
            "the exported model would see other pictures than it learned from"
        )
