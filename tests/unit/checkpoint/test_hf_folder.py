"""A Hugging Face folder's weights: names of any age, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.links import Link, qkv
from megavlm.checkpoint.hf.load import hf_provider, links_of, open_weights
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.tensor_files import Entry
from megavlm.checkpoint.hf.tensors import to_ours, to_theirs
from megavlm.checkpoint.hf.weight_files import Group, Weights, write_weights
from megavlm.config.schema import ModelConfig
from megavlm.testing.tiny import tiny_model_config

QKV = "language.decoder.layers.0.self_attention.linear_qkv.weight"


def links(model: ModelConfig) -> list[Link]:
    return family(model.family).links(model)


def weights_of(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Random Hugging Face weights of a model, made from the links alone."""
    return {part.name: torch.randn(part.shape) for link in links(model) for part in link.parts}


def write(tensors: dict[str, torch.Tensor], folder: Path, max_shard_bytes: int = 10**9) -> Weights:
    groups = [Group((Entry(name, tuple(t.shape), t.dtype),), lambda t=t: [t]) for name, t in tensors.items()]
    return write_weights(groups, folder, max_shard_bytes, "test")


def provider(folder: Path, model: ModelConfig):  # type: ignore[no-untyped-def]
    return hf_provider(open_weights(folder, model), links_of(model))


def plain_folder(folder: Path) -> WeightFolder:
    return WeightFolder(folder, lambda name: name)


