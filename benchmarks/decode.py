"""Images a second and core: JPEG bytes to pixels of tiles or of native resolution, decoder by decoder, beside Hugging Face and Pillow.

    python benchmarks/decode.py [--rounds 9] [--out benchmarks/results/decode.json]

Eight JPEGs of 1.2 megapixels (quality 90; 3:2, 4:3, 3:4 and 16:9), enlarged from scikit-learn's two photographs.

    megavlm, pillow        PillowDecoder and the policy's `cut`: uint8 pixels, which are normalised on the device
    megavlm, nvimgcodec    the same with nvImageCodec on the CPU
    hf                     the family's Hugging Face processor on Pillow, as a training script calls it: float32, normalised
    hf, uint8              the same without rescaling and normalising: what remains is resizing, cutting and copies
    pillow alone           Image.open, convert, resize, crop, and one array at the end; no token is counted, nothing is checked

    tiles     InternVL: at most 12 tiles of 448 pixels and a thumbnail
    anyres    LLaVA-NeXT: grids of up to 4 tiles of 336 pixels and the whole picture
    native    Qwen2-VL: patches of 14 pixels, 2 x 2 a token

One thread; CPU seconds of the process, since the machine may be shared; routes take turns in each round, each route's best round counts.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.decode import ImageDecoder, NvImageCodecDecoder, PillowDecoder, nvimgcodec_available
from megavlm.data.resizing import make_resizing
from megavlm.tracking.environment import environment_report

Route = Callable[[bytes], Any]
SHAPES = ((1344, 896), (1268, 951), (951, 1268), (1460, 822))
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
CASES: dict[str, dict[str, Any]] = {
    "tiles": {"policy": "tiles", "max_tiles": 12, "thumbnail": True},
    "anyres": {"policy": "anyres"},
    "native": {"policy": "native"},
}


def photographs() -> list[bytes]:
    """The two photographs in four shapes, as JPEG."""
    from sklearn.datasets import load_sample_images

    made = []
    for pixels in load_sample_images().images:
        for size in SHAPES:
            file = io.BytesIO()
            Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            made.append(file.getvalue())
    return made


def ours(case: str, decoder: ImageDecoder) -> Route:
    """Plan, decode, resize, cut."""
    vision = {"image_size_px": 336 if case == "anyres" else 448, "patch_size_px": 14}
    projector = {"pixel_shuffle": 1 if case == "anyres" else 2, "image_newline": case == "anyres"}
    model = ModelConfig.model_validate({"vision": vision, "projector": projector})
    resizing = make_resizing(ImageConfig.model_validate(CASES[case]), model)

    def route(data: bytes) -> Any:
        picture = decoder.decode(data)
        return resizing.cut(picture, resizing.grid(picture.shape[1], picture.shape[0]))

    return route


def hugging_face(case: str, normalise: bool) -> Route:
    """The family's processor, its Pillow backend."""
    import transformers

    raw = {} if normalise else {"do_rescale": False, "do_normalize": False}
    processor: Any
    if case == "tiles":
        size = {"height": 448, "width": 448}
        processor = transformers.GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=12, **raw)
    elif case == "anyres":
        side = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        pinpoints = [[336 * rows, 336 * cols] for rows, cols in GRIDS]
        processor = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **side, **raw)
    else:
        limits = {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}
        processor = transformers.Qwen2VLImageProcessorPil(size=limits, **raw)
    return lambda data: processor(Image.open(io.BytesIO(data)), return_tensors="pt")


def pillow_alone(case: str) -> Route:
    """What one would write by hand, with the plan given."""
    shapes = {size: _grid(case, size) for size in SHAPES}

    def route(data: bytes) -> Any:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        if case == "native":
            width, height = (round(v / 28) * 28 for v in picture.size)
            return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        side = 336 if case == "anyres" else 448
        cols, rows = shapes[picture.size]
        large = picture.resize((cols * side, rows * side), Image.Resampling.BICUBIC)
        boxes = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r in range(rows) for c in range(cols)]
        tiles = [large.crop(box) for box in boxes] + [picture.resize((side, side), Image.Resampling.BICUBIC)]
        return np.stack([np.asarray(tile) for tile in tiles])

    return route


def _grid(case: str, size: tuple[int, int]) -> tuple[int, int]:
    vision = {"image_size_px": 336 if case == "anyres" else 448, "patch_size_px": 14}
    grid = make_resizing(ImageConfig.model_validate(CASES[case]), ModelConfig.model_validate({"vision": vision})).grid(*size)
    return grid.cols, grid.rows


def measure(routes: dict[str, Route], pictures: list[bytes], rounds: int) -> dict[str, float]:
    """Images a CPU second of each route, its best round."""
    best = dict.fromkeys(routes, float("inf"))
    for _ in range(rounds):
        for name, route in routes.items():
            begin = time.process_time()
            for data in pictures:
                route(data)
            best[name] = min(best[name], time.process_time() - begin)
    return {name: len(pictures) / seconds for name, seconds in best.items()}


def main() -> None:
    """Measure each case, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pictures = photographs()
    decoders: dict[str, ImageDecoder] = {"megavlm, pillow": PillowDecoder()}
    if nvimgcodec_available():
        decoders["megavlm, nvimgcodec"] = NvImageCodecDecoder()
    results: dict[str, Any] = {}
    decoding: dict[str, Route] = {name: decoder.decode for name, decoder in decoders.items()}
    decoding["pillow alone"] = lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    results["decode only"] = measure(decoding, pictures, arguments.rounds)
    for case in CASES:
        routes = {name: ours(case, decoder) for name, decoder in decoders.items()}
        routes |= {"hf": hugging_face(case, True), "hf, uint8": hugging_face(case, False), "pillow alone": pillow_alone(case)}
        results[case] = measure(routes, pictures, arguments.rounds)
    for case, speeds in results.items():
        print(f"{case}")
        for name, speed in speeds.items():
            beside = f"  {speeds['megavlm, pillow'] / speed:5.2f} x slower than megavlm, pillow"
            print(f"    {name:22s} {speed:7.1f} images/s a core{beside}")
    report = {"command": " ".join(["python", *sys.argv]), "images_per_cpu_second": results, "environment": environment_report()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
