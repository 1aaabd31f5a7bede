"""Pictures a second: JPEG bytes to pixels, by Pillow on one core, by nvImageCodec and DALI with several threads.

Wall time. On a GPU the pixels of nvImageCodec come back to host memory, as megavlm's loader takes them, and stay on the GPU in `batch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from gpu.runner import Place, Task, Unavailable


def tasks(section: str, place: Place) -> dict[str, Task]:
    threads = (1, 2) if place.tiny else (4, 8, 16)
    made: dict[str, Task] = {"pillow, one core": lambda: decode_by("pillow", 1, place)}
    for number in threads:
        made[f"nvimgcodec, {number} threads"] = partial(decode_by, "nvimgcodec", number, place)
        made[f"nvimgcodec batch, {number} threads"] = partial(nvimgcodec_batch, number, place)
        made[f"dali, {number} threads"] = partial(dali, number, place)
    made["tiles: pillow, one core"] = lambda: decode_by("pillow", 1, place, tiles=True)
    made |= {f"tiles: auto, {number} threads": partial(decode_by, "auto", number, place, tiles=True) for number in threads}
    return made


def _pictures(place: Place) -> list[bytes]:
    from decode import photographs

    return photographs()[: 2 if place.tiny else None] * (1 if place.tiny else 32)


def _rate(run: Callable[[], object], number: int, place: Place, **more: Any) -> dict[str, Any]:
    """The best of some rounds, behind one that warms up."""
    best = float("inf")
    for _ in range(2 if place.tiny else 4):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return {"pictures": number, "pictures_per_s": number / best, **more}


def decode_by(name: Any, threads: int, place: Place, tiles: bool = False) -> dict[str, Any]:
    """megavlm's decoder, a picture a call; with `tiles` on to InternVL's uint8 tiles."""
    import torch
    from decode import ours

    from megavlm.data.decode import make_decoder, nvimgcodec_available

    if name == "nvimgcodec" and not nvimgcodec_available():
        raise Unavailable("nvidia-nvimgcodec is not installed")
    torch.set_num_threads(1)
    decoder, pictures = make_decoder(name, place.device), _pictures(place)
    if threads == 1:
        pictures = pictures[:16]
    route = ours("tiles", decoder) if tiles else decoder.decode
    with ThreadPoolExecutor(threads) as pool:
        return _rate(lambda: list(pool.map(route, pictures)), len(pictures), place, decoder=decoder.name)


def nvimgcodec_batch(threads: int, place: Place) -> dict[str, Any]:
    """nvImageCodec's own batched call: what the library can do."""
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise Unavailable(f"nvidia-nvimgcodec is not installed: {error}") from error
    from megavlm.data.decode import _CPU_DEVICE

    where: dict[str, Any] = {"device_id": 0}
    if place.device == "cpu":
        where = {"device_id": _CPU_DEVICE, "backends": [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]}
    decoder, pictures = nvimgcodec.Decoder(max_num_cpu_threads=threads, **where), _pictures(place)

    def run() -> None:
        made = decoder.decode(pictures)
        if any(picture is None for picture in made):
            raise RuntimeError("nvImageCodec did not decode every picture")
        _wait(place)

    return _rate(run, len(pictures), place)


def dali(threads: int, place: Place) -> dict[str, Any]:
    """A DALI pipeline of its decoder alone, pixels left where it decodes."""
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise Unavailable(f"DALI is not installed: {error}") from error
    import numpy as np

    pictures = [np.frombuffer(data, dtype=np.uint8) for data in _pictures(place)]
    device_id = 0 if place.device == "cuda" else None
    pipeline = Pipeline(batch_size=len(pictures), num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=lambda: pictures, batch=True)
        kind = "mixed" if device_id is not None else "cpu"
        pipeline.set_outputs(fn.decoders.image(encoded, device=kind, output_type=types.RGB))
    pipeline.build()

    def run() -> None:
        pipeline.run()
        _wait(place)

    return _rate(run, len(pictures), place)


def _wait(place: Place) -> None:
    if place.device == "cuda":
        import torch

        torch.cuda.synchronize()
