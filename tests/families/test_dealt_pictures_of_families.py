"""Pictures dealt to tensor ranks, encoders and projectors whole: Hugging Face's logits of every multimodal family all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megavlm.checkpoint.hf import config_from_hf
from megavlm.config.schema import ParallelConfig
from megavlm.config.tensor_split import check_tensor_split
from megavlm.testing.families import CASES
from megavlm.testing.families.case import hf_logits, image_token_of, make_hf, prompts_of
from megavlm.testing.families.in_ranks import logits_of_packs
from megavlm.testing.pool import RankPool

QUICK = ("LLaVA-NeXT", "InstructBLIP", "Idefics2", "Mllama (Llama 3.2 Vision)", "Qwen3-VL")
"""One of each way from pictures to tokens; the others with `make test-all`."""
NAMES = [case.name for case in CASES if case.family != "causal_lm"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES])
def test_logits_equal_hugging_face(pool: RankPool, tmp_path: Path, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    hf = make_hf(case, tmp_path)
    model, token = config_from_hf(tmp_path), image_token_of(case, hf.config)
    assert token is not None
    prompts = prompts_of(case, model, token)
    expected = torch.cat(hf_logits(case, hf, model, prompts))
    if model.language.num_attention_heads % 2 or model.language.kv_heads % 2:
        pytest.skip("two tensor ranks do not divide the LLM's heads")
    layout = {"tensor": 2, "encoder_data_parallel": True}
    # Encoder and projector are whole: nothing of theirs need divide.
    check_tensor_split(model, ParallelConfig.model_validate(layout))
    for (logits,) in pool.run(logits_of_packs, tmp_path, layout, [prompts], token, world_size=2):
        assert (logits - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
