"""Tiny LLaVA models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import text_config, vit_config


def _llava(vision: str, text: str, *, tie: bool = False, layer: int | list[int] = -2, select: str = "default") -> Callable[[Any], Any]:
    def config(tf: Any) -> Any:
        return tf.LlavaConfig(
            vision_config=vit_config(tf, vision),
            text_config=text_config(tf, text, tie=tie),
            image_token_index=3,
            vision_feature_layer=layer,
            vision_feature_select_strategy=select,
            tie_word_embeddings=tie,
        )

    return config


CASES = [
    Case("LLaVA-1.5", "llava", _llava("clip", "llama")),
    Case("LLaVA-1.5, two feature layers", "llava", _llava("clip", "llama", layer=[-3, -1]), slow=True),
    Case("LLaVA-1.5, class token, Qwen2", "llava", _llava("clip", "qwen2", select="full"), slow=True),
    Case("LLaVA-1.5, SigLIP, Qwen2 tied", "llava", _llava("siglip", "qwen2", select="full", tie=True, layer=-1), slow=True),
    Case("LLaVA-1.5, Qwen3", "llava", _llava("clip", "qwen3"), slow=True),
]
