"""FLOPs of resamplers and of Mistral 3's merger against torch's own counter on Hugging Face's modules, for every way of freezing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.config.schema import MixtureEntry, ModuleTraining, StageConfig
from megavlm.planner.flops import VisionWork, pack_flops
from megavlm.testing.families import CASES

FROZEN, FULL = ModuleTraining(train="frozen"), ModuleTraining(train="full")
GRIDS = [(4, 6), (2, 8)]


def connector(name: str) -> tuple[Any, Any]:
    """Our model block and Hugging Face's module between encoder and LLM."""
    tf = quiet_transformers()
    case = next(case for case in CASES if case.family == name)
    config = case.config(tf)
    config._attn_implementation = "eager"
    whole = getattr(tf, case.kind.hf_class)(config)
    model = case.kind.model_from_hf(config, Problems())
    return model, whole.model.connector if name == "idefics2" else whole.model.multi_modal_projector


def run(name: str, module: Any, x_ND: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    if name == "idefics2":
        return module(x_ND[None], torch.ones(1, len(x_ND), dtype=torch.bool))  # type: ignore[no-any-return]
    return module(x_ND, [[4 * n for n in grid]])  # type: ignore[no-any-return]


@pytest.mark.parametrize("encoder_trains", [False, True])
@pytest.mark.parametrize("projector_trains", [False, True])
@pytest.mark.parametrize("name", ["idefics2", "mistral3"])
def test_projector(name: str, projector_trains: bool, encoder_trains: bool) -> None:
    model, module = connector(name)
    module.requires_grad_(projector_trains)
    forward = backward = 0
    for grid in GRIDS:
        x_ND = torch.randn(grid[0] * grid[1], model.vision.hidden_size, requires_grad=encoder_trains)
        with FlopCounterMode(display=False) as counter:
            out = run(name, module, x_ND, grid)
        forward += counter.get_total_flops()
        if projector_trains or encoder_trains:
            with FlopCounterMode(display=False) as counter:
                out.sum().backward()
            backward += counter.get_total_flops()
    trains = {True: FULL, False: FROZEN}
    stage = StageConfig(
        name="s",
        steps=1,
        mixture={"a": MixtureEntry(weight=1.0)},
        vision=trains[encoder_trains],
        projector=trains[projector_trains],
        language=FULL,
    )
    part = pack_flops(model, [], VisionWork.of([r * c for r, c in GRIDS]), 0, stage).by_part["projector"]
    assert (part.forward, part.backward) == (forward, backward)
