"""Parameter counts against transformers' modules."""

import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from megavlm.config.schema import LanguageConfig, ModelConfig, ModuleTraining, ProjectorConfig, StageConfig, VisionConfig
from megavlm.planner.parameters import parameter_blocks, params

VISION = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 56, "image_size": 32, "patch_size": 8}
TEXT = {
    "vocab_size": 90,
    "num_hidden_layers": 3,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
}
OURS_VISION = {
    "num_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "ffn_hidden_size": 56,
    "image_size_px": 32,
    "patch_size_px": 8,
}
OURS_TEXT = {"vocab_size": 90, "num_layers": 3, "hidden_size": 40, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 72}
CLIP = VisionConfig(**OURS_VISION)
SIGLIP = VisionConfig(**OURS_VISION, class_token=False, pre_norm=False, patch_bias=True, pooling_head=True, feature_layer=-1)

CASES = {
    "clip llama": (CLIPVisionConfig(**VISION), CLIP, LlamaConfig(**TEXT), LanguageConfig(**OURS_TEXT)),
    "siglip qwen2 tied": (
        SiglipVisionConfig(**VISION),
        SIGLIP,
        Qwen2Config(**TEXT, tie_word_embeddings=True),
        LanguageConfig(**OURS_TEXT, qkv_bias=True, tie_embeddings=True),
    ),
    "clip qwen3 wide heads": (
        CLIPVisionConfig(**VISION),
        CLIP,
        Qwen3Config(**TEXT, head_dim=12),
        LanguageConfig(**OURS_TEXT, qk_norm=True, head_dim=12),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_transformers(name):
    vision, our_vision, text, our_text = CASES[name]
    tied = our_text.tie_embeddings
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=89, tie_word_embeddings=tied)
    )
    ours = params(ModelConfig(vision=our_vision, language=our_text))

    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert ours["vision"].total == size(theirs.model.vision_tower)
    assert ours["projector"].total == size(theirs.model.multi_modal_projector)
    assert ours["language"].total == size(theirs.model.language_model) + (0 if tied else size(theirs.lm_head))


@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_ranks_add_up(tensor):
    model = ModelConfig(vision=CLIP, language=LanguageConfig(**{**OURS_TEXT, "vocab_size": 96}), projector=ProjectorConfig())
    for block in parameter_blocks(model, tensor=tensor):
        assert block.total // tensor <= block.local <= block.total
        if block.part in ("embedding", "head") and block.module == "language":
            assert block.local * tensor == block.total


def test_a_stage_says_what_trains():
    model = ModelConfig(vision=CLIP, language=LanguageConfig(**OURS_TEXT))
    stage = StageConfig(
        name="s",
        steps=1,
        mixture={"a": 1},
        vision=ModuleTraining(train="last_layers", last_layers=1),
        language=ModuleTraining(train="frozen"),
    )
    counts = params(model, stage)
    layer = next(b.total for b in parameter_blocks(model) if b.module == "vision" and b.part == "layer")
    assert counts["vision"].trainable == layer
    assert counts["vision"].carried == layer + 2 * 24, "one layer above feature_layer=-2, and the final norm"
    assert counts["projector"].trainable == counts["projector"].total
    assert counts["language"].trainable == 0
    assert set(params(model, stage.model_copy(update={"objective": "text"}))) == {"language"}
    classification = stage.model_copy(update={"objective": "vision_classification", "num_classes": 11})
    assert params(model, classification)["vision_head"].total == 11 * 24
