"""PaliGemma learns answers: losses and gradients behind a prefix that sees itself both ways, against transformers with the token types
that its processor gives to image, question and answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint.hf import config_from_hf
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.tensors import to_ours
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.data.types import PackedBatch
from megavlm.models.weights import sharded_tensors
from megavlm.testing.families import CASES
from megavlm.testing.families.case import image_token_of, make_hf, prompts_of
from megavlm.testing.families.in_ranks import _gradient, loaded
from megavlm.testing.pool import RankPool

ANSWER = 3
"""Tokens at the end of each sample that are learned."""


def with_answers(prompts: list[Prompt], image_token: int, model: Any) -> PackedBatch:
    """All samples in one pack, their last tokens being targets."""
    batch, ends = prompt_batch(prompts, image_token, model), torch.tensor([len(p.ids) for p in prompts]).cumsum(0)
    rows = torch.cat([torch.arange(end - ANSWER - 1, end - 1) for end in ends.tolist()])
    batch.target_positions_Q, batch.target_ids_Q = rows, batch.tokens_S[rows + 1]
    batch.target_weights_Q = torch.ones(len(rows))
    batch.target_segments_Q = torch.arange(len(prompts)).repeat_interleave(ANSWER)
    return batch


def ours(folder: Path, prompts: list[Prompt], image_token: int, theirs: dict[str, torch.Tensor]) -> Any:
    """(loss of each target, largest difference of a gradient over the largest gradient)."""
    (chunk,), model, ctx = loaded(folder, {})
    chunk.train()
    out = chunk(with_answers(prompts, image_token, model))
    out.total.backward()
    table, difference = {link.key: link for link in family(model.family).links(model)}, 0.0
    by_storage = {p.data_ptr(): p for p in chunk.parameters()}
    for tensor in sharded_tensors([chunk], ctx):
        where = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, tensor.local_shape, strict=True))
        want = to_ours(table[tensor.key], lambda name, a, b: theirs[name][a:b], where)
        difference = max(difference, float((_gradient(tensor.data, by_storage, want) - want).abs().max()))
    return out.loss_Q, difference / max(float(t.abs().max()) for t in theirs.values())


@pytest.mark.parametrize("name", ["PaliGemma", "PaliGemma 2"])
def test_answers_behind_a_prefix(name: str, pool: RankPool, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    hf = make_hf(case, tmp_path / "hf")
    model, token = config_from_hf(tmp_path / "hf"), image_token_of(case, hf.config)
    assert token is not None
    prompts, losses = prompts_of(case, model, token), []
    for prompt in prompts:
        inputs = case.kind.hf_inputs(model, prompt)
        inputs["token_type_ids"][:, -ANSWER:] = 1
        logits = hf(**inputs).logits[0, -ANSWER - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, -ANSWER:], reduction="none"))
    torch.cat(losses).sum().backward()
    theirs = {case.kind.disk_name(n): torch.zeros_like(p) if p.grad is None else p.grad for n, p in hf.named_parameters()}
    loss_Q, difference = pool.run(ours, tmp_path / "hf", prompts, token, theirs)[0]
    torch.testing.assert_close(loss_Q, torch.cat(losses).detach(), atol=1e-4, rtol=1e-4)
    assert difference <= 1e-3
    with torch.no_grad():  # negative control: the answer seen as prefix is another loss
        whole = hf(**case.kind.hf_inputs(model, prompts[0])).logits[0, -ANSWER - 1 : -1]
    assert not torch.allclose(torch.nn.functional.cross_entropy(whole, torch.tensor(prompts[0].ids[-ANSWER:]), reduction="none"), losses[0])
