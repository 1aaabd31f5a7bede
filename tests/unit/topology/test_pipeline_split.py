"""The layer split against megatron-core's offsets."""

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

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


def test_uneven_layers_are_refused_with_what_would_fit():
    with pytest.raises(PipelineError, match=r"num_layers=12 .*pipeline=4 x .*virtual_pipeline=2 = 8 chunks.*1, 2, 3, 4, 6, 12"):
        PipelineSplit(12, 4, 2)
    with pytest.raises(PipelineError, match="layer 4 does not exist"):
        PipelineSplit(4, 2).owner(4)
    with pytest.raises(PipelineError, match="chunk 1"):
        PipelineSplit(4, 2).layers(0, 1)


def test_ends_and_table():
    split = PipelineSplit(8, 2, 2)
    assert [split.is_first(r, c) for r, c in ((0, 0), (0, 1), (1, 0))] == [True, False, False]
    assert [split.is_last(r, c) for r, c in ((1, 1), (1, 0), (0, 1))] == [True, False, False]
    assert split.is_last(1) and not split.is_last(0)
    lines = split.table().splitlines()
    assert lines[2].split()[:3] == ["0", "0", "0-1"] and "encoder" in lines[2] and lines[-1].endswith("loss")
