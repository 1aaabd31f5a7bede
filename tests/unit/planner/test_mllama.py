"""Counts of a model with a canvas and cross-attention, against its transformers class."""

from __future__ import annotations

import pytest

from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import ModelConfig
from megavlm.models.vision.canvas import ROW_MULTIPLE
from megavlm.planner.flops import FlopsModel, VisionWork, Work
from megavlm.planner.parameters import params
from megavlm.planner.products import CANVAS_ROW_MULTIPLE
from megavlm.testing.families.mllama import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parameter_is_counted(case) -> None:
    tf = quiet_transformers()
    config = case.config(tf)
    model: ModelConfig = family("mllama").model_from_hf(config, Problems())
    counts, theirs = params(model), tf.MllamaForConditionalGeneration(config)

    def size(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert counts["vision"].total == counts["vision"].trainable == size(theirs.model.vision_model)
    assert counts["projector"].total == size(theirs.model.multi_modal_projector)
    assert counts["language"].total == size(theirs.model.language_model) + size(theirs.lm_head)


def test_empty_tiles_and_keys_cost() -> None:
    tf = quiet_transformers()
    model: ModelConfig = family("mllama").model_from_hf(CASES[0].config(tf), Problems())
    patches = model.vision.num_patches
    flops = FlopsModel(model)
    one, four = VisionWork(1, 4 * patches, (4 * patches) ** 2), VisionWork(4, 4 * patches, (4 * patches) ** 2)
    without, parts = flops.pack([20], VisionWork(), 5), flops.pack([20], one, 5)
    assert parts.by_part["language.linear"].forward > without.by_part["language.linear"].forward
    filled = flops.pack([20], four, 5)
    assert filled.by_part["vision.linear"] == parts.by_part["vision.linear"], "empty places go through the layers too"
    assert filled.by_part["vision.embedding"].forward == 4 * parts.by_part["vision.embedding"].forward
    assert parts.forward < filled.forward < 1.4 * parts.forward


def test_rows_of_a_tile_are_filled_up_as_the_encoder_does() -> None:
    assert CANVAS_ROW_MULTIPLE == ROW_MULTIPLE


def test_scores_of_cross_attention_are_counted_by_look() -> None:
    """4 H K for each text row and feature that it sees, in each layer that reads; twice that backward."""
    model: ModelConfig = family("mllama").model_from_hf(CASES[0].config(quiet_transformers()), Problems())
    language, flops = model.language, FlopsModel(model)
    assert language.cross_attention is not None
    picture = VisionWork(1, 4 * model.vision.num_patches, (4 * model.vision.num_patches) ** 2)
    blind, seeing = flops.pack([20], picture, 5), flops.pack([20], picture._replace(looks=300), 5)
    scores = 4 * language.num_attention_heads * language.head_width * 300 * len(language.cross_attention.layers)
    assert seeing.by_part.pop("language.cross_attention") == Work(scores, 2 * scores)
    assert blind.by_part.pop("language.cross_attention") == Work() and seeing == blind
