"""Parameters and FLOPs of Qwen-VL's encoders and mergers, against transformers' modules and torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.planner.flops import FlopsModel, VisionWork
from megavlm.planner.parameters import params
from megavlm.testing.families.case import Case
from megavlm.testing.families.qwen_vl import CASES

GRIDS = [(8, 8), (4, 12)]
"""Patches of pictures that are whole windows of 4 x 4."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_and_flops_are_those_of_transformers(case: Case) -> None:
    config = case.config(quiet_transformers())
    config._attn_implementation = config.vision_config._attn_implementation = "eager"
    hf = getattr(quiet_transformers(), case.kind.hf_class)(config)
    model = case.kind.model_from_hf(config, Problems())
    visual, counts = hf.model.visual, params(model)
    merger = sum(p.numel() for n, p in visual.named_parameters() if "merger" in n)
    assert counts["projector"].total == merger
    assert counts["vision"].total == sum(p.numel() for p in visual.parameters()) - merger
    assert counts["vision"].carried == 0
    assert sum(count.total for count in counts.values()) == sum(p.numel() for p in hf.parameters())

    sizes = [rows * columns for rows, columns in GRIDS]
    values = model.vision.num_channels * model.vision.temporal_patch_size * model.vision.patch_size_px**2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        visual(torch.rand(sum(sizes), values), grid_thw=torch.tensor([[1, *grid] for grid in GRIDS]))
    ours = FlopsModel(model).pack([], VisionWork.of(sizes), 0)
    assert ours.forward == counter.get_total_flops()


def test_windows_make_attention_cheaper() -> None:
    case = next(case for case in CASES if case.family == "qwen2_5_vl" and not case.slow)
    model = case.kind.model_from_hf(case.config(quiet_transformers()), Problems())
    whole = model.vision.model_copy(update={"attention_window_px": None, "full_attention_layers": []})
    work = VisionWork.of([64])
    windows, full = (
        FlopsModel(model.model_copy(update={"vision": vision})).pack([], work, 0).by_part["vision.attention"].forward
        for vision in (model.vision, whole)
    )
    # Two of three layers see 16 of 64 patches.
    assert windows * 6 == full * 3
