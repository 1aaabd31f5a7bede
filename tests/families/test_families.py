"""Every family computes what its Hugging Face class computes. One row of docs/families.md is one case here, one column one test."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megavlm.checkpoint.hf import export_hf
from megavlm.checkpoint.hf.importing import import_hf
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.testing.families.case import hf_logits
from megavlm.testing.families.in_ranks import generated, gradients, logits_of_packs, targets_of
from megavlm.testing.pool import RankPool
from tests.families.conftest import Oracle, Record

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"TP1": (1, {}), "TP2": (2, {"tensor": 2}), "PP2": (2, {"pipeline": 2})}
NEW_TOKENS = 64
NOT_COMPARED = {"_name_or_path"}
"""The folder's own path."""


def assert_close(got: torch.Tensor, want: torch.Tensor, what: str) -> float:
    """Within 1e-4, relative to the largest logit where that exceeds 1; returns the difference."""
    assert got.shape == want.shape, what
    difference = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
    assert difference <= 1e-4, f"{what}: {difference:.2e}"
    return difference


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits(pool: RankPool, oracle: Oracle, record: Record, layout: str) -> None:
    """Each sample alone, and all of them in one pack, against Hugging Face's samples one by one."""
    expected = hf_logits(oracle.case, oracle.hf, oracle.model, oracle.prompts)
    packs = [[prompt] for prompt in oracle.prompts] + [oracle.prompts]
    world_size, parallel = LAYOUTS[layout]
    results = pool.run(logits_of_packs, oracle.folder, parallel, packs, oracle.image_token, world_size=world_size)
    for ours in [r for r in results if r is not None]:
        found = [
            assert_close(got, want, f"pack {i}") for i, (got, want) in enumerate(zip(ours, [*expected, torch.cat(expected)], strict=True))
        ]
        record(f"logits {layout}", max(found))
        if layout == "TP1":
            record("packed", found[-1])


def test_gradients(pool: RankPool, oracle: Oracle, record: Record) -> None:
    """Three plain gradient steps: every gradient and their norm, against autograd through the Hugging Face model."""
    rows, targets = targets_of(oracle.prompts, oracle.model.language.vocab_size)
    hf, theirs, lr = copy.deepcopy(oracle.hf), [], 1e-3
    for _ in range(3):
        hf.zero_grad()
        logits = torch.cat([hf(**oracle.case.kind.hf_inputs(oracle.model, prompt)).logits[0] for prompt in oracle.prompts])
        torch.nn.functional.cross_entropy(logits[rows], targets).backward()
        found = ((n, torch.zeros_like(p) if p.grad is None else p.grad.clone()) for n, p in hf.named_parameters())
        theirs.append({n: g for name, grad in found for n, g in oracle.case.kind.disk_tensors(oracle.model, name, grad).items()})
        with torch.no_grad():
            for parameter in hf.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
    steps = pool.run(gradients, oracle.folder, oracle.prompts, oracle.image_token, 3, lr, theirs)[0]
    for ours, norm, difference in steps:
        assert abs(ours - norm) <= 1e-4 * norm
        assert difference <= 1e-3
    record("gradients", max(abs(ours - norm) / norm for ours, norm, _ in steps))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def import_and_export(folder: Path, root: Path) -> None:
    import_hf(folder, root / "checkpoint")
    export_hf(root / "checkpoint", root / "out", max_shard_bytes=60_000)


def test_round_trip(pool: RankPool, oracle: Oracle, record: Record, tmp_path: Path) -> None:
    """Imported and exported again: the same tensors bit for bit, the same config, and transformers misses nothing."""
    pool.run(import_and_export, oracle.folder, tmp_path)
    before, after = tensors_of(oracle.folder), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    tf = quiet_transformers()
    configs = [tf.AutoConfig.from_pretrained(str(folder)) for folder in (oracle.folder, tmp_path / "out")]
    assert type(configs[1]) is type(oracle.hf.config)
    came, went = ({k: v for k, v in config.to_dict().items() if k not in NOT_COMPARED} for config in configs)
    assert went == came
    again, info = getattr(tf, oracle.case.kind.hf_class).from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for got, want in zip(hf_logits(oracle.case, again.eval(), oracle.model, oracle.prompts),
                         hf_logits(oracle.case, oracle.hf, oracle.model, oracle.prompts), strict=True):  # fmt: skip
        assert torch.equal(got, want), "transformers computes other logits with the exported config"
    record("round trip", len(before))


@pytest.mark.parametrize("layout", ["TP1", "TP2"])
def test_generation(pool: RankPool, oracle: Oracle, record: Record, layout: str) -> None:
    """64 greedy tokens for unequal prompts in one batch, token for token those of Hugging Face's `generate`, one prompt at a time."""
    world_size, parallel = LAYOUTS[layout]
    ours = pool.run(generated, oracle.folder, parallel, oracle.prompts, oracle.image_token, NEW_TOKENS, world_size=world_size)
    for prompt, *answers in zip(oracle.prompts, *ours, strict=True):
        inputs = oracle.case.kind.hf_inputs(oracle.model, prompt)
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": None}
        with torch.no_grad():
            theirs = oracle.hf.generate(**inputs, **settings)[0, len(prompt.ids) :].tolist()
        for answer in answers:
            assert answer == theirs
    record(f"generation {layout}", NEW_TOKENS)
