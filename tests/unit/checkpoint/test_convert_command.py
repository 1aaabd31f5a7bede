"""`megavlm convert` from the command line: import, export, verify, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megavlm.checkpoint.hf.registry import FAMILIES
from megavlm.testing.command import run_command
from megavlm.testing.families import CASES
from megavlm.testing.families.case import make_hf
from megavlm.testing.families.mllama import CASES as MLLAMA


def megavlm(*arguments: str | Path, code: int = 0) -> str:
    """Output of the command, whose exit code must be `code`."""
    found, said = run_command("convert", *arguments)
    assert found == code, said
    return said


def test_there_and_back(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "LLaVA-1.5, SigLIP, Qwen2 tied")
    make_hf(case, tmp_path / "hf", dtype=torch.bfloat16)
    assert "(bf16)" in megavlm("import", tmp_path / "hf", tmp_path / "checkpoint")
    megavlm("export", tmp_path / "checkpoint", tmp_path / "out")
    said = megavlm("verify", tmp_path / "checkpoint", tmp_path / "out")
    assert "tensors are equal bit for bit" in said and "2 pictures: " in said
    report = json.loads((tmp_path / "out" / "megavlm_verify.json").read_text())
    assert report["ok"] and len(report["tensors"]) > 100 and report["unequal"] == [] and report["versions"]["transformers"]
    assert [p["sample"].split(":")[0] for p in report["logits"]] == ["text", "1 picture", "1 picture", "2 pictures"]
    assert all(t["sha256_folder"] == t["sha256_checkpoint"] for t in report["tensors"])
    page = (tmp_path / "out" / "megavlm_verify.md").read_text()
    assert "equal to" in page and "Pictures matter: yes." in page
    assert report["pictures_matter"] is True
    assert report["logits"][0]["picture_effect"] is None and all(p["picture_effect"] > 0.01 for p in report["logits"][1:])
    said = megavlm("import", tmp_path / "hf", tmp_path / "checkpoint", code=2)
    assert "megavlm: error: " in said and "is there already" in said and "Traceback" not in said


def test_an_fp16_folder_asks_for_a_format(tmp_path: Path) -> None:
    """As LLaVA is published. The message says what to type; fp32 holds every number, bf16 is rounded once."""
    case = next(case for case in CASES if case.name == "Llama 2, Vicuna")
    make_hf(case, tmp_path / "hf", dtype=torch.float16)
    said = megavlm("import", tmp_path / "hf", tmp_path / "c", code=2)
    assert "holds float16 weights" in said and "--dtype bf16" in said and "--dtype fp32" in said and "Traceback" not in said
    assert not (tmp_path / "c.tmp").exists()
    before = load_file(tmp_path / "hf" / "model.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert f"({name})" in megavlm("import", tmp_path / "hf", tmp_path / name, "--dtype", name)
        megavlm("export", tmp_path / name, tmp_path / f"out-{name}")
        after = load_file(tmp_path / f"out-{name}" / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor.to(dtype), after[key]) and after[key].dtype == dtype for key, tensor in before.items())
        assert json.loads((tmp_path / f"out-{name}" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_one_changed_number_is_exit_code_1(tmp_path: Path) -> None:
    make_hf(CASES[0], tmp_path / "hf")
    megavlm("import", tmp_path / "hf", tmp_path / "checkpoint")
    file, name = tmp_path / "hf" / "model.safetensors", "language_model.model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    said = megavlm("verify", tmp_path / "checkpoint", tmp_path / "hf", code=1)
    assert f"differs: {name}" in said and "TOO LARGE" in said
    report = json.loads((tmp_path / "hf" / "megavlm_verify.json").read_text())
    assert not report["ok"] and report["unequal"] == [name]
    page = (tmp_path / "hf" / "megavlm_verify.md").read_text()
    assert "DIFFERENT FROM" in page and name in page
    said = megavlm("verify", tmp_path / "checkpoint", tmp_path / "hf", "--tensors-only", code=1)
    assert "logits" not in said


def test_models_of_other_families_are_told_apart_in_a_line(tmp_path: Path) -> None:
    llama = next(case for case in CASES if case.name == "Llama 2, Vicuna")
    make_hf(CASES[0], tmp_path / "llava")
    make_hf(llama, tmp_path / "llama")
    megavlm("import", tmp_path / "llava", tmp_path / "checkpoint")
    said = megavlm("verify", tmp_path / "checkpoint", tmp_path / "llama", code=2)
    assert said.strip().endswith("hold different families: llava and causal_lm")


def test_pictures_behind_zero_gates_are_told(tmp_path: Path) -> None:
    """As every Mllama starts: its proof is one of the language model alone."""
    make_hf(MLLAMA[0], tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    gates = [name for name in tensors if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate"))]
    assert gates
    save_file(tensors | {name: torch.zeros_like(tensors[name]) for name in gates}, file, metadata={"format": "pt"})
    megavlm("import", tmp_path / "hf", tmp_path / "checkpoint")
    assert "pictures matter: no. The logits are the same" in megavlm("verify", tmp_path / "checkpoint", tmp_path / "hf")
    assert "Pictures matter: no. The logits are the same" in (tmp_path / "hf" / "megavlm_verify.md").read_text()
    assert json.loads((tmp_path / "hf" / "megavlm_verify.json").read_text())["pictures_matter"] is False
    # A placeholder inside the vocabulary cannot be told from text.
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"image_token_index": 5}))
    said = megavlm("verify", tmp_path / "checkpoint", tmp_path / "hf", code=2)
    assert "image_token_index lies inside the vocabulary" in said and "--tensors-only" in said
    megavlm("verify", tmp_path / "checkpoint", tmp_path / "hf", "--tensors-only")


def test_families_are_listed_and_others_named(tmp_path: Path) -> None:
    said = megavlm("families")
    assert "LlavaForConditionalGeneration" in said and "siglip_vision_model" in said and "qwen2" in said
    assert "init.vision_from_hf takes too (model_type): clip, siglip, siglip2" in said
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "bert"}')
    said = megavlm("import", tmp_path / "hf", tmp_path / "c", code=2)
    assert f"model_type='bert' is none of the families here: {', '.join(FAMILIES)}" in said
