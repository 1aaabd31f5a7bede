"""Layouts beyond those of the table: sequence parallelism and virtual pipeline stages compute Hugging Face's logits too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint.hf import config_from_hf
from megavlm.data.prompt import Prompt
from megavlm.testing.families import CASES
from megavlm.testing.families.case import hf_logits, image_token_of, make_hf, prompts_of
from megavlm.testing.families.in_ranks import logits_of_packs
from megavlm.testing.pool import RankPool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2xVPP2 unequal": (2, {"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [0, 1, 3, 0]}),
    "TP2+SPxPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
}
NAMES = ("LLaVA-1.5", "LLaVA-1.5, SigLIP, Qwen2 tied", "Llama 2, Vicuna")


def even(prompts: list[Prompt]) -> list[Prompt]:
    """Sequence parallelism splits a pack in two: its last sample gives up a token where the number is odd."""
    total = sum(len(prompt.ids) for prompt in prompts)
    last = prompts[-1]
    return prompts if total % 2 == 0 else [*prompts[:-1], Prompt(list(last.ids)[:-1], last.tiles_TCHW, sizes=last.sizes)]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_hugging_face(pool: RankPool, tmp_path: Path, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    hf = make_hf(case, tmp_path)
    model, token = config_from_hf(tmp_path), image_token_of(case, hf.config)
    prompts = even(prompts_of(case, model, token))
    expected = torch.cat(hf_logits(case, hf, model, prompts))
    for layout, (world_size, parallel) in LAYOUTS.items():
        results = pool.run(logits_of_packs, tmp_path, parallel, [prompts], -1 if token is None else token, world_size=world_size)
        found = [pack for result in results if result is not None for pack in result]
        assert found
        for logits in found:
            assert (logits - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max())), layout
