"""Pictures of odd sizes: grids of tiles as the processors of LLaVA-NeXT, LLaVA-OneVision and InternVL cut them, from exported files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import config_from_hf
from megavlm.checkpoint.hf.config import config_to_hf
from megavlm.checkpoint.hf.families.base import normalised
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.texts import Texts
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.blends import shrunk, single
from megavlm.data.chat import Chat
from megavlm.data.picture_plans import plan_all
from megavlm.data.resizing import make_resizing, plan_pictures
from megavlm.data.tokenizer import load_tokenizer, train_sentencepiece
from megavlm.models.projectors.arrange import arranged
from megavlm.testing.families import CASES
from megavlm.testing.families.case import make_hf

NAMES = ["LLaVA-NeXT", "LLaVA-NeXT, SigLIP", "LLaVA-OneVision", "LLaVA-OneVision, shrunk features", "InternVL3"]
SIZES = [(16, 16), (40, 30), (100, 20), (13, 47), (33, 35), (7, 90)]
"""(width, height)"""
SPECIALS = ["<image>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_sentencepiece(["a cat sat on 12 mats", "what number is in the picture? 7 and 34"] * 20, file, 300, SPECIALS)
    return file


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder with everything but weights, model, image, chat) of a model that was trained here."""
    case = next(case for case in CASES if case.name == request.param)
    root = tmp_path_factory.mktemp("tiles")
    make_hf(case, root / "hf")
    model, image = config_from_hf(root / "hf"), ImageConfig.model_validate(case.image)
    if case.family == "internvl":
        image = image.model_copy(update={"marks": family("internvl").image_from_hf(root / "hf", model).marks})
    chat = Chat("megavlm", load_tokenizer(tokenizer_file, "<IMG_CONTEXT>" if case.family == "internvl" else "<image>"))
    model = model.model_copy(update={"language": model.language.model_copy(update={"vocab_size": chat.tokenizer.vocab_size})})
    write(root / "out", model, chat, image)
    return root / "out", model, image, chat


def write(folder: Path, model: ModelConfig, chat: Chat, image: ImageConfig) -> None:
    texts = Texts.given(model, chat, image)
    assert texts is not None
    texts.check()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model, texts.ids) | texts.picture_config()))
    texts.write(folder)


def picture(width: int, height: int) -> np.ndarray:
    """Smooth: Pillow's resizing, which the processors use without torchvision, is within two levels of torch's."""
    ramp = np.add.outer(np.arange(height) * 160 / height, np.arange(width) * 80 / width)
    return (ramp[..., None] + np.array([0, 7, 14])).astype(np.uint8)


def image_processor(folder: Path) -> Any:
    """transformers' image processor of the exported settings, on Pillow."""
    tf = quiet_transformers()
    block = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    return getattr(tf, block["image_processor_type"] + "Pil")(**block)


def ours(model: ModelConfig, image: ImageConfig, sizes: list[tuple[int, int]]) -> tuple[list[torch.Tensor], list[int]]:
    """Normalised tiles of each picture of one sample, and its visual tokens."""
    resizing = make_resizing(image, model)
    grids = plan_pictures(sizes, resizing, image)
    tiles = [normalised(model.vision, resizing.cut(picture(*size), grid)) for size, grid in zip(sizes, grids, strict=True)]
    return tiles, [grid.tokens for grid in grids]


