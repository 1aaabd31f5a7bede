"""Memory of one rank, estimated before anything is allocated: weights, gradients, optimizer, activations, head.

Weights, gradients and optimizer state are exact up to the padding of vocabulary and buffers. Activations are what autograd keeps between
forward and backward, counted tensor by tensor after Korthikanti et al. 2022 (arXiv 2205.05198, section 4) for attention that does not
store its score matrix; kernels' workspaces, communication buffers and the allocator's fragmentation come on top (allow 10-20 %).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megavlm.config.schema import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, StageConfig, VisionConfig
from megavlm.config.tensor_split import encoder_tensor_ranks, projector_tensor_ranks
from megavlm.planner.parameters import ParameterBlock, parameter_blocks
from megavlm.planner.precision import fp8_parts, fp8_weights
from megavlm.planner.projectors import projector_elements
from megavlm.planner.schedule import most_in_flight, pass_order
from megavlm.planner.state import StateBytes, element_bytes, gathered_bytes, state_bytes
from megavlm.topology.context import most_rows
from megavlm.topology.grid import RankGrid
from megavlm.topology.pipeline import PipelineSplit
from megavlm.topology.table import human_bytes, human_count, text_table

HEAD_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits that exist at a time: the chunk of megavlm_kernels.linear_cross_entropy (a test holds the two equal; no torch here)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of one pipeline stage."""

    pipeline_rank: int
    num_parameters: int
    num_trainable: int
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    head_bytes: int
    gathered_bytes: int = 0
    """With parallel.zero of 2 or 3: parameters that are whole for a while, and gradients on their way."""

    @property
    def total_bytes(self) -> int:
        state = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes
        return state + self.gathered_bytes + self.activations_bytes + self.head_bytes


class Fullest(NamedTuple):
    """The most of each that a microbatch held, where steps were seen or planned."""

    tiles: int = 0
    """Tiles (of canvases all places), or pictures in their own size."""
    patches: int = 0
    targets: int = 0
    segments: int = 0
    """Where context ranks share a microbatch, pads among them."""


def estimate_memory(
    model: ModelConfig,
    stage: StageConfig,
    data: DataConfig,
    grid: RankGrid,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    segments: int = 0,
    device: str = "cuda",
    fullest: Fullest | None = None,
) -> list[RankMemory]:
    """One estimate a pipeline rank (ranks that differ on other axes need the same), for the fullest microbatch that budgets allow.

    Without a hard data.max_patches_per_pack a pack is taken to hold as many tiles as its tokens have room for (with policy=native
    one picture as large as that; with policy=anyres tiles that keep all their features). Where pictures are always dealt to the ranks of
    a microbatch a rank has its share of them. `segments` of a microbatch have pads where context ranks share it. On a `device` cpu the
    head takes fewer logits at a time. With `fullest` pictures, targets and segments are what it says, and not what budgets allow.

    Raises:
        PipelineError: the layers cannot be split over the grid. GridError: the batch cannot. TrainingError: see planner.parameters.
    """
    num_microbatches = grid.num_microbatches(stage)
    split = PipelineSplit.of(model.language.num_layers, parallel)
    own = {"encoder_tensor": encoder_tensor_ranks(model, parallel), "projector_tensor": projector_tensor_ranks(model, parallel)}
    blocks = list(parameter_blocks(model, stage, grid.tensor, grid.expert, **own))
    load = _Load.of(model, stage, data, grid, parallel, precision, segments, device, fullest)
    return [_rank_memory(rank, blocks, split, load, model, num_microbatches) for rank in range(grid.pipeline)]


def memory_table(estimates: Sequence[RankMemory]) -> str:
    """The estimates as text for --dry-run."""
    header = ("pipeline rank", "parameters", "training", "weights", "gradients", "optimizer", "gathered", "activations", "head", "total")
    rows = [
        (
            e.pipeline_rank,
            human_count(e.num_parameters),
            human_count(e.num_trainable),
            *map(human_bytes, (e.parameters_bytes, e.gradients_bytes, e.optimizer_bytes, e.gathered_bytes)),
            *map(human_bytes, (e.activations_bytes, e.head_bytes, e.total_bytes)),
        )
        for e in estimates
    ]
    return text_table(header, rows, "memory of a rank (estimate; allow 10-20 % for workspaces and fragmentation)")


