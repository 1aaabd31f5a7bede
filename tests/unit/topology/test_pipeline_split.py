"""The layer split against megatron-core's offsets."""

from itertools import product

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from pydantic import ValidationError

from megavlm.config.schema import ParallelConfig
from megavlm.topology.pipeline import PipelineError, PipelineSplit


@pytest.mark.parametrize(("layers", "pipeline", "virtual"), [(4, 1, 1), (4, 2, 1), (4, 2, 2), (24, 4, 3), (32, 8, 2), (12, 4, 1)])
def test_split_is_megatrons(layers, pipeline, virtual):
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype=torch.float32,
    )
    split = PipelineSplit(layers, pipeline, virtual)
    for rank in range(pipeline):
        for chunk in range(virtual):
            vp_stage = chunk if virtual > 1 else None
            held = split.layers(rank, chunk)
            assert held.start == get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)
            assert len(held) == get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
            assert all(split.owner(layer) == (rank, chunk) for layer in held)
    everything = sorted(layer for rank in range(pipeline) for chunk in split.rank_layers(rank) for layer in chunk)
    assert everything == list(range(layers))


@pytest.mark.parametrize(
    ("counts", "pipeline"),
    [((0, 4), 2), ((1, 3, 0), 3), ((0, 1, 3, 0), 2), ((5, 1, 2, 7, 3, 6), 3), ((2, 1, 1, 0), 4), ((3,), 1)],
)
def test_unequal_split_is_megatrons_layout(counts: tuple[int, ...], pipeline: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, virtual = sum(counts), len(counts) // pipeline
    split = PipelineSplit.of(layers, ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual, layers_per_stage=list(counts)))
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_model_parallel_layout=split.modules() if pipeline > 1 else None,
        pipeline_dtype=torch.float32,
    )
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: virtual if virtual > 1 else None)
    for rank, chunk in product(range(pipeline), range(virtual)):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        vp_stage, held = chunk if virtual > 1 else None, split.layers(rank, chunk)
        assert len(held) == get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
        assert held.start == get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)
        assert all(split.owner(layer) == (rank, chunk) for layer in held)
    assert tuple(len(split.layers(depth % pipeline, depth // pipeline)) for depth in range(len(counts))) == counts
    assert split.is_even == (len(counts) == 1)


def test_uneven_layers_are_refused_with_what_would_fit():
    with pytest.raises(PipelineError, match=r"num_layers=12 .*pipeline=4 x .*virtual_pipeline=2 = 8 chunks.*1, 2, 3, 4, 6, 12; or set par"):
        PipelineSplit(12, 4, 2)
    with pytest.raises(PipelineError, match="layer 4 does not exist"):
        PipelineSplit(4, 2).owner(4)
    with pytest.raises(PipelineError, match="chunk 1"):
        PipelineSplit(4, 2).layers(0, 1)


@pytest.mark.parametrize(
    ("counts", "pipeline", "virtual", "words"),
    [
        ((1, 3), 2, 2, r"\[1, 3\] has 2 numbers, but .*pipeline=2 x .*virtual_pipeline=2 = 4 chunks need one each"),
        ((1, 2, 2), 3, 1, r"\[1, 2, 2\] adds up to 5 layers, but model.language.num_layers=4"),
        ((2, 0, 2), 3, 1, "number 2 leaves its chunk without a layer"),
        ((0, 0, 4, 0), 2, 2, "number 2 leaves"),
        ((5, -1), 2, 1, "number 2"),
    ],
)
def test_impossible_lists_are_refused(counts: tuple[int, ...], pipeline: int, virtual: int, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        PipelineSplit(4, pipeline, virtual, counts)


def test_a_balanced_split_has_to_be_settled() -> None:
    with pytest.raises(PipelineError, match="split=balanced depends on what packs cost"):
        PipelineSplit.of(4, ParallelConfig(pipeline=2, split="balanced"))
    assert PipelineSplit.of(4, ParallelConfig(split="balanced")).counts == (4,)
    with pytest.raises(ValidationError, match="split=balanced: give one of them"):
        ParallelConfig(pipeline=2, split="balanced", layers_per_stage=[1, 3])
    with pytest.raises(ValidationError, match="layers_per_stage"):
        ParallelConfig(pipeline=2, layers_per_stage=[5, -1])


def test_ends_and_names():
    split = PipelineSplit(8, 2, 2)
    assert [split.is_first(r, c) for r, c in ((0, 0), (0, 1), (1, 0))] == [True, False, False]
    assert [split.is_last(r, c) for r, c in ((1, 1), (1, 0), (0, 1))] == [True, False, False]
    assert split.is_last(1) and not split.is_last(0)
    assert [split.layer_names(r, c) for r, c in ((0, 0), (1, 0), (0, 1))] == ["0-1", "2-3", "4-5"]
    assert "encoder" in split.also(0, 0) and split.also(1, 0) == "" and split.also(1, 1).endswith("loss")
    ends = PipelineSplit(4, 3, 1, (0, 1, 3))
    assert [ends.layer_names(r, 0) for r in range(3)] == ["none", "0", "1-3"]