def assert_levels(model: ModelConfig, got: torch.Tensor, want: torch.Tensor) -> None:
    """Within two of 256 levels."""
    assert got.shape == want.shape
    std = torch.tensor(model.vision.image_std).view(3, 1, 1)
    assert float(((got - want) * std * 255).abs().max()) <= 2.02


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_tiles_and_settings_of_other_kernels(exported: Any, interpolation: str, tmp_path: Path) -> None:
    _, model, image, chat = exported
    other = image.model_copy(update={"interpolation": interpolation})
    write(tmp_path / "other", model, chat, other)
    assert family(model.family).image_from_hf(tmp_path / "other", model) == other
    for size in SIZES:
        out = image_processor(tmp_path / "other")(images=[Image.fromarray(picture(*size))], return_tensors="pt")
        (tiles,), _ = ours(model, other, [size])
        assert_levels(model, tiles, out["pixel_values"] if "num_patches" in out else out["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_one_picture(exported: Any, size: tuple[int, int]) -> None:
    folder, model, image, _ = exported
    out = image_processor(folder)(images=[Image.fromarray(picture(*size))], return_tensors="pt")
    theirs = out["pixel_values"] if "num_patches" in out else out["pixel_values"][0]
    (tiles,), _ = ours(model, image, [size])
    assert_levels(model, tiles, theirs)


def test_several_pictures_of_a_sample(exported: Any) -> None:
    folder, model, image, _ = exported
    sizes = SIZES[1:4]
    pictures = [Image.fromarray(picture(*size)) for size in sizes]
    nested = model.family == "llava_onevision"
    out = image_processor(folder)(images=[pictures] if nested else pictures, return_tensors="pt")
    tiles, _ = ours(model, image, sizes)
    if "num_patches" in out:
        theirs = out["pixel_values"].split([int(n) for n in out["num_patches"]])
    else:
        theirs = [padded[: len(own)] for padded, own in zip(out["pixel_values"], tiles, strict=True)]
        assert max(map(len, tiles)) == out["pixel_values"].shape[1]
    for own, their in zip(tiles, theirs, strict=True):
        assert_levels(model, own, their)
    if nested:
        assert [len(own) for own in tiles] == [1, 1, 1]


def test_visual_tokens_and_prompt(exported: Any) -> None:
    """The whole processor loads, and expands each picture to as many tokens as training does, in the same text."""
    folder, model, image, chat = exported
    tf = quiet_transformers()
    kind = family(model.family)
    tokenizer = tf.AutoTokenizer.from_pretrained(str(folder))
    block = json.loads((folder / "processor_config.json").read_text())
    options = {name: value for name, value in block.items() if name not in ("processor_class", "image_processor", "video_processor")}
    cls = getattr(tf, kind.processor_class or "")
    # Built by hand: the video processors that two of the classes ask for need torchvision.
    processor = cls.__new__(cls)
    original = tf.ProcessorMixin.__init__
    try:
        tf.ProcessorMixin.__init__ = lambda self, *parts, **named: None
        cls.__init__(processor, image_processor=None, tokenizer=tokenizer, **options)
    finally:
        tf.ProcessorMixin.__init__ = original
    processor.image_processor, processor.tokenizer = image_processor(folder), tokenizer
    for sizes in ([size] for size in SIZES):
        out = processor.image_processor(images=[Image.fromarray(picture(*size)) for size in sizes], return_tensors="pt")
        text = processor.replace_image_token(out, 0)
        _, (tokens,) = ours(model, image, sizes)
        assert tokenizer(text, add_special_tokens=False)["input_ids"].count(chat.tokenizer.image_token_id) == tokens
        assert text == image.marks.before + chat.tokenizer.image_token * tokens + image.marks.after
    if model.family == "llava_onevision":
        out = processor.image_processor(images=[[Image.fromarray(picture(*size)) for size in SIZES[:2]]], return_tensors="pt")
        _, both = ours(model, image, SIZES[:2])
        assert [processor.replace_image_token(out, i).count("<image>") for i in range(2)] == both


def test_settings_there_and_back(exported: Any) -> None:
    folder, model, image, _ = exported
    found = family(model.family).image_from_hf(folder, model)
    assert found == image
    statistics = config_from_hf(folder).vision
    assert (statistics.image_mean, statistics.image_std) == (model.vision.image_mean, model.vision.image_std)


def test_other_pictures_are_refused(exported: Any, tokenizer_file: Path, tmp_path: Path) -> None:
    _, model, image, chat = exported
    wrong = [ImageConfig(), ImageConfig(policy="native"), image.model_copy(update={"max_tokens_per_image": 50})]
    if model.family == "llava_onevision":
        wrong.append(image.model_copy(update={"anyres_several": "alike"}))
    if model.family == "internvl":
        wrong.append(image.model_copy(update={"thumbnail": False}))
        with pytest.raises(HuggingFaceError, match="data.image_token='<image>'"):
            write(tmp_path / "x", model, Chat("megavlm", load_tokenizer(tokenizer_file)), image)
    for one in wrong:
        with pytest.raises(HuggingFaceError, match=r"the model was trained with data\.image\."):
            write(tmp_path / "x", model, chat, one)
    assert not (tmp_path / "x").exists()


def test_settings_that_are_not_ours_are_refused(exported: Any, tmp_path: Path) -> None:
    folder, model, _, _ = exported
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())
    changes: list[tuple[dict[str, Any], dict[str, Any], str]] = [({}, {"size": {"height": 99, "width": 99}}, "size is")]
    if model.family != "internvl":
        changes.append(({"image_grid_pinpoints": [[17, 16]]}, {"image_grid_pinpoints": [[17, 16]]}, "are no multiples of the encoder's"))
        changes.append(({"image_grid_pinpoints": [[36, 36]]}, {}, "they must be the same"))
    if model.family == "llava_onevision":
        changes.append(({"vision_aspect_ratio": "square"}, {}, "vision_aspect_ratio is 'square'"))
    for other, own, message in changes:
        (tmp_path / "config.json").write_text(json.dumps(config | other))
        (tmp_path / "processor_config.json").write_text(json.dumps({**processor, "image_processor": processor["image_processor"] | own}))
        with pytest.raises(HuggingFaceError, match=message):
            family(model.family).image_from_hf(tmp_path, model)


def test_shrunk_features_are_torchs_bilinear() -> None:
    """As `pack_image_features` of LLaVA-OneVision interpolates them, to the rounding of the weights."""
    x = torch.randn(7, 11, 5, generator=torch.Generator().manual_seed(1))
    rows = torch.from_numpy(shrunk(np.arange(77).reshape(7, 11), 4, 9)).reshape(-1, 4)
    newline = torch.zeros(5)
    got = arranged(x.flatten(0, 1), rows, newline).view(4, 9, 5)
    want = torch.nn.functional.interpolate(x.permute(2, 0, 1)[None], size=(4, 9), mode="bilinear")[0].permute(1, 2, 0)
    assert float((got - want).abs().max()) <= 1e-5
    whole = torch.from_numpy(single(np.array([3, -1, 0])))
    assert torch.equal(arranged(x.flatten(0, 1), whole, newline + 7), torch.stack([x[0, 3], newline + 7, x[0, 0]]))


def test_one_of_several_is_one_tile_whatever_its_size(exported: Any) -> None:
    _, model, image, _ = exported
    side = model.vision.image_size_px
    tiles = [g.work.tiles for g in plan_pictures([(2 * side, 2 * side), (side, side)], make_resizing(image, model), image)]
    assert (tiles == [1, 1]) == (model.family == "llava_onevision")


def test_plans_of_all_samples_at_once(exported: Any) -> None:
    """What the index stores is what each sample gets alone."""
    _, model, image, _ = exported
    samples = [[SIZES[1]], SIZES[1:4], [], [SIZES[4], SIZES[1]], [SIZES[5]]]
    resizing = make_resizing(image, model)
    flat = [size for sizes in samples for size in sizes]
    starts = np.cumsum([0, *map(len, samples)])
    widths, heights = (np.array([size[i] for size in flat]) for i in range(2))
    plans = plan_all(widths, heights, starts, resizing, image)
    alone = [grid for sizes in samples for grid in plan_pictures(sizes, resizing, image)]
    assert plans.columns["tokens"].tolist() == [grid.tokens for grid in alone]
    assert plans.columns["tiles"].tolist() == [grid.work.tiles for grid in alone]


def test_a_model_without_newline_is_no_llava_next(exported: Any) -> None:
    _, model, _, _ = exported
    if model.family == "internvl":
        return
    plain = model.model_copy(update={"projector": model.projector.model_copy(update={"image_newline": False})})
    with pytest.raises(HuggingFaceError, match="image_newline is false"):
        config_to_hf(plain, replace(Texts.given(model, exported[3], exported[2]).ids))  # type: ignore[union-attr]
