"""Greedy answers equal Hugging Face's generate, token for token, on one rank and on two tensor ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint.hf import config_from_hf, load_hf
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.prompt import Prompt
from megavlm.inference.generate import generate
from megavlm.inference.sampling import GenerationError
from megavlm.parallel.context import enter_grid
from megavlm.testing.families import CASES
from megavlm.testing.families.case import Case, make_hf
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.tiny import IMAGE_TOKEN_ID, tiny_chunks

KINDS = [case for case in CASES if case.name in ("LLaVA-1.5", "LLaVA-1.5, SigLIP, Qwen2 tied", "LLaVA-1.5, Qwen3")]
NEW_TOKENS = 40
"""So many that the cache must grow: see GROWTH_TOKENS."""
IMAGES = (0, 1, 2, 0, 1)
TEXT_TOKENS = (4, 11, 3, 29, 17)


def prompts(model: ModelConfig) -> list[Prompt]:
    """Unequal prompts with none, one and two pictures."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for images, length in zip(IMAGES, TEXT_TOKENS, strict=True):
        text = torch.randint(IMAGE_TOKEN_ID + 1, model.language.vocab_size, (length,), generator=generator).tolist()
        side = model.vision.image_size_px
        tiles = torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8) if images else None
        made.append(Prompt([text[0], *[IMAGE_TOKEN_ID] * (images * model.visual_tokens_per_tile), *text[1:]], tiles))
    return made


def hf_answers(hf: Any, model: ModelConfig, stop_ids: list[int]) -> list[list[int]]:
    """Each prompt alone through Hugging Face's generate."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.vision.image_mean, model.vision.image_std))
    answers = []
    for prompt in prompts(model):
        pixels = {} if prompt.tiles_TCHW is None else {"pixel_values": (prompt.tiles_TCHW / 255 - mean) / std}
        ids = torch.tensor([prompt.ids])
        mask = torch.ones_like(ids)
        stop = {"eos_token_id": stop_ids} if stop_ids else {"eos_token_id": None}
        out = hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **stop, **pixels)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def rank_answers(folder: Path, layout: dict[str, Any], requests: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Answers of one rank to several requests."""
    model, parallel = config_from_hf(folder), ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    (chunk,) = tiny_chunks(model, ctx, parallel)
    load_hf([chunk], folder, model, ctx)
    common = {"max_new_tokens": NEW_TOKENS, "image_token_id": IMAGE_TOKEN_ID}
    return [generate(chunk, prompts(model), **common, **r) for r in requests]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_greedy_equals_hugging_face(pool: RankPool, tmp_path: Path, kind: Case) -> None:
    hf = make_hf(kind, tmp_path)
    hf.generation_config.eos_token_id = None
    model = config_from_hf(tmp_path)
    free = hf_answers(hf, model, [])
    stops = [free[0][5], free[2][20]]
    expected = [free, hf_answers(hf, model, stops)]
    assert [len(a) for a in free] == [NEW_TOKENS] * len(IMAGES)
    assert len({len(a) for a in expected[1]}) > 1, "some answers must end before the others"
    requests = [{"stop_ids": []}, {"stop_ids": stops}]
    for world_size, layout in ((1, {}), (2, {"tensor": 2})):
        for rank, answers in enumerate(pool.run(rank_answers, tmp_path, layout, requests, world_size=world_size)):
            assert answers == expected, f"rank {rank} of {layout}"


def test_sampled_answers_agree_across_tensor_ranks(pool: RankPool, tmp_path: Path) -> None:
    make_hf(KINDS[0], tmp_path)
    requests = [{"stop_ids": [7, 8, 9], "temperature": 2.0, "top_k": 60, "top_p": 0.95, "seed": s} for s in (1, 2)]
    ranks = pool.run(rank_answers, tmp_path, {"tensor": 2}, requests, world_size=2)
    assert ranks[0] == ranks[1]
    assert ranks[0][0] != ranks[0][1]


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"context": 2}, {"tensor": 2, "sequence": True}])
def test_other_layouts_are_refused(pool: RankPool, tmp_path: Path, layout: dict[str, Any]) -> None:
    make_hf(KINDS[0], tmp_path)
    with pytest.raises(RankError, match=GenerationError.__name__):
        pool.run(rank_answers, tmp_path, layout, [{"stop_ids": []}], world_size=2)
