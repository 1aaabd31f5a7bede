"""Tiny LLaVA-NeXT, LLaVA-OneVision and ViP-LLaVA models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import text_config, vit_config

GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
PINPOINTS = [[16 * rows, 16 * columns] for rows, columns in GRIDS]
ANYRES = {"policy": "anyres", "anyres_grids": GRIDS}
LARGE = [(1, 2), (2, 1), (2, 2), (2, 3), (3, 1)]
WHOLE = ANYRES | {"anyres_several": "whole", "anyres_max_tiles": 9}


def _next(vision: str, text: str, *, layer: int | list[int] = -2, select: str = "default", tie: bool = False) -> Callable[[Any], Any]:
    return lambda tf: tf.LlavaNextConfig(
        vision_config=vit_config(tf, vision),
        text_config=text_config(tf, text, tie=tie),
        image_token_index=3,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
        tie_word_embeddings=tie,
    )


def _onevision(text: str = "qwen2", *, tie: bool = False, grids: list[tuple[int, int]] = GRIDS, most: int = 9) -> Callable[[Any], Any]:
    return lambda tf: tf.LlavaOnevisionConfig(
        vision_config=vit_config(tf, "siglip", vision_use_head=False, image_size=18),
        text_config=text_config(tf, text, tie=tie),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=[[18 * rows, 18 * columns] for rows, columns in grids],
        vision_aspect_ratio=f"anyres_max_{most}",
        tie_word_embeddings=tie,
    )


def _vip(tf: Any) -> Any:
    return tf.VipLlavaConfig(
        vision_config=vit_config(tf, "clip"),
        text_config=text_config(tf, "llama"),
        image_token_index=3,
        vision_feature_layer=[-2, 1, -1],
        projector_layernorm_eps=1e-3,
        tie_word_embeddings=False,
    )


CASES = [
    Case("LLaVA-NeXT", "llava_next", _next("clip", "llama"), image=ANYRES),
    Case("LLaVA-NeXT, two feature layers, Qwen2", "llava_next", _next("clip", "qwen2", layer=[-3, -1]), image=ANYRES, slow=True),
    Case("LLaVA-NeXT, SigLIP", "llava_next", _next("siglip", "llama", select="full", tie=True), image=ANYRES, slow=True),
    Case("LLaVA-OneVision", "llava_onevision", _onevision(), image=WHOLE),
    Case(
        "LLaVA-OneVision, each picture in its grid",
        "llava_onevision",
        _onevision(tie=True),
        image=ANYRES | {"anyres_max_tiles": 9},
        slow=True,
    ),
    Case(
        "LLaVA-OneVision, shrunk features",
        "llava_onevision",
        _onevision(grids=LARGE, most=1),
        image=ANYRES | {"anyres_grids": LARGE, "anyres_several": "whole", "anyres_max_tiles": 1},
        slow=True,
    ),
    Case("ViP-LLaVA", "vipllava", _vip, slow=True),
]
