"""Why there is no option for megatron-core's CUDA graphs: a graph is for one packing. A megatron-core that can do more shows here."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.cuda_graphs import ArgMetadata, _CudaGraphRunner
from megatron.core.transformer.transformer_layer import TransformerLayer

from megavlm.models.layers.packing import pack


def mismatches(captured: Any, called: Any) -> list[str]:
    """What keeps a layer's graph, captured with one packing, from being replayed with another."""
    runner: Any = SimpleNamespace(fwd_graph_input_arg_metas=[], fwd_graph_input_kwarg_metas={"packed_seq_params": ArgMetadata(captured)})
    found: list[str] = _CudaGraphRunner.get_mismatch_errors(runner, (), {"packed_seq_params": called})
    return found


def segments(*lengths: int) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )


def test_a_graph_is_for_one_number_of_segments_and_one_longest() -> None:
    """cuda_graph_impl=local: after the first step a call that no graph fits is an assertion."""
    assert mismatches(segments(4, 4), segments(4, 4)) == []
    assert any("cu_seqlens_q" in error for error in mismatches(segments(4, 4), segments(4, 4, 4)))
    assert any("max_seqlen_q" in error for error in mismatches(segments(4, 4), segments(3, 5)))


def test_our_packing_is_no_argument_of_a_graph() -> None:
    packing = pack([4, 4], torch.device("cpu"), causal=False)
    with pytest.raises(AssertionError, match="tuple.*not supported"):
        mismatches(packing, packing)


def test_graphs_of_transformer_engine_refuse_packed_sequences() -> None:
    """cuda_graph_impl=transformer_engine."""
    source = inspect.getsource(TransformerLayer._te_cuda_graph_replay)
    assert "kwargs.get('packed_seq_params') is None" in source and "CUDA graph accepts only Tensor inputs" in source
