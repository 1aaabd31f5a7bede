"""Tiny Gemma 3 models with pictures of 4 tokens, and windows shorter than two pictures."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.gemma import gemma_config
from megavlm.testing.families.parts import vit_config


def _gemma3(*, mm_tokens: int = 4, tie: bool = True, **changes: Any) -> Any:
    def config(tf: Any) -> Any:
        return tf.Gemma3Config(
            vision_config=vit_config(tf, "siglip", vision_use_head=False),
            text_config=gemma_config(tf, "gemma3_text", tie_word_embeddings=tie, **changes),
            mm_tokens_per_image=mm_tokens,
            image_token_index=3,
            boi_token_index=4,
            eoi_token_index=5,
            tie_word_embeddings=tie,
        )

    return config


CASES = [
    Case("Gemma 3", "gemma3", _gemma3()),
    Case("Gemma 3, unpooled patches beyond the window, untied", "gemma3", _gemma3(mm_tokens=16, tie=False), slow=True),
]