@dataclass(frozen=True)
class _Load:
    """What one microbatch brings to one rank."""

    tokens: int
    """LLM rows of this context rank."""
    tiles: int
    """Tiles, or pictures in their own size."""
    patches: int
    targets: int
    tensor: int
    encoder_tensor: int
    projector_tensor: int
    sequence_split: int
    """Ranks over which rows outside attention and MLP are split: tensor with sequence parallelism, else 1."""
    parallel: ParallelConfig
    """What is recomputed and offloaded."""
    precision: PrecisionConfig
    zero: int
    shards: int
    expert_shards: int
    device: str

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        stage: StageConfig,
        data: DataConfig,
        grid: RankGrid,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        segments: int = 0,
        device: str = "cuda",
        fullest: Fullest | None = None,
    ) -> _Load:
        tokens, tiles, patches = {
            "multimodal": (data.seq_len_tokens, *_most_pictures(model, data)),
            "text": (data.seq_len_tokens, 0, 0),
            "vision_classification": (0, stage.images_per_pack, stage.images_per_pack * model.vision.num_patches),
        }[stage.objective]
        tiles, patches = tiles * stage.micro_batch_packs, patches * stage.micro_batch_packs
        rows = tokens * stage.micro_batch_packs
        targets = rows
        if fullest is not None:
            tiles, patches, targets, segments = fullest
        if parallel.encoder_data_parallel is True:
            tiles, patches = _dealt(tiles, patches, model, grid.tensor * grid.context)
        rows = most_rows(rows, segments, parallel)
        return cls(
            tokens=rows,
            tiles=tiles,
            patches=patches,
            targets=min(targets, rows),
            tensor=grid.tensor,
            encoder_tensor=encoder_tensor_ranks(model, parallel),
            projector_tensor=projector_tensor_ranks(model, parallel),
            sequence_split=grid.tensor if parallel.sequence else 1,
            parallel=parallel,
            precision=precision,
            zero=parallel.zero,
            shards=grid.data * grid.context,
            expert_shards=_expert_copies(grid),
            device=device,
        )

    @property
    def offloads_optimizer(self) -> bool:
        """On a CPU host memory is what there is."""
        return self.parallel.offload_optimizer and self.device == "cuda"

    @property
    def element_bytes(self) -> int:
        return element_bytes(self.precision)

    def encoder_rows(self, vision: VisionConfig) -> int:
        """Patches, class and register tokens."""
        return self.patches + self.tiles * (int(vision.class_token) + vision.num_register_tokens)

    def features(self, model: ModelConfig) -> int:
        """Rows that the projector takes."""
        if model.vision.pooled:
            return self.tiles
        kept = int(model.vision.class_token and model.vision.keep_class_token)
        return self.patches // model.projector.pixel_shuffle**2 + self.tiles * kept


def _expert_copies(grid: RankGrid) -> int:
    """Ranks that hold the same experts."""
    return grid.data * grid.context * grid.tensor // grid.expert if grid.expert > 1 else grid.data * grid.context


def _dealt(tiles: int, patches: int, model: ModelConfig, ranks: int) -> tuple[int, int]:
    """(tiles, patches) of the rank that gets most of so many equal ones; tiles that see each other stay together."""
    if not tiles:
        return 0, 0
    together = model.vision.canvas_tiles or 1
    most = min(math.ceil(math.ceil(tiles / together) / ranks) * together, tiles)
    return most, math.ceil(patches * most / tiles)


