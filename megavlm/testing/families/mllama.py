"""Tiny Mllama models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import VOCABULARY


def _mllama(*, tiles: int = 4, cross: tuple[int, ...] = (1, 3), **text: Any) -> Callable[[Any], Any]:
    def config(tf: Any) -> Any:
        ratios = [[rows, columns] for rows in range(1, tiles + 1) for columns in range(1, tiles + 1) if rows * columns <= tiles]
        return tf.MllamaConfig(
            vision_config=tf.MllamaVisionConfig(
                hidden_size=32,
                num_hidden_layers=3,
                num_global_layers=2,
                attention_heads=4,
                intermediate_size=64,
                vision_output_dim=96,
                image_size=16,
                patch_size=4,
                max_num_tiles=tiles,
                supported_aspect_ratios=ratios,
                intermediate_layers_indices=[0, 2],
            ),
            text_config=tf.MllamaTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                cross_attention_layers=list(cross),
                max_position_embeddings=512,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                **({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}} | text),
            ),
            image_token_index=VOCABULARY,
        )

    return config


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES = [
    Case("Mllama (Llama 3.2 Vision)", "mllama", _mllama(rope_parameters=LLAMA3), {"policy": "canvas"}),
    Case("Mllama, two tiles, first layer reads", "mllama", _mllama(tiles=2, cross=(0, 2)), {"policy": "canvas"}, slow=True),
]
