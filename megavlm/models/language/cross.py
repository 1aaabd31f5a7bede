"""Cross-attention into the LLM: layers whose queries come from the text and whose keys and values come from visual features.

Flamingo's gated cross-attention (https://arxiv.org/abs/2204.14198, section 2.2) and Mllama's cross-attention layers (transformers 5.23,
models/mllama). The features are `packing.sides[PICTURES]`: whole on every rank, brought to later stages by models/handover.py. Which
of them a token sees follows from where pictures stand in the text (`Sight`), so no mask is ever built: rows that see the same features are
one segment of packed attention, and samples of a pack never see each other's pictures.

Shape legend: S rows of the packed sequence, L this rank's rows, M features of all pictures, H heads, G key/value heads (of this tensor
rank), K head width, D LLM width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megavlm.config.schema import CrossAttentionConfig, LanguageConfig, ModelConfig
from megavlm.data.types import PackedBatch
from megavlm.models.layers.attention import backend_of
from megavlm.models.layers.gates import TanhGate
from megavlm.models.layers.linear import PostRowParallelLinear
from megavlm.models.layers.norms import NORMS, new
from megavlm.models.layers.packing import Packing
from megavlm.models.layers.specs import LayerStyle, layer_spec
from megavlm.topology.context import ContextLayout, Span
from megavlm_kernels.packed_attention import Call, Segments, choose, machine_of, packed_attention
from megavlm_kernels.packed_attention.machine import DTYPE_NAMES
from megavlm_kernels.rms_norm import rms_norm
from megavlm_kernels.transfer import to_device

PICTURES = "pictures"
"""Name of the features among `Packing.sides`."""


@dataclass(frozen=True)
class Look:
    """Rows side by side that see the same features."""

    length: int
    features: tuple[tuple[int, int], ...]
    """(first row, number) of runs of features."""
    after_picture: bool
    """A picture of the sample stands at or before these rows."""


@dataclass(frozen=True)
class Reading:
    """What a sight is for packed attention: one segment for each look that sees something."""

    segments: Segments
    rows_R: torch.Tensor | None
    """int64: rows of the text that see something; None: all do."""
    features_F: torch.Tensor | None
    """int64: what the segments see, one after the other; None: each feature once, in order."""


@dataclass
class Sight:
    """What every row of a packed sequence sees of the pictures."""

    looks: tuple[Look, ...]
    """Of this context rank's rows, in order."""
    last: tuple[Look, ...]
    """Of each segment: what a token sees that would follow it."""
    _after_L: torch.Tensor | None = None
    _reading: Reading | None = None

    def after_picture(self, device: torch.device) -> torch.Tensor:
        """bool (L,): rows that a picture stands before; built once for all layers."""
        if self._after_L is None:
            lengths, after = torch.tensor([look.length for look in self.looks]), torch.tensor([look.after_picture for look in self.looks])
            self._after_L = to_device(torch.repeat_interleave(after, lengths), device)
        return self._after_L

    def reading(self, num_features: int, device: torch.device) -> Reading:
        """Of `num_features` in all; built once for all layers."""
        if self._reading is None:
            starts = accumulate((look.length for look in self.looks), initial=0)
            seeing = [(start, look) for start, look in zip(starts, self.looks, strict=False) if look.features]
            lengths = tuple(look.length for _, look in seeing)
            runs = [run for _, look in seeing for run in look.features]
            self._reading = Reading(
                Segments(lengths, tuple(sum(number for _, number in look.features) for _, look in seeing)),
                _unless_all([(start, look.length) for start, look in seeing], sum(look.length for look in self.looks), device),
                _unless_all(runs, num_features, device),
            )
        return self._reading


def _unless_all(runs: list[tuple[int, int]], num_rows: int, device: torch.device) -> torch.Tensor | None:
    """int64: rows of runs (first, number); None where these are all rows in order."""
    if [first for first, _ in runs] == list(accumulate((n for _, n in runs), initial=0))[:-1] and sum(n for _, n in runs) == num_rows:
        return None
    ranges = [torch.arange(first, first + number) for first, number in runs]
    return to_device(torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64), device)


def picture_rows(model: ModelConfig, batch: PackedBatch) -> list[tuple[int, int]]:
    """Of each picture: features that tokens see, and features with those of tiles that are filled up with nothing."""
    if batch.tile_grids is not None:
        return [(n, n) for n in (model.visual_tokens(*grid) for grid in batch.tile_grids)]
    if batch.picture_tiles is None:
        assert batch.num_tiles == 0, "cross-attention needs PackedBatch.picture_tiles"
        return []
    each = model.visual_tokens_per_tile
    return [(p.tiles * each, (model.vision.canvas_tiles or p.tiles) * each) for p in batch.picture_tiles]


