"""Native resolution and LLaVA-NeXT grids in the model, against Hugging Face's models with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.data.resizing import make_resizing
from megavlm.inference.generate import PromptError, generate
from megavlm.models.freezing import decays
from megavlm.models.init import initialise
from megavlm.models.projectors.shuffle import pixel_shuffle
from megavlm.models.vlm import VisionLanguageModel
from megavlm.models.weights import assign
from megavlm.parallel.context import ParallelContext
from megavlm.testing.in_rank import in_rank
from megavlm.testing.tiny import IMAGE_TOKEN_ID, tiny_chunks, tiny_model_config, tiny_native_batch

GRIDS = [(4, 4), (3, 7), (1, 1), (9, 2), (4, 4), (2, 8)]
"""(rows, columns) of patches; the tiny encoder was trained on 4 x 4."""


def flat_pictures(grids: list[tuple[int, int]], patch: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, r * patch, c * patch), generator=generator, dtype=torch.uint8) for r, c in grids]


def encoder(model: ModelConfig, ctx: ParallelContext) -> VisionLanguageModel:
    chunks = tiny_chunks(model, ctx)
    initialise(chunks, model, 0, ctx)
    vlm = chunks[0].eval()
    assert isinstance(vlm, VisionLanguageModel)
    return vlm


def hf_vision(model: ModelConfig) -> tuple[Any, dict[str, str]]:
    """Hugging Face's encoder with the shape of ours, without weights."""
    from megavlm.checkpoint.hf import TokenIds
    from megavlm.checkpoint.hf.config import config_to_hf, quiet_transformers

    tf = quiet_transformers()
    config = tf.LlavaConfig(**config_to_hf(model, TokenIds(image=3))).vision_config
    classes = {"clip_vision_model": tf.CLIPVisionModel, "siglip_vision_model": tf.SiglipVisionModel}
    return classes[config.model_type](config).eval()


def give_weights(hf: Any, vlm: VisionLanguageModel, model: ModelConfig) -> None:
    """Our weights into a Hugging Face model, by the names that the export writes."""
    from megavlm.checkpoint.hf.export import LiveSource, hf_tensors

    tensors = dict(hf_tensors(model, LiveSource([vlm])))
    missing = []
    for name, parameter in hf.state_dict(keep_vars=True).items():
        ours = next((n for n in tensors if n.endswith(name.removeprefix("vision_model."))), None)
        if ours is None:
            missing.append(name)
        else:
            parameter.data.copy_(tensors[ours])
    assert all("position_ids" in name for name in missing), missing


@pytest.mark.parametrize("style", ["clip", "siglip"])
@in_rank
def test_native_features_equal_hugging_face_with_interpolated_positions(style: str, ctx: ParallelContext) -> None:
    model = tiny_model_config(siglip=style == "siglip")
    vlm = encoder(model, ctx)
    hf = hf_vision(model)
    give_weights(hf, vlm, model)
    pictures = flat_pictures(GRIDS)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.vision.image_mean, model.vision.image_std))
    with torch.no_grad():
        ours = vlm.vision(torch.cat([p.flatten() for p in pictures]), GRIDS)
        for picture, mine, (rows, columns) in zip(pictures, ours.x_ND.split(ours.lengths), GRIDS, strict=True):
            pixels = ((picture / 255 - mean) / std).unsqueeze(0)
            theirs = hf(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2][0]
            theirs = theirs[int(model.vision.class_token) :]
            assert mine.shape == theirs.shape
            assert float((mine - theirs).abs().max()) <= 1e-4 * max(1.0, float(theirs.abs().max())), (rows, columns)


@pytest.mark.parametrize("style", ["clip", "siglip"])
@pytest.mark.parametrize("shuffle", [1, 2])
@in_rank
def test_a_square_of_the_trained_size_is_a_tile_bit_for_bit(style: str, shuffle: int, ctx: ParallelContext) -> None:
    model = tiny_model_config(siglip=style == "siglip")
    model = model.model_copy(update={"projector": model.projector.model_copy(update={"pixel_shuffle": shuffle, "input_norm": shuffle > 1})})
    vlm = encoder(model, ctx)
    tiles = torch.stack(flat_pictures([(4, 4)] * 3))
    grids = [(4, 4)] * 3
    with torch.no_grad():
        from_tiles = vlm.projector(vlm.vision(tiles))
        native = vlm.projector(vlm.vision(tiles.flatten(), grids))
    assert torch.equal(from_tiles, native)