def test_names_of_every_age_become_those_of_today() -> None:
    disk_name = family("llava").disk_name
    layer = "layers.0.self_attn.q_proj.weight"
    assert disk_name(f"model.language_model.{layer}") == f"language_model.model.{layer}"
    assert disk_name("lm_head.weight") == "language_model.lm_head.weight"
    assert disk_name("model.vision_tower.vision_model.post_layernorm.bias") == "vision_tower.post_layernorm.bias"
    assert disk_name("vision_tower.vision_model.post_layernorm.bias") == "vision_tower.post_layernorm.bias"
    assert disk_name("model.multi_modal_projector.linear_1.bias") == "multi_modal_projector.linear_1.bias"
    assert disk_name("vision_tower.vision_model.embeddings.position_ids") is None
    assert disk_name("language_model.model.rotary_emb.inv_freq") is None


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What `save_pretrained` leaves behind when a smaller model is saved over a sharded one."""
    tensors = {f"t{i}": torch.randn(30, 10) for i in range(4)}
    write(tensors, tmp_path, 2000)
    later = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(later, tmp_path / "model.safetensors")
    with plain_folder(tmp_path) as weights:
        assert all(torch.equal(weights.tensor(name), later[name]) for name in tensors)
    assert "model.safetensors and model.safetensors.index.json" in caplog.text
    for shard in tmp_path.glob("model-0*"):
        shard.unlink()
    with plain_folder(tmp_path) as weights:
        assert weights.names == set(tensors)


@pytest.mark.parametrize("link", [link for link in links(tiny_model_config(qkv_bias=True)) if len(link.runs) > 1], ids=lambda x: x.key)
def test_links_invert(link: Link) -> None:
    parts = {part.name: torch.randn(part.shape) for part in link.parts}
    back = to_theirs(link, to_ours(link, lambda name, first, last: parts[name][first:last]))
    assert all(torch.equal(parts[part.name], tensor) for part, tensor in zip(link.parts, back, strict=True))


def test_query_heads_of_a_group_come_before_its_key_and_value() -> None:
    link = qkv("k", ("q", "k", "v"), 4, 2, 1)
    parts = {"q": torch.arange(4), "k": torch.arange(2) + 10, "v": torch.arange(2) + 20}
    assert to_ours(link, lambda name, first, last: parts[name][first:last]).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_missing_and_unknown_weights_are_named(tmp_path: Path) -> None:
    model = tiny_model_config()
    weights = weights_of(model)
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights | {"language_model.model.layers.9.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(HuggingFaceError, match=r"lacks multi_modal_projector\.linear_1\.bias and holds unknown weights .*layers\.9\.x"):
        provider(tmp_path, model)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    model = tiny_model_config(tie_embeddings=True)
    weights = weights_of(model)
    embedding = weights["language_model.model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    provider(tmp_path, model)
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(HuggingFaceError, match=r"lm_head\.weight differs from .*embed_tokens\.weight, though the config ties them"):
        provider(tmp_path, model)


def test_another_head_count_is_not_cut_in_the_wrong_place(tmp_path: Path) -> None:
    save_file(weights_of(tiny_model_config(num_query_groups=4)), tmp_path / "model.safetensors")
    with pytest.raises(HuggingFaceError, match=r"k_proj\.weight has shape \(48, 48\), its config makes it \(24, 48\)"):
        provider(tmp_path, tiny_model_config(num_query_groups=2))


def test_a_rank_reads_its_rows_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model_config()
    weights = weights_of(model)
    save_file(weights, tmp_path / "model.safetensors")
    read: list[tuple[str, int, int]] = []
    rows = WeightFolder.rows
    monkeypatch.setattr(WeightFolder, "rows", lambda self, name, a, b: (read.append((name, a, b)), rows(self, name, a, b))[1])
    provide = provider(tmp_path, model)
    assert not read, "checking a folder reads no weight"
    shape = (96, 48)
    lower = provide(QKV, shape, (slice(48, 96), slice(0, 48)))
    whole = provide(QKV, shape, (slice(0, 96), slice(0, 48)))
    assert torch.equal(lower, whole[48:])
    prefix = "language_model.model.layers.0.self_attn."
    assert read[:3] == [(f"{prefix}q_proj.weight", 24, 48), (f"{prefix}k_proj.weight", 12, 24), (f"{prefix}v_proj.weight", 12, 24)]
    assert sum(b - a for _, a, b in read[:3]) == 48


def test_shards_and_index_are_read_back(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)}
    written = write(tensors, tmp_path, max_shard_bytes=1000)
    assert (written.num_tensors, written.num_parameters, written.dtype) == (7, 700, "float32")
    files = sorted(tmp_path.glob("model-*-of-00004.safetensors"))
    assert len(files) == 4
    with plain_folder(tmp_path) as folder:
        assert folder.names == set(tensors)
        assert all(torch.equal(folder.tensor(n), t) and folder.dtype(n) == t.dtype for n, t in tensors.items())
        assert torch.equal(folder.rows("t3", 2, 5), tensors["t3"][2:5])


def test_the_safetensors_library_reads_what_is_written_and_is_read(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "bf16": torch.randn(3, 5).bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(2, 2, 2).half(),
        "flags": torch.tensor([True, False]),
        "wide": torch.randn(4, dtype=torch.float64),
    }
    write(tensors, tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in theirs.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    assert all(torch.equal(theirs[n], t) for n, t in tensors.items())
    save_file(tensors, tmp_path / "model.safetensors")
    with plain_folder(tmp_path) as folder:
        assert all(torch.equal(folder.tensor(n), t) for n, t in tensors.items())


def test_incomplete_and_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(HuggingFaceError, match="there is no such folder"):
        plain_folder(tmp_path / "nothing")
    with pytest.raises(HuggingFaceError, match=r"neither model\.safetensors nor"):
        plain_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(HuggingFaceError, match="pickles, which can run code"):
        plain_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    write({f"t{i}": torch.randn(10, 10) for i in range(4)}, tmp_path, max_shard_bytes=1000)
    second = tmp_path / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for damaged in (whole[:-50], whole[:40], whole[:5], b"", whole + b"x", b"\xff" * 200, whole[:8] + b"[" + whole[9:]):
        second.write_bytes(damaged)
        with pytest.raises(HuggingFaceError, match=r"00002-of-00002.safetensors is damaged .*download or write it again"):
            plain_folder(tmp_path)
    second.unlink()
    with pytest.raises(HuggingFaceError, match="is missing, though model.safetensors.index.json names it"):
        plain_folder(tmp_path)
    save_file({"t2": torch.zeros(1)}, second)
    with pytest.raises(HuggingFaceError, match="lacks t3"):
        plain_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(HuggingFaceError, match="is missing"):
        plain_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(HuggingFaceError, match="index.json is damaged"):
        plain_folder(tmp_path)


@pytest.mark.parametrize("offsets", [[[0, 400], [200, 600]], [[0, 400], [404, 804]], [[0, 400], [400, 700]]])
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path: Path, offsets: list[list[int]]) -> None:
    header = json.dumps({f"t{i}": {"dtype": "F32", "shape": [100], "data_offsets": o} for i, o in enumerate(offsets)}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(804))
    with pytest.raises(HuggingFaceError, match="is damaged"):
        plain_folder(tmp_path)
