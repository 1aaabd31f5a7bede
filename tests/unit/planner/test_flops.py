"""FLOPs against torch's own counter on Hugging Face's LLaVA, forward and backward, for every way of freezing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from megavlm.config.schema import LanguageConfig, ModelConfig, ModuleTraining, ProjectorConfig, StageConfig, VisionConfig
from megavlm.planner.flops import FlopsModel, VisionWork, pack_flops
from megavlm.planner.parameters import TrainingError

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size_px=32, patch_size_px=8, num_layers=3, hidden_size=24, num_attention_heads=2, ffn_hidden_size=56, feature_layer=-1
    ),
    projector=ProjectorConfig(num_layers=2),
    language=LanguageConfig(
        vocab_size=90, num_layers=3, hidden_size=40, num_attention_heads=4, num_query_groups=2, head_dim=12, ffn_hidden_size=72
    ),
)
FROZEN, FULL = ModuleTraining(train="frozen"), ModuleTraining(train="full")


def top(layers: int) -> ModuleTraining:
    return ModuleTraining(train="last_layers", last_layers=layers)


def hugging_face() -> LlavaForConditionalGeneration:
    vision, language = MODEL.vision, MODEL.language
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=32,
            patch_size=8,
            num_hidden_layers=3,
            hidden_size=24,
            num_attention_heads=2,
            intermediate_size=vision.ffn_hidden_size,
        ),
        text_config=LlamaConfig(
            vocab_size=90,
            num_hidden_layers=3,
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=72,
        ),
        image_token_index=language.vocab_size - 1,
        vision_feature_layer=-1,
    )
    config._attn_implementation = "eager"
    config.vision_config._attn_implementation = config.text_config._attn_implementation = "eager"
    return LlavaForConditionalGeneration(config)


def freeze(model: LlavaForConditionalGeneration, stage: StageConfig) -> None:
    """What `stage` says, on Hugging Face's module names."""
    towers = {"vision": model.model.vision_tower, "language": model.model.language_model}
    for name, tower in towers.items():
        training = getattr(stage, name)
        tower.requires_grad_(training.train == "full")
        if training.train == "last_layers":
            layers = (
                tower.layers
                if name == "language"
                else next(m for n, m in tower.named_modules() if n.endswith("encoder.layers") or n == "layers")
            )
            for layer in layers[-training.last_layers :]:
                layer.requires_grad_(True)
            if name == "language":
                tower.norm.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(stage.projector.train != "frozen")
    model.lm_head.requires_grad_(stage.language.train != "frozen")


def tiles_of(number: int) -> VisionWork:
    return VisionWork.uniform(number, MODEL.vision.num_patches)


def measured(stage: StageConfig, samples: list[tuple[int, int]]) -> tuple[int, int]:
    """(forward, forward + backward) of samples (text tokens, tiles) run one by one, as torch counts them."""
    torch.manual_seed(0)
    model = hugging_face()
    freeze(model, stage)
    forward = both = 0
    for text, tiles in samples:
        tokens = torch.cat([torch.full((tiles * 16,), 89), torch.randint(0, 88, (text,))])[None]
        pictures = torch.rand(tiles, 3, 32, 32) if tiles else None
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tokens, pixel_values=pictures)
        forward += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss = model(input_ids=tokens, pixel_values=pictures).logits.sum()
            if loss.requires_grad:
                loss.backward()
        both += counter.get_total_flops()
    return forward, both


STAGES = {
    "everything": (FULL, FULL, FULL),
    "projector": (FROZEN, FULL, FROZEN),
    "encoder": (FULL, FROZEN, FROZEN),
    "encoder top": (top(2), FROZEN, FROZEN),
    "language": (FROZEN, FROZEN, FULL),
    "language top": (FROZEN, FROZEN, top(1)),
    "recipe's second stage": (top(1), FULL, FULL),
    "two tops": (top(1), FULL, top(2)),
}