@in_rank
def test_a_native_pack_computes_what_its_samples_compute_alone(ctx: ParallelContext) -> None:
    model = tiny_model_config()
    vlm = encoder(model, ctx)
    samples = [[(2, 8)], [], [(4, 12), (8, 4)]]
    together = tiny_native_batch(model, samples)
    with torch.no_grad():
        packed = vlm.embed(together)[together.image_positions_N, 0]
        alone = []
        pixels, start = together.pixels_X, 0
        for grid in together.tile_grids:
            size = 3 * grid[0] * grid[1] * 16
            alone.append(vlm.projector(vlm.vision(pixels[start : start + size], [grid])))
            start += size
    assert packed.shape[0] == 16 + 48 + 32
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)
    # Other pixels in one picture leave the others' features alone.
    changed = together.pixels_X.clone()
    changed[: 3 * 16 * 16] = 255 - changed[: 3 * 16 * 16]
    with torch.no_grad():
        after = vlm.embed(replace(together, pixels_X=changed))[together.image_positions_N, 0]
    assert torch.equal(after[16:], packed[16:]) and not torch.equal(after[:16], packed[:16])


@in_rank
def test_native_gradients_reach_every_weight(ctx: ParallelContext) -> None:
    """Positions included, and as finite differences say."""
    model = tiny_model_config()
    vlm = encoder(model, ctx)
    batch = tiny_native_batch(model, [[(2, 8)], [(4, 12)], []])
    vlm(batch).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vlm.projector.parameters())
    table = vlm.vision.position_embedding
    # Down a random direction the loss, in fp32, changes too little to be seen; along the gradient the slope is its norm.
    slope, step = float(table.grad.norm()), 1e-2
    direction = table.grad / slope
    with torch.no_grad():
        table.add_(step * direction)
        above = float(vlm(batch).total)
        table.sub_(2 * step * direction)
        below = float(vlm(batch).total)
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=2e-2)


@in_rank
def test_pixels_and_grids_that_do_not_match_are_refused(ctx: ParallelContext) -> None:
    vlm = encoder(tiny_model_config(), ctx)
    with pytest.raises(ValueError, match="48 pixel values, but 1 pictures of 2 patches of 4 px have 96"):
        vlm.vision(torch.zeros(48, dtype=torch.uint8), [(1, 2)])
    with pytest.raises(ValueError, match="3 x 4 patches does not divide"):
        pixel_shuffle(torch.zeros(1, 12, 5), 2, (3, 4))


def test_pixel_shuffle_of_a_rectangle() -> None:
    x = torch.arange(4 * 6).view(1, 24, 1)
    out = pixel_shuffle(x, 2, (4, 6))
    assert out[0].tolist() == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23],
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- LLaVA-NeXT


ANYRES_GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]


def with_newline(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"projector": model.projector.model_copy(update={"image_newline": True})})


def llava_next(model: ModelConfig) -> Any:
    """A random LlavaNextForConditionalGeneration of the shape of ours."""
    from megavlm.checkpoint.hf import TokenIds
    from megavlm.checkpoint.hf.config import config_to_hf, quiet_transformers

    base = config_to_hf(model, TokenIds(image=IMAGE_TOKEN_ID))
    side = model.vision.image_size_px
    tf = quiet_transformers()
    torch.manual_seed(3)
    hf = tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            **{name: base[name] for name in ("vision_config", "text_config", "vision_feature_layer", "vision_feature_select_strategy")},
            image_token_index=IMAGE_TOKEN_ID,
            image_grid_pinpoints=[[side * rows, side * columns] for rows, columns in ANYRES_GRIDS],
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return hf


@in_rank
def test_anyres_logits_equal_llava_next(ctx: ParallelContext) -> None:
    """The weights of a random LLaVA-NeXT in our model: equal visual tokens and logits, after its own `pack_image_features` with
    unpadding and newlines."""
    from megavlm.checkpoint.hf.registry import family
    from megavlm.checkpoint.hf.tensors import to_ours

    plain = tiny_model_config()
    model, hf, kind = with_newline(plain), llava_next(plain), family("llava_next")
    state = {kind.disk_name(name): parameter for name, parameter in hf.state_dict().items()}
    table = {link.key: link for link in kind.links(model)}
    vlm = encoder(model, ctx)

    def provide(key: str, shape: tuple[int, ...], where: tuple[slice, ...]) -> torch.Tensor:
        return to_ours(table[key], lambda name, first, last: state[name][first:last], where)

    assign([vlm], provide, ctx)
    resizing = make_resizing(ImageConfig(policy="anyres", anyres_grids=ANYRES_GRIDS), model)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.vision.image_mean, model.vision.image_std))
    for width, height in ((40, 30), (16, 16), (100, 20), (13, 47)):
        plan = resizing.grid(width, height)
        tiles = torch.stack(flat_pictures([(4, 4)] * plan.work.tiles, seed=width))
        ids = [5, *[IMAGE_TOKEN_ID] * plan.tokens, 7, 9]
        prompt = Prompt(ids, tiles_TCHW=tiles, feature_rows_N=torch.from_numpy(resizing.feature_rows(plan, width, height)))
        batch = prompt_batch([prompt], IMAGE_TOKEN_ID, model)
        with torch.no_grad():
            features = vlm.embed(batch)[batch.image_positions_N, 0]
            logits = vlm.language.logits(vlm.transform(batch, vlm.packing(batch)))
            inputs = {"pixel_values": ((tiles / 255 - mean) / std).unsqueeze(0), "image_sizes": torch.tensor([[height, width]])}
            theirs = hf.get_image_features(**inputs, return_dict=True).pooler_output[0]
            their_logits = hf(input_ids=torch.tensor([ids]), **inputs).logits[0]
        assert features.shape == theirs.shape == (plan.tokens, 48)
        assert float((features - theirs).abs().max()) <= 1e-4 * max(1.0, float(theirs.abs().max()))
        assert float((logits - their_logits).abs().max()) <= 1e-4 * max(1.0, float(their_logits.abs().max()))