def sight_of(model: ModelConfig, batch: PackedBatch, context: tuple[ContextLayout, int] | None) -> Sight:
    """The pictures that each row sees; `context` is the split over context ranks and this rank's number in it.

    A picture is seen from its own token to the one before the next picture; pictures side by side are seen together (transformers
    5.23, `MllamaProcessor`).

    Raises ValueError when the batch has not one placeholder for each picture.
    """
    style = model.language.cross_attention
    assert style is not None
    rows, places = picture_rows(model, batch), batch.image_rows_N.tolist()
    if len(rows) != len(places):
        raise ValueError(
            f"{len(places)} image placeholders, but {len(rows)} pictures: with model.language.cross_attention each picture is one token"
        )
    starts = [0, *accumulate(total for _, total in rows)]
    looks: list[Look] = []
    last: list[Look] = []
    for begin, end in pairwise([0, *accumulate(batch.segment_lengths)]):
        numbers = [i for i, place in enumerate(places) if begin <= place < end]
        own = _looks(begin, end, [places[i] for i in numbers], [(starts[i], *rows[i]) for i in numbers], style)
        looks += own
        last.append(replace(own[-1], length=1) if own else Look(1, (), after_picture=False))
    return Sight(tuple(looks if context is None else _cut(looks, *context)), tuple(last))


def _looks(begin: int, end: int, places: list[int], pictures: list[tuple[int, int, int]], style: CrossAttentionConfig) -> list[Look]:
    """Of one segment; `pictures` are (first feature, seen, all)."""
    if not places:
        return [Look(end - begin, (), after_picture=False)] if end > begin else []
    ends = [*places[1:], end]
    for i in reversed(range(len(places) - 1)):
        if ends[i] == places[i] + 1:
            ends[i] = ends[i + 1]
    found = []
    for low, high in pairwise(sorted({begin, end, *places, *ends})):
        seen = tuple((first, number) for place, stop, (first, number, _) in zip(places, ends, pictures, strict=True) if place <= low < stop)
        if not seen and style.before_first_picture == "all":
            seen = ((pictures[0][0], sum(total for _, _, total in pictures)),)
        found.append(Look(high - low, seen, after_picture=low >= places[0]))
    return found


def _cut(looks: Sequence[Look], layout: ContextLayout, rank: int) -> list[Look]:
    """Those parts of a sequence's looks that a context rank holds, in the order of its rows; pads see nothing."""
    found: list[Look] = []
    place = 0
    for span in (*layout.spans[rank], Span(layout.num_rows, 0, 0, 0)):
        if span.place > place:
            found.append(Look(span.place - place, (), after_picture=False))
        row = 0
        for look in looks:
            length = min(row + look.length, span.row + span.length) - max(row, span.row)
            if length > 0:
                found.append(replace(look, length=length))
            row += look.length
        place = span.place + span.length
    return found


