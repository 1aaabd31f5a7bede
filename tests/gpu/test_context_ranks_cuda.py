"""Context ranks on GPUs: the kernels over keys that were brought, on one GPU; the exchange and Transformer Engine's ways, on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch

from megavlm.config.parallel import ContextSplit
from megavlm.models.layers.attention import attend_packed
from megavlm.models.layers.packing import pack
from megavlm.topology.context import ContextLayout, context_layout
from megavlm_kernels.packed_attention import BACKENDS, BackendError
from megavlm_launchers.environment import held_port, rank_environment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LENGTHS = (70, 1, 129, 54, 3)
HEADS, GROUPS, WIDTH = 8, 4, 64
SPLITS = get_args(ContextSplit)


def whole(dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient from above, of the whole sequence."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(sum(LENGTHS), heads, WIDTH, generator=generator).to(dtype) for heads in (HEADS, GROUPS, GROUPS, HEADS)]


def truth(dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values by a dense mask on the CPU."""
    *inputs, upstream = (x.to(dtype) for x in whole(torch.bfloat16))
    query, key, value = (x.requires_grad_() for x in inputs)
    mask = torch.zeros(sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
    for low, high in pairwise([0, *accumulate(LENGTHS)]):
        mask[low:high, low:high] = torch.ones(high - low, high - low, dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = torch.einsum("qhk,shk->hqs", query, k) * WIDTH**-0.5
    out = torch.einsum("hqs,shk->qhk", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, [query, key, value], upstream)]


def rows_of(layout: ContextLayout, rank: int) -> torch.Tensor:
    return torch.cat([torch.arange(span.row, span.row + span.length) for span in layout.spans[rank]])


def assert_close(found: list[torch.Tensor]) -> None:
    """As near to fp64 as plain bf16 is, by the factors of megavlm_kernels.testing.tolerance."""
    for name, got, exact, plain in zip(("out", "query", "key", "value"), found, truth(torch.float64), truth(torch.bfloat16), strict=True):
        allowed = (2 if name == "out" else 3) * float((plain.double() - exact).abs().max()) + 1e-3
        assert float((got.double() - exact).abs().max()) <= allowed, name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_over_keys_that_were_brought(backend: str, split: ContextSplit, ranks: int) -> None:
    """Every rank's attention, one after another on this GPU: queries in the middle of their segments, keys up to each span's end."""
    layout = context_layout(LENGTHS, split, ranks)
    query, key, value, upstream = (x.cuda() for x in whole(torch.bfloat16))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    out = torch.zeros_like(query)
    for rank in range(ranks):
        packing, rows = pack(LENGTHS, query.device, causal=True, context=(layout, rank)), rows_of(layout, rank).cuda()
        seen = torch.cat([torch.arange(first, first + number) for first, number in layout.keys(rank)]).cuda()
        try:
            own = attend_packed(query[rows], key[seen], value[seen], packing, causal=True, scale=WIDTH**-0.5, backend=backend)
        except BackendError as error:
            pytest.skip(str(error))
        out = out.index_add(0, rows, own)
    gradients = torch.autograd.grad(out, inputs, upstream)
    assert_close([x.detach().cpu() for x in (out, *gradients)])


RANK = """
import json, sys
from tests.gpu.test_context_ranks_cuda import in_a_rank
in_a_rank(sys.argv[1], sys.argv[2], sys.argv[3])
"""


def in_a_rank(comm: str, split: ContextSplit, folder: str) -> None:
    """Attention of this context rank's rows in a real layer; leaves its rows and gradients in a file, or why it cannot be."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from megavlm.config.schema import ParallelConfig, PrecisionConfig
    from megavlm.models.layers.attention import PackedAttention
    from megavlm.models.layers.configs import language_transformer_config
    from megavlm.parallel.context import enter_grid, start_process_group, stop_process_group
    from megavlm.testing.tiny import tiny_model_config
    from megavlm_kernels.context_attention import CommError

    rank, device = int(os.environ["RANK"]), torch.device("cuda", int(os.environ["RANK"]))
    start_process_group(device, 120.0)
    parallel = ParallelConfig(context=dist.get_world_size(), context_comm=comm, context_split=split)
    ctx = enter_grid(parallel, device, seed=1)
    language = tiny_model_config(num_attention_heads=HEADS, num_query_groups=GROUPS, head_dim=WIDTH, hidden_size=HEADS * WIDTH).language
    config = language_transformer_config(language, PrecisionConfig(dtype="bf16"), parallel, device)
    groups = ProcessGroupCollection(cp=ctx.context_group, tp=ctx.tensor_group)
    try:
        layer = PackedAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    except CommError as error:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(str(error)))
        return
    layout = context_layout(LENGTHS, split, parallel.context)
    packing = pack(LENGTHS, device, causal=True, context=(layout, ctx.context_rank))
    part = packing.context
    assert part is not None
    # What pads hold must not matter.
    local = [x.to(device)[part.rows_L] for x in whole(torch.bfloat16)]
    if part.is_pad_L is not None:
        local = [x.masked_fill(part.is_pad_L[:, None, None], 1e4) for x in local]
    query, key, value = (x.requires_grad_() for x in local[:3])
    out = layer(query, key, value, None, packed_seq_params=packing).unflatten(-1, (HEADS, WIDTH))
    found = [out, *torch.autograd.grad(out, [query, key, value], local[3])]
    rows = part.without_pads(part.rows_L).cpu()
    torch.save(
        {"ring": layer.ring is not None, "rows": rows, "found": [part.without_pads(x).detach().cpu() for x in found]},
        Path(folder) / f"{rank}.pt",
    )
    dist.barrier()
    stop_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("comm", "split"),
    [*(("keys", split) for split in SPLITS), ("auto", "zigzag"), ("p2p", "zigzag"), ("all_gather", "zigzag"), ("a2a", "zigzag")],
)
def test_two_gpus_compute_what_one_does(comm: str, split: str, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    command = [sys.executable, "-c", RANK, comm, split, str(tmp_path)]
    with held_port() as port:
        ranks = [subprocess.Popen(command, env=rank_environment(r, 2, port, environ), stderr=subprocess.PIPE, text=True) for r in range(2)]
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), errors
    if (tmp_path / "0.json").exists():
        pytest.skip(json.loads((tmp_path / "0.json").read_text()))
    found = [torch.zeros(sum(LENGTHS), heads, WIDTH, dtype=torch.bfloat16) for heads in (HEADS, HEADS, GROUPS, GROUPS)]
    for rank in range(2):
        own = torch.load(tmp_path / f"{rank}.pt")
        assert own["ring"] == (comm in ("p2p", "all_gather", "a2a")) or comm == "auto"
        for whole_x, x in zip(found, own["found"], strict=True):
            whole_x[own["rows"]] = x
    assert_close(found)
