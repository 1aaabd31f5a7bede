"""Tiny PaliGemma models."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.gemma import gemma_config
from megavlm.testing.families.parts import VOCABULARY, vit_config


def _paligemma(text: str, **changes: Any) -> Any:
    def config(tf: Any) -> Any:
        return tf.PaliGemmaConfig(
            vision_config=vit_config(tf, "siglip", vision_use_head=False),
            text_config=gemma_config(tf, text, **changes),
            projection_dim=48,
            hidden_size=48,
            vocab_size=VOCABULARY,
            image_token_index=3,
        )

    return config


CASES = [
    Case("PaliGemma", "paligemma", _paligemma("gemma")),
    Case("PaliGemma 2", "paligemma", _paligemma("gemma2")),
]