def _most_pictures(model: ModelConfig, data: DataConfig) -> tuple[int, int]:
    """(tiles, patches) of the fullest pack."""
    budget = data.max_patches_per_pack if data.patch_budget == "hard" else None
    fixed = model.projector.tokens_per_picture
    if data.image.policy == "native" and fixed is not None:
        side = math.ceil((data.image.longest_edge_px or model.vision.image_size_px) / model.vision.patch_size_px)
        pictures = max(data.seq_len_tokens // fixed, 1)
        return pictures, pictures * side**2 if budget is None else budget
    if data.image.policy == "native":
        return 1, data.seq_len_tokens * model.projector.pixel_shuffle**2 if budget is None else budget
    room = data.seq_len_tokens // model.visual_tokens_per_tile
    tiles = max(room if budget is None else budget // model.vision.num_patches, model.vision.canvas_tiles or 1)
    return tiles, tiles * model.vision.num_patches


def _held(parameters: int, trainable: int, shards: int, load: _Load) -> StateBytes:
    """Bytes of this rank's parameters, gradients and optimizer state, of which `shards` ranks hold copies."""
    each = state_bytes(load.precision, shards, load.zero, offloads=load.offloads_optimizer)
    # What is frozen is kept in the format of computation, and split with the rest.
    frozen = (parameters - trainable) * load.element_bytes / (shards if load.zero >= 2 else 1)
    return StateBytes(trainable * each.weight + frozen, trainable * each.gradient, trainable * each.optimizer)


def _whole_layers(blocks: Sequence[ParameterBlock]) -> list[tuple[int, int]]:
    """(parameters, those that train) of each transformer layer, its experts included."""
    layers: dict[tuple[str, int, int | None], tuple[int, int]] = {}
    for block in blocks:
        if block.part in ("layer", "experts"):
            number, trained = layers.get((block.module, block.encoder, block.layer), (0, 0))
            layers[block.module, block.encoder, block.layer] = number + block.local, trained + (block.local if block.trains else 0)
    return list(layers.values())


def _rank_memory(
    rank: int, blocks: Sequence[ParameterBlock], split: PipelineSplit, load: _Load, model: ModelConfig, num_microbatches: int
) -> RankMemory:
    mine = [block for block in blocks if _lives_on(block, rank, split)]
    parameters, trainable = sum(b.local for b in mine), sum(b.local for b in mine if b.trains)
    # The last stage holds a copy of a tied embedding: its head.
    embedding = next((b for b in blocks if b.module == "language" and b.part == "embedding"), None)
    if embedding is not None and model.language.tie_embeddings and split.pipeline > 1 and split.is_last(rank):
        parameters += embedding.local
        trainable += embedding.local if embedding.trains else 0
    # Experts are copied over fewer ranks than the rest, so each rank has more of what is split.
    experts = (sum(b.local for b in mine if b.part == "experts"), sum(b.local for b in mine if b.trains and b.part == "experts"))
    others = (parameters - experts[0], trainable - experts[1])
    held = [_held(*others, load.shards, load), _held(*experts, load.expert_shards, load)]
    layers = _whole_layers(mine)
    outside = (parameters - sum(n for n, _ in layers), trainable - sum(n for _, n in layers))
    # Cast once a step, as they are and transposed, but where ZeRO-3 keeps no whole weights.
    copies = 2 * sum(fp8_weights(b, model, load.precision, load.tensor, load.encoder_tensor) for b in mine) if load.zero < 3 else 0
    return RankMemory(
        pipeline_rank=rank,
        num_parameters=parameters,
        num_trainable=trainable,
        parameters_bytes=math.ceil(sum(h.weight for h in held)) + copies,
        gradients_bytes=math.ceil(sum(h.gradient for h in held)),
        optimizer_bytes=math.ceil(sum(h.optimizer for h in held)),
        activations_bytes=_activations(rank, blocks, split, load, model, num_microbatches),
        head_bytes=_head(load, model, embedding, blocks) if load.tokens and split.is_last(rank) else 0,
        gathered_bytes=gathered_bytes(load.zero, load.precision, layers, outside),
    )


def _lives_on(block: ParameterBlock, rank: int, split: PipelineSplit) -> bool:
    if block.module == "language" and block.part in ("layer", "experts"):
        assert block.layer is not None
        return split.owner(block.layer)[0] == rank
    if block.module == "language" and block.part in ("norm", "head"):
        return split.is_last(rank)
    return rank == 0


def _activations(
    rank: int, blocks: Sequence[ParameterBlock], split: PipelineSplit, load: _Load, model: ModelConfig, num_microbatches: int
) -> int:
    """Most bytes that wait for their backward pass on one rank: each chunk keeps its own for every microbatch in flight."""
    below, offloaded, again = False, 0.0, 0.0
    per_chunk = [0.0] * split.virtual_pipeline
    places: Counter[tuple[str, int, int]] = Counter()
    for block in blocks:
        below = below or block.trains
        if block.part != "layer" or not _lives_on(block, rank, split):
            continue
        chunk = split.owner(block.layer)[1] if block.module == "language" and block.layer is not None else 0
        place = places[block.module, block.encoder, chunk]
        places[block.module, block.encoder, chunk] += 1
        if not below:
            continue
        whole, kept = _layer_elements(block, load, model), _kept_elements(block, place, load, model)
        again = max(again, whole - kept)
        if place < load.parallel.offload_activations and load.device == "cuda":
            # One that is used and one that is on its way.
            offloaded = max(offloaded, 2 * kept)
        else:
            per_chunk[chunk] += kept
    if rank == 0 and any(b.module == "projector" and b.trains for b in blocks):
        per_chunk[0] += _projector_elements(load, model)
    elements = most_in_flight(pass_order(rank, split.pipeline, split.virtual_pipeline, num_microbatches), per_chunk)
    return math.ceil((elements + offloaded + again) * load.element_bytes)


def _kept_elements(block: ParameterBlock, place: int, load: _Load, model: ModelConfig) -> float:
    """Elements that a layer keeps from its forward to its backward pass; `place` counts the layers of a chunk, or of an encoder, from 0."""
    parallel = load.parallel
    kind = parallel.recompute if block.module == "language" else parallel.encoder_recompute
    if kind == "full" and (parallel.recompute_layers is None or place < parallel.recompute_layers):
        return _checkpoint_elements(block, load, model)
    return _layer_elements(block, load, model, frozenset(parallel.recompute_modules) if kind == "selective" else frozenset())


def _layer_elements(block: ParameterBlock, load: _Load, model: ModelConfig, again: frozenset[str] = frozenset()) -> float:
    """Elements that one layer keeps: norm inputs; queries, keys, values and their result; the MLP's middle; and, where its weights
    train, the inputs of its linear layers. `again` (parallel.recompute_modules) is not kept; of attention nothing is spared, since its
    scores are never stored."""
    if block.module == "language":
        language = model.language
        rows, width = load.tokens, language.hidden_size
        attention = (2 * language.num_attention_heads + 2 * max(language.kv_heads, load.tensor)) * language.head_width
        before_activation, ffn = 2 if language.gated_mlp else 1, language.ffn_hidden_size
        split, attended = load.sequence_split, language.num_attention_heads * language.head_width
        if (moe := language.moe) is not None and block.layer not in moe.dense_layers:
            # Evenly routed, a rank's experts get as many tokens as it sends out, each top_k times, and keep what they give back.
            ffn = moe.top_k * moe.ffn_hidden_size
            width += moe.top_k * width // 2
    else:
        vision = model.encoders[block.encoder]
        rows, width = load.encoder_rows(vision), vision.hidden_size
        attention, before_activation, ffn, split = 4 * width, 2 if vision.gated_mlp else 1, vision.ffn_hidden_size, 1
        attended = width
    attention_fp8, mlp_fp8 = fp8_parts(block.module, block.layer, block.encoder, model, load.precision)
    # Inputs of linear layers are kept as they are multiplied; the output's input is attention's result, which attention keeps in bf16.
    into_qkv, into_output, into_mlp = 0.5 if attention_fp8 else 1.0, 0.5 if attention_fp8 else 0.0, 0.5 if mlp_fp8 else 1.0
    outside = (2 + (into_qkv + into_mlp if block.trains else 0)) * width / split
    middle = 0.0 if "mlp" in again else before_activation * ffn + (into_mlp * ffn if block.trains else 0)
    if "mlp" in again and not block.trains:
        outside += width / split  # the MLP's input, which nothing else keeps
    inside = attention + middle + (into_output * attended if block.trains else 0)
    return rows * (outside + inside / (load.tensor if block.module == "language" else load.encoder_tensor))


def _checkpoint_elements(block: ParameterBlock, load: _Load, model: ModelConfig) -> float:
    """Elements that a recomputed layer keeps: its input."""
    if block.module == "language":
        return load.tokens * model.language.hidden_size / load.sequence_split
    vision = model.encoders[block.encoder]
    return load.encoder_rows(vision) * vision.hidden_size


def _projector_elements(load: _Load, model: ModelConfig) -> float:
    """Elements that the projector keeps."""
    return projector_elements(model, load.features(model), load.tiles, load.projector_tensor)


def _head(load: _Load, model: ModelConfig, embedding: ParameterBlock | None, blocks: Sequence[ParameterBlock]) -> int:
    """Hidden states of the targets and their gradient, one chunk of logits, and the gradient of the head's weight, in fp32 and in the
    weight's format. On a GPU gradients take the logits' place; on a CPU logits exist in fp32 too."""
    head = next((b for b in blocks if b.module == "language" and b.part == "head"), embedding)
    assert head is not None
    columns, width = head.local // model.language.hidden_size, model.language.hidden_size
    chunk = min(load.targets, max(HEAD_CHUNK_ELEMENTS[load.device] // columns, 1)) * columns
    logits = chunk * (load.element_bytes if load.device == "cuda" or load.precision.dtype == "fp32" else load.element_bytes + 4)
    of_weight = (4 if load.precision.dtype == "fp32" else 4 + load.element_bytes) * head.local if head.trains else 0
    return 2 * load.targets * width * load.element_bytes + logits + of_weight