class HeadNorm(torch.nn.Module):
    """RMSNorm of each head's query or key. Tensor ranks have different heads, so their gradients are summed here."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.ones(config.kv_channels, **new(config)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight)
        return rms_norm(x, weight, self.eps)


class CrossAttention(MegatronModule):
    """What stands in a cross-attention layer where others have self-attention; tensor-parallel over heads."""

    def __init__(self, config: TransformerConfig, layer_number: int, style: CrossAttentionConfig, **_: Any) -> None:
        super().__init__(config=config)
        self.layer_number, self.head_width = layer_number, config.kv_channels
        self.backend = backend_of(config)
        device = torch.device("cpu" if config.use_cpu_initialization else "cuda")
        choose(Call(DTYPE_NAMES[config.params_dtype], config.kv_channels), machine_of(device.type), self.backend)
        # Features are whole on every tensor rank, and so must be their gradients: no sequence parallelism on their side.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        assert config.num_query_groups is not None and config.init_method is not None
        width, linear = config.hidden_size, {"init_method": config.init_method, "bias": False, "gather_output": False}
        self.linear_q = ColumnParallelLinear(width, config.num_attention_heads * self.head_width, config=config, **linear)
        self.linear_k = ColumnParallelLinear(width, config.num_query_groups * self.head_width, config=whole, **linear)
        self.linear_v = ColumnParallelLinear(width, config.num_query_groups * self.head_width, config=whole, **linear)
        self.query_norm = HeadNorm(config).to(device) if style.qk_norm else torch.nn.Identity()
        self.key_norm = HeadNorm(config).to(device) if style.qk_norm else torch.nn.Identity()
        self.linear_proj = PostRowParallelLinear(
            config.num_attention_heads * self.head_width,
            width,
            config=config,
            init_method=config.init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            post=TanhGate,
        ).to(device)

    def forward(self, hidden_states: torch.Tensor, packed_seq_params: Packing | None = None, **_: Any) -> tuple[torch.Tensor, None]:
        """(L, 1, D) -> what the text takes from the pictures (L, 1, D), gated."""
        packing = packed_seq_params
        assert packing is not None and packing.sight is not None, "cross-attention needs a Packing with a Sight"
        query = self.query_norm(self.linear_q(hidden_states)[0].squeeze(1).unflatten(-1, (-1, self.head_width)))
        if packing.cache is not None and self.layer_number in packing.cache.pictures:
            key, value = packing.cache.pictures[self.layer_number]
        else:
            key, value = self._keys_and_values(packing.sides[PICTURES])
            if packing.cache is not None:
                packing.cache.pictures[self.layer_number] = key, value
        out = _attend(query, key, value, packing.sight, self.backend)
        gated: tuple[torch.Tensor, None] = self.linear_proj(out.flatten(1).unsqueeze(1))
        return gated

    def _keys_and_values(self, features_MBD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, G, K) each. Without a picture one row of zeros, which no row sees: every weight has a gradient all the same."""
        if features_MBD.shape[0] == 0:
            features_MBD = features_MBD.new_zeros(1, *features_MBD.shape[1:])
        key, value = (linear(features_MBD)[0].squeeze(1).unflatten(-1, (-1, self.head_width)) for linear in (self.linear_k, self.linear_v))
        return self.key_norm(key), value


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: Sight, backend: str) -> torch.Tensor:
    """(L, H, K), (M, G, K), (M, G, K) -> (L, H, K), zeros for rows that see nothing."""
    if not any(look.features for look in sight.looks):
        # Overlapped gradient reduction waits for the gradient of every weight, here too.
        return 0.0 * query + 0.0 * (key.sum() + value.sum())
    reading = sight.reading(key.shape[0], query.device)
    if reading.features_F is not None:
        key, value = (x.index_select(0, reading.features_F) for x in (key, value))
    if reading.rows_R is None:
        return packed_attention(query, key, value, reading.segments, causal=False, backend=backend)
    out = packed_attention(query.index_select(0, reading.rows_R), key, value, reading.segments, causal=False, backend=backend)
    return query.new_zeros(query.shape).index_copy(0, reading.rows_R, out)


class CrossAttentionLayer(TransformerLayer):
    """A cross-attention layer of the stack: x + gate x attention, then x + gate x MLP."""

    mlp_without_picture = True

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None = None, packed_seq_params: Packing | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        attended, _context = self._forward_attention(hidden_states, packed_seq_params=packed_seq_params)
        out = self._forward_mlp(attended)
        if not self.mlp_without_picture:
            assert packed_seq_params is not None and packed_seq_params.sight is not None
            out = torch.where(self._after_picture(packed_seq_params.sight, out)[:, None, None], out, attended)
        return out, None

    def _after_picture(self, sight: Sight, x_LBD: torch.Tensor) -> torch.Tensor:
        """bool (L,): this tensor rank's rows that a picture stands before."""
        rows = sight.after_picture(x_LBD.device)
        if self.config.sequence_parallel:
            rows = rows.view(-1, x_LBD.shape[0])[self.self_attention.linear_q.tp_group.rank()]
        return rows


class _QuietCrossAttentionLayer(CrossAttentionLayer):
    """Rows that no picture stands before pass the MLP unchanged."""

    mlp_without_picture = False


def cross_layer_spec(language: LanguageConfig, *, local: bool = False) -> ModuleSpec:
    """A cross-attention layer; `local` as for `layer_spec`."""
    style = language.cross_attention
    assert style is not None
    spec = layer_spec(LayerStyle(causal=True, norm=language.norm, post=TanhGate), local=local)
    keys = {ours: key for ours, key in spec.submodules.sharded_state_dict_keys_map.items() if ours != "input_layernorm."}
    submodules = replace(
        spec.submodules,
        input_layernorm=NORMS[language.norm],
        self_attention=ModuleSpec(module=CrossAttention, params={"style": style}),
        sharded_state_dict_keys_map=keys,
    )
    return ModuleSpec(module=CrossAttentionLayer if style.mlp_without_picture else _QuietCrossAttentionLayer, submodules=submodules)