@pytest.mark.parametrize("policy", ["native", "anyres"])
@in_rank
def test_prompts_generated_together_answer_as_alone(policy: str, ctx: ParallelContext) -> None:
    model = tiny_model_config() if policy == "native" else with_newline(tiny_model_config())
    vlm = encoder(model, ctx)
    prompts = [Prompt([5, 6, 7])]
    for i, grids in enumerate(([(2, 3)], [(4, 4), (1, 5)], [(7, 2)])):
        if policy == "native":
            pixels = torch.cat([p.flatten() for p in flat_pictures(grids, seed=i)])
            prompts.append(Prompt([4, *[IMAGE_TOKEN_ID] * sum(r * c for r, c in grids), 8 + i], pixels_X=pixels, tile_grids=grids))
        else:
            tiles = torch.stack(flat_pictures([(4, 4)] * len(grids), seed=i))
            rows = torch.tensor([3, 1, -1, 16 * len(grids) - 1, -1])
            prompts.append(Prompt([4, *[IMAGE_TOKEN_ID] * 5, 8 + i], tiles, feature_rows_N=rows))
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": [], "image_token_id": IMAGE_TOKEN_ID}
    together = generate(vlm, prompts, **options)
    assert together == [generate(vlm, [prompt], **options)[0] for prompt in prompts]
    # Another picture gives another answer: the features are really looked up.
    swapped = replace(prompts[2], pixels_X=prompts[2].pixels_X.flip(0)) if policy == "native" else replace(
        prompts[2], tiles_TCHW=prompts[2].tiles_TCHW.flip(0, 2)
    )  # fmt: skip
    assert generate(vlm, [swapped], **options)[0] != together[2]


@in_rank
def test_prompts_with_wrong_pixels_or_rows_are_refused(ctx: ParallelContext) -> None:
    vlm = encoder(tiny_model_config(), ctx)
    options: dict[str, Any] = {"max_new_tokens": 2, "stop_ids": [], "image_token_id": IMAGE_TOKEN_ID}
    six = [IMAGE_TOKEN_ID] * 6
    with pytest.raises(PromptError, match=r"prompt 0: 3 values of torch.uint8, but its grids \[\(2, 3\)\] need 288"):
        generate(vlm, [Prompt(six, pixels_X=torch.zeros(3, dtype=torch.uint8), tile_grids=[(2, 3)])], **options)
    with pytest.raises(PromptError, match="6 image placeholders .*, but 1 pictures make 4 visual tokens"):
        generate(vlm, [Prompt(six, pixels_X=torch.zeros(192, dtype=torch.uint8), tile_grids=[(2, 2)])], **options)
    rows = torch.tensor([0, 1, 2, 3, 4, -1])
    with pytest.raises(PromptError, match=r"feature rows from -1 to 4.*image_newline is false"):
        generate(vlm, [Prompt(six, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), feature_rows_N=rows)], **options)


@in_rank
def test_a_row_end_without_image_newline_is_refused(ctx: ParallelContext) -> None:
    vlm = encoder(tiny_model_config(), ctx)
    with pytest.raises((IndexError, RuntimeError)):
        vlm.projector(vlm.vision(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), torch.tensor([0, 1, -1]))


@in_rank
def test_image_newline_starts_as_llava_next_and_does_not_decay(ctx: ParallelContext) -> None:
    vlm = encoder(with_newline(tiny_model_config(hidden_size=4096, num_attention_heads=64, num_query_groups=64)), ctx)
    newline = vlm.projector.image_newline
    assert float(newline.std()) == pytest.approx(4096**-0.5, rel=0.05)
    assert not decays("projector.image_newline", newline)
