"""Image processors of Hugging Face folders: what they do to a picture, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.reading import read_json
from megavlm.config.data import Interpolation
from megavlm.config.schema import ImageConfig, VisionConfig

INTERPOLATIONS: dict[int, Interpolation] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's code of a kernel, which `resample` holds -> data.image.interpolation."""
_REFUSED = {0: "nearest", 4: "box", 5: "hamming"}
_OWN_RESAMPLE = {"Idefics3": 1, "SmolVLM": 1, "Idefics2": 2, "Gemma3": 2, "Mllama": 2, "Siglip2": 2, "ViT": 2, "DINOv3ViT": 2}
"""Class of an image processor -> its `resample` where the file says none (transformers 5.23); all others: 3."""
FILES = ("processor_config.json", "preprocessor_config.json")
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


def processor_block(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image processor's settings and the file they stand in; ({}, folder) when there is no processor."""
    for name in FILES:
        if (folder / name).is_file():
            block = read_json(folder / name)
            block = block.get("image_processor", block)
            if "size" in block or "image_mean" in block:
                return block, folder / name
    return {}, folder


def pixel_statistics(folder: Path) -> Statistics | None:
    """Mean and standard deviation of the folder's image processor; None when it says none.

    Raises:
        HuggingFaceError: pixels that are not rescaled by 1/255 and normalised.
    """
    block, file = processor_block(folder)
    if "image_mean" not in block or "image_std" not in block:
        return None
    rescaled = block.get("do_rescale", True) and abs(block.get("rescale_factor", 1 / 255) * 255 - 1) <= 1e-6
    if not block.get("do_normalize", True) or not rescaled:
        raise HuggingFaceError(f"{file}: pixels must be rescaled by 1/255 and normalised (do_rescale, rescale_factor, do_normalize)")
    return tuple(map(float, block["image_mean"])), tuple(map(float, block["image_std"]))  # type: ignore[return-value]


def normalising(vision: VisionConfig) -> dict[str, Any]:
    """Settings that every image processor shares."""
    return {
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def crop_or_stretch_processor(vision: VisionConfig, image: ImageConfig) -> dict[str, Any]:
    """An image processor that makes one square tile of each picture, as data.image.fit says."""
    side = {"height": vision.image_size_px, "width": vision.image_size_px}
    crops, pads = image.fit == "crop", image.fit == "pad"
    return {
        "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
        **({"do_pad": True} if pads else {}),
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size_px} if crops else side,
        "resample": resample_of(image),
        "do_center_crop": crops,
        "crop_size": side,
        **normalising(vision),
    }


def interpolation_of(block: dict[str, Any], file: Path, processor: str) -> Interpolation:
    """How an image processor with these settings resizes; `processor` is its class where they do not name it.

    Raises:
        HuggingFaceError: by a kernel that data.image.interpolation has not.
    """
    named = block.get("image_processor_type") or processor
    resample = block.get("resample")
    if resample is None:
        resample = _OWN_RESAMPLE.get(named.removesuffix("Fast").removesuffix("ImageProcessor"), 3)
    if resample not in INTERPOLATIONS:
        name = f" ({_REFUSED[resample]})" if resample in _REFUSED else ""
        supported = ", ".join(f"{code} ({ours})" for code, ours in INTERPOLATIONS.items())
        raise HuggingFaceError(f"{file}: resample is {resample}{name}, supported: {supported}")
    return INTERPOLATIONS[resample]


def resample_of(image: ImageConfig) -> int:
    """data.image.interpolation as `resample` of an image processor."""
    return next(code for code, ours in INTERPOLATIONS.items() if ours == image.interpolation)


def image_fit(block: dict[str, Any], file: Path) -> Literal["stretch", "crop", "pad"]:
    """What an image processor's settings do to a picture that is no square.

    Raises:
        HuggingFaceError: a size that is neither a square nor a shortest edge cut to one.
    """
    size = block["size"] if isinstance(block["size"], dict) else {"shortest_edge": block["size"]}
    crops = block.get("do_center_crop", False)
    crop_size = block.get("crop_size", size)
    sides = set(crop_size.values()) if isinstance(crop_size, dict) else {crop_size}
    is_square = {"height", "width"} <= size.keys() and size["height"] == size["width"]
    if block.get("do_pad", False) and is_square:
        return "pad"
    if is_square and (not crops or sides == {size["height"]}):
        return "stretch"
    if crops and sides == {size.get("shortest_edge")}:
        return "crop"
    raise HuggingFaceError(f"{file}: size {size}, do_center_crop={crops}, crop_size {crop_size}: none of data.image.fit=stretch, crop, pad")
