"""Memory against megatron-core's published table, its schedules, and what autograd really keeps."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megavlm.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ModuleTraining,
    ParallelConfig,
    PrecisionConfig,
    StageConfig,
    VisionConfig,
)
from megavlm.planner.memory import HEAD_CHUNK_ELEMENTS, estimate_memory, memory_table
from megavlm.planner.parameters import params
from megavlm.planner.state import state_bytes
from megavlm.topology.grid import RankGrid
from megavlm_kernels.linear_cross_entropy import op as head_op

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size_px=32, patch_size_px=8, num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, feature_layer=-1
    ),
    language=LanguageConfig(vocab_size=128, num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96),
)
DATA = DataConfig(seq_len_tokens=256, max_patches_per_pack=4 * 16)
FP32, BF16 = PrecisionConfig(dtype="fp32"), PrecisionConfig(dtype="bf16")
FULL, FROZEN = ModuleTraining(), ModuleTraining(train="frozen")


def estimate(world=1, precision=BF16, model=MODEL, parallel=None, **stage):
    parallel = parallel or ParallelConfig()
    config = StageConfig(**{"name": "s", "steps": 1, "mixture": {"a": 1}, "vision": FULL, "packs_per_step": 8, **stage})
    return estimate_memory(model, config, DATA, RankGrid.from_config(parallel, world), parallel, precision)


def test_state_bytes_are_megatrons_table():
    bf16_grads = PrecisionConfig(dtype="bf16", grad_reduce_in_fp32=False)
    assert [sum(state_bytes(p)) for p in (FP32, BF16, bf16_grads)] == [16, 18, 20]
    assert [sum(state_bytes(p, 8)) for p in (FP32, BF16, bf16_grads)] == [8 + 8 / 8, 6 + 12 / 8, 4 + 16 / 8]


def test_pipeline_ranks_hold_the_whole_model_once():
    counts = params(MODEL)
    whole = sum(c.total for c in counts.values())
    for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (4, 1)):
        ranks = estimate(8, parallel=ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual))
        assert sum(r.num_parameters for r in ranks) == whole
    tied = MODEL.model_copy(update={"language": MODEL.language.model_copy(update={"tie_embeddings": True})})
    assert sum(r.num_parameters for r in estimate(2, model=tied, parallel=ParallelConfig(pipeline=2))) == whole


def test_frozen_weights_cost_their_bytes_only():
    (frozen,) = estimate(vision=FROZEN, language=FROZEN)
    counts = params(MODEL)
    assert frozen.num_trainable == counts["projector"].total
    assert frozen.parameters_bytes == 2 * sum(c.total for c in counts.values())
    assert (frozen.gradients_bytes, frozen.optimizer_bytes) == (4 * counts["projector"].total, 12 * counts["projector"].total)
    (full,) = estimate()
    assert frozen.activations_bytes < full.activations_bytes and frozen.head_bytes < full.head_bytes


def test_each_way_of_sharding_saves_where_it_should():
    (one,) = estimate(2)
    (zero,) = estimate(2, parallel=ParallelConfig(zero=1))
    assert zero.optimizer_bytes * 2 == one.optimizer_bytes and zero.parameters_bytes == one.parameters_bytes
    (tensor,) = estimate(2, parallel=ParallelConfig(tensor=2))
    (sequence,) = estimate(2, parallel=ParallelConfig(tensor=2, sequence=True))
    assert one.activations_bytes > tensor.activations_bytes > sequence.activations_bytes
    (recomputed,) = estimate(2, parallel=ParallelConfig(recompute="full"))
    assert recomputed.activations_bytes < one.activations_bytes / 2
    first, last = estimate(2, parallel=ParallelConfig(pipeline=2))
    assert first.activations_bytes > last.activations_bytes, "the first stage keeps more microbatches in flight"
    assert first.head_bytes == 0 < last.head_bytes
    (text,) = estimate(objective="text")
    (images,) = estimate(objective="vision_classification", num_classes=5)
    assert text.activations_bytes + images.activations_bytes > 0 and images.head_bytes == 0


def test_unequal_pipeline_stages_hold_and_keep_their_own():
    def stages(counts):
        return estimate(len(counts), parallel=ParallelConfig(pipeline=len(counts), layers_per_stage=counts))

    whole = sum(count.total for count in params(MODEL).values())
    for counts in ([1, 3], [0, 4], [4, 0], [0, 4, 0], [2, 1, 1]):
        assert sum(rank.num_parameters for rank in stages(counts)) == whole
    layer = stages([1, 3])[0].num_parameters - stages([0, 4])[0].num_parameters
    assert stages([2, 2])[0].num_parameters - stages([1, 3])[0].num_parameters == layer > 0
    # Two microbatches wait on the first of two stages, one on the last.
    kept = [[rank.activations_bytes for rank in stages(counts)] for counts in ([0, 4], [1, 3], [2, 2])]
    assert kept[1][0] - kept[0][0] == kept[2][0] - kept[1][0] == 2 * (kept[0][1] - kept[1][1]) > 0


def test_a_chunk_without_layers_keeps_nothing_of_them():
    def first(counts):
        return estimate(2, parallel=ParallelConfig(pipeline=2, virtual_pipeline=2, layers_per_stage=counts))[0].activations_bytes

    # Chunk 0 of the first rank has more microbatches in flight than chunk 1: a layer there costs more.
    assert first([0, 1, 2, 1]) < first([1, 1, 1, 1]) < first([2, 1, 1, 0])


def test_activations_are_what_autograd_keeps():
    """Transformers' Llama with SDPA, bytes of distinct saved tensors that are no weights: two layers against four."""
    language = MODEL.language

    def saved_bytes(layers: int) -> int:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128, num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
        )
        model = LlamaForCausalLM(config)
        weights = {p.data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model.model(input_ids=torch.arange(256)[None] % 128).last_hidden_state.sum()
        del loss
        return sum(kept.values())

    measured = (saved_bytes(4) - saved_bytes(2)) / 2
    without = ModelConfig(vision=MODEL.vision, language=language.model_copy(update={"num_layers": 2}))
    (four,), (two,) = (estimate(model=m, precision=FP32, objective="text") for m in (MODEL, without))
    ours = (four.activations_bytes - two.activations_bytes) / 2
    # transformers writes its norms, rotary positions and SwiGLU out in single operations, which keep more than fused ones.
    assert 0.45 < ours / measured <= 1.0


def test_head_chunk_is_the_kernels():
    assert HEAD_CHUNK_ELEMENTS == {"cpu": head_op.CHUNK_ELEMENTS, "cuda": head_op.CUDA_CHUNK_ELEMENTS}


def test_table_names_every_part():
    lines = memory_table(estimate(4, parallel=ParallelConfig(pipeline=2, tensor=2))).splitlines()
    assert len(lines) == 5 and "activations" in lines[1] and lines[-1].split()[0] == "1"


def test_native_pictures_are_bounded_by_the_patch_budget():
    """One picture as large as the budget, or as the tokens: the encoder's activations follow the patches."""

    def activations(**data):
        block = DataConfig(image={"policy": "native"}, seq_len_tokens=1024, **data)
        config = StageConfig(name="s", steps=1, mixture={"a": 1}, packs_per_step=8)
        (rank,) = estimate_memory(MODEL, config, block, RankGrid(world_size=1), ParallelConfig(), PrecisionConfig())
        return rank.activations_bytes

    free, half, target = activations(), activations(max_patches_per_pack=512), activations(max_patches_per_pack=512, patch_budget="target")
    assert free == target > half
    quarter = activations(max_patches_per_pack=256)
    assert half - quarter == pytest.approx((free - half) / 2, rel=1e-6), "1024, 512 and 256 patches lie on a line"