@pytest.mark.parametrize("samples", [[(7, 1), (20, 1), (11, 2)], [(9, 0), (13, 0)]], ids=["pictures", "text"])
@pytest.mark.parametrize("name", STAGES)
def test_flops_are_what_torch_counts(name, samples):
    vision, projector, language = STAGES[name]
    stage = StageConfig(name="s", steps=1, mixture={"a": 1}, vision=vision, projector=projector, language=language)
    lengths = [text + 16 * tiles for text, tiles in samples]
    ours = pack_flops(MODEL, lengths, tiles_of(sum(tiles for _, tiles in samples)), sum(lengths), stage)
    forward, both = measured(stage, samples)
    # Eager attention computes the masked half as well.
    half = ours.by_part["language.attention"]
    assert ours.forward + half.forward == forward
    assert ours.total + half.total == both
    assert FlopsModel(MODEL, stage).total(lengths, tiles_of(sum(tiles for _, tiles in samples)), sum(lengths)) == ours.total


def test_a_pack_is_the_sum_of_its_segments():
    parts = [pack_flops(MODEL, [length], tiles_of(tiles), targets) for length, tiles, targets in ((30, 1, 4), (12, 0, 5), (50, 2, 0))]
    assert pack_flops(MODEL, [30, 12, 50], tiles_of(3), 9).total == sum(part.total for part in parts)
    assert pack_flops(MODEL, [92], tiles_of(3), 9).total > sum(part.total for part in parts), "one long segment attends more"


def test_head_is_paid_for_by_targets_only():
    without, one = pack_flops(MODEL, [30], tiles_of(1), 0), pack_flops(MODEL, [30], tiles_of(1), 1)
    assert one.total - without.total == 3 * 2 * 40 * 90
    assert without.by_part["language.head"].total == 0


def test_objectives_run_their_part_of_the_model():
    text = StageConfig(name="t", steps=1, mixture={"a": 1}, objective="text")
    assert set(pack_flops(MODEL, [20], tiles_of(0), 5, text).by_part) == {"language.linear", "language.attention", "language.head"}
    image = StageConfig(name="c", steps=1, mixture={"a": 1}, objective="vision_classification", num_classes=11, vision=FULL)
    flops = pack_flops(MODEL, [1, 1], tiles_of(2), 32, image)
    assert set(flops.by_part) == {"vision.embedding", "vision.linear", "vision.attention", "vision.head"}
    assert flops.by_part["vision.head"].forward == 32 * 2 * 24 * 11 and flops.by_part["vision.head"].backward == 2 * 32 * 2 * 24 * 11
    assert flops.total == FlopsModel(MODEL, image).total([1, 1], tiles_of(2), 32)


def test_unused_encoder_layers_and_pixel_shuffle():
    changes = {"feature_layer": -2, "class_token": False}
    fewer = ModelConfig(vision=MODEL.vision.model_copy(update=changes), projector=ProjectorConfig(pixel_shuffle=2), language=MODEL.language)
    flops = pack_flops(fewer, [4], tiles_of(1), 0)
    assert flops.by_part["vision.attention"].forward == 2 * 4 * 16 * 16 * 24
    assert flops.by_part["projector"].forward == 4 * 2 * (96 * 40 + 40 * 40)


def test_too_many_last_layers_are_refused():
    stage = StageConfig(name="s", steps=1, mixture={"a": 1}, vision=top(4))
    with pytest.raises(TrainingError, match=r"vision\.last_layers=4, but the vision runs 3 layers"):
        FlopsModel(MODEL, stage)


def test_text_beside_a_picture_gets_input_gradients_too():
    """With a frozen LLM a pack is one sequence: once a picture needs gradients, every row goes back through the layers."""
    stage = StageConfig(name="s", steps=1, mixture={"a": 1}, language=FROZEN)
    alone = pack_flops(MODEL, [20], tiles_of(0), 4, stage)
    beside = pack_flops(MODEL, [20, 30], tiles_of(1), 8, stage).backward - pack_flops(MODEL, [30], tiles_of(1), 4, stage).backward
    assert alone.backward == 0 and beside == alone.forward + alone.by_part["language.attention"].forward
