"""LLaVA (https://arxiv.org/abs/2310.03744): CLIP or SigLIP encoder, MLP projector, Llama or Qwen2 language model.

Names of carried weights are those of the Hugging Face encoder classes, relative to the encoder.
"""

from __future__ import annotations

from megavlm.config.schema import ModelConfig, VisionConfig


def carried_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Layers above the feature layer, and SigLIP's attention-pooling head."""
    vision = model.vision
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(vision.num_used_layers, vision.num_layers):
        shapes.update({f"encoder.layers.{layer}.{name}": shape for name, shape in _layer_shapes(vision).items()})
    if vision.pooling_head:
        shapes.update(_pooling_head_shapes(vision))
    return shapes


def _layer_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"self_attn.{name}.weight"], shapes[f"self_attn.{name}.bias"] = (width, width), (width,)
    for norm in ("layer_norm1", "layer_norm2"):
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    shapes["mlp.fc1.weight"], shapes["mlp.fc1.bias"] = (inner, width), (inner,)
    shapes["mlp.fc2.weight"], shapes["mlp.fc2.bias"] = (width, inner), (width,)
    return shapes


def _pooling_head_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    return {
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        "head.attention.out_proj.weight": (width, width),
        "head.attention.out_proj.bias": (width,),
        "head.layernorm.weight": (width,),
        "head.layernorm.bias": (width,),
        "head.mlp.fc1.weight": (inner, width),
        "head.mlp.fc1.bias": (inner,),
        "head.mlp.fc2.weight": (width, inner),
        "head.mlp.fc2.bias": (width,),
    }
