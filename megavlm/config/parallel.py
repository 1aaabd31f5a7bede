"""The `parallel` block: how the model, its layers and its batches are spread over ranks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megavlm.config.blocks import Block, NonNegativeFloat, NonNegativeInt, PositiveInt

Recompute = Literal["none", "selective", "full"]
RecomputedPart = Literal["core_attn", "mlp"]
ContextSplit = Literal["zigzag", "contiguous", "pack"]
ContextComm = Literal["auto", "keys", "p2p", "all_gather", "a2a"]


class ParallelConfig(Block):
    """Shape of the rank grid; data parallelism takes what is left."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    split: Literal["even", "balanced"] = "even"
    """How the LLM's layers are spread over pipeline ranks and chunks. even: equally many each; they must be divisible. balanced: so that
    the slowest stage is as fast as can be, by the FLOPs of the stage's first packs: encoder, projector and embedding weigh on the first
    stage, head and loss on the last, and what is frozen has no backward pass. The first and the last stage may end up without a layer,
    and the layers need not be divisible. It is worked out for each stage of the recipe, equally on every rank and again after a resume;
    `megavlm train --dry-run` prints it with each stage's FLOPs and the bubble to expect. With pipeline=1 nothing is spread."""
    layers_per_stage: list[NonNegativeInt] | None = None
    """Instead of `split`: number of LLM layers on each pipeline rank. With virtual_pipeline > 1 one number a chunk, from the bottom of the
    model to its top: chunk 0 of every rank, then chunk 1 of every rank, and so on. 0 is allowed for the first (encoder, projector and
    embedding alone) and the last (norm, head and loss alone). Checkpoints go from any split to any other."""
    context: PositiveInt = 1
    """Ranks that share each sequence."""
    context_split: ContextSplit = "pack"
    """How context ranks share a pack. pack: the pack as a whole in 2 x context chunks, whatever segments it holds; a rank has one chunk and
    its mirror image. Samples shorter than a chunk stay whole, so few keys travel, and the LLM's work is even to 1-3 % in packs of many
    samples. zigzag: each segment in 2 x context chunks in the same way. The work is even in every pack, and nearly all keys travel: for
    samples about as long as the pack, and what Transformer Engine's ring wants. contiguous: each segment in `context` chunks; the last rank
    has the most work. Pads that make chunks equal are rows of a rank only: plans, batches, positions and losses are those of one rank.
    `megavlm train --dry-run` compares the three on the first step's packs; benchmarks/context_split.py is where the default comes from.
    With context=1 nothing is shared."""
    context_comm: ContextComm = "auto"
    """How keys and values travel between context ranks. keys: each rank is sent those that its queries see, in one exchange, and any kernel
    of precision.attention follows. Transformer Engine's own ways, on GPUs and with context_split=zigzag: p2p passes them around a ring
    while attention computes (no sliding windows), all_gather collects them first, a2a exchanges rows for heads (which the context ranks
    must divide). auto: p2p in layers where it can be, else keys. Another name is that way in every layer or an error that says why not;
    `megavlm doctor` lists what this machine has."""
    expert: PositiveInt = 1
    """Ranks that share the experts of a mixture-of-experts layer, each whole on one of them: neighbours on the tensor, context and data
    axes, which add no ranks. With 1 every rank holds all experts, and tensor parallelism splits each."""
    encoder_tensor: Literal[1, "auto"] | None = None
    """Tensor ranks that share encoder and projector. None: as many as share the LLM. 1: both are whole on every tensor rank, which holds
    and computes all of them. auto: whichever of the two has heads or widths that the tensor ranks do not divide is whole."""
    encoder_data_parallel: bool | Literal["auto"] = False
    """Deal the pictures of a microbatch to the tensor x context ranks that share it, by their FLOPs: each rank encodes and projects its
    share with whole weights (encoder_tensor=1 is implied), and the visual tokens are gathered. False: every one of these ranks works on all
    pictures, in its part of the weights or with all of them. auto: in each microbatch by encoder_min_flops_per_byte."""
    encoder_min_flops_per_byte: NonNegativeFloat = 2000.0
    """With encoder_data_parallel=auto a microbatch's pictures are dealt out when that spares the busiest rank at least so many FLOPs
    (forward and backward) for each byte of visual tokens that is sent forward and back. A lone picture spares nothing. The default is
    about the ratio of a Hopper GPU's bf16 rate to NVLink's; across slower links use more. Every rank decides alike, from metadata."""
    sequence: bool = False
    """Megatron sequence parallelism: activations outside attention and MLP are split over the tensor ranks."""
    zero: Literal[0, 1, 2, 3] = 0
    """What is split over data and context ranks instead of copied to each (ZeRO, https://arxiv.org/abs/1910.02054). 0: nothing. 1: the
    optimizer's state (megatron-core's distributed optimizer). 2: gradients too; parameters are gathered once a step. 3: parameters too;
    each transformer layer gathers its own when it runs, forward and backward. 2 and 3 are torch's FSDP2: parameters that train are kept
    in fp32 (split), and gradients are reduced in every microbatch. Experts that `expert` ranks share are split over the ranks that hold
    the same ones."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass. zero=2 and 3 always do."""
    overlap_param_gather: bool = False
    """Overlap the distributed optimizer's parameter gather with the forward pass. zero=2 and 3 always do."""
    recompute: Recompute = "none"
    """What is computed again in the backward pass instead of kept. selective: the parts of layers that recompute_modules names. full:
    whole layers, of which only the input is kept. Gradients are the same to the bit."""
    recompute_encoder: Recompute | None = None
    """The same for the encoder's layers; None: as `recompute` says."""
    recompute_modules: list[RecomputedPart] = Field(["core_attn"], min_length=1)
    """Parts that selective recomputation means. core_attn: attention between queries, keys and values; saves memory only where its scores
    are kept, which fused attention never does. mlp: what lies between the MLP's input and its output. Norms are none of them: Transformer
    Engine computes them inside the linear layer behind them, where nothing can be left out, and without it megatron-core 0.16's way
    (CheckpointWithoutOutput) fails on the rank that reaches it first, for it asks Transformer Engine for its FP8 state."""
    recompute_layers: PositiveInt | None = None
    """With full: only the first so many layers of each pipeline chunk, and of the encoder; None: all."""
    offload_activations: NonNegativeInt = 0
    """So many layers of each pipeline chunk's LLM, and of the encoder, from the first, keep what their backward pass needs in host memory:
    copied there during the forward pass and back a layer ahead of its use, beside the computation. Goes with recomputation: of recomputed
    layers their inputs are copied. On a CPU run it copies within host memory and saves nothing."""
    offload_optimizer: bool = False
    """Adam's moments are in host memory and the update is computed there, from gradients and weights copied to it. Spares 8 bytes a
    parameter (split by `zero`) on the GPU, and costs the copies and the CPU's time in every step. Same numbers up to rounding."""

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, values: Any) -> Any:
        """Recipes of finished runs say distributed_optimizer, which was a switch."""
        if not isinstance(values, dict) or "distributed_optimizer" not in values:
            return values
        if "zero" in values:
            raise ValueError("distributed_optimizer is the earlier name of zero=1, and zero is given too: leave distributed_optimizer out")
        return {k: v for k, v in values.items() if k != "distributed_optimizer"} | {"zero": int(bool(values["distributed_optimizer"]))}

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor > 1: there is no tensor group to split over")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline > 1 needs pipeline > 1")
        if self.encoder_data_parallel is not False and self.tensor * self.context == 1:
            raise ValueError(
                f"encoder_data_parallel={str(self.encoder_data_parallel).lower()} deals pictures to tensor and context ranks, and with "
                "tensor=1 and context=1 there are none: leave it out (data-parallel ranks have pictures of their own)"
            )
        if self.encoder_data_parallel is not False and self.encoder_tensor == "auto":
            raise ValueError("encoder_data_parallel has the encoder whole on every rank, whatever divides: leave encoder_tensor=auto out")
        default = type(self).model_fields["encoder_min_flops_per_byte"].default
        if self.encoder_data_parallel != "auto" and self.encoder_min_flops_per_byte != default:
            raise ValueError(
                f"encoder_min_flops_per_byte={self.encoder_min_flops_per_byte:g} is for encoder_data_parallel=auto, "
                f"not {str(self.encoder_data_parallel).lower()}"
            )
        if self.layers_per_stage is not None and self.split != "even":
            raise ValueError(f"layers_per_stage says where each layer goes, and so does split={self.split}: give one of them")
        if self.overlap_param_gather and not (self.zero == 1 and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs zero=1 and overlap_grad_reduce=true")
        if self.zero >= 2 and self.overlap_grad_reduce:
            raise ValueError(f"zero={self.zero} always overlaps the reduction of gradients: leave overlap_grad_reduce out")
        chosen = {self.recompute, self.encoder_recompute}
        if self.recompute_modules != ["core_attn"] and "selective" not in chosen:
            raise ValueError("recompute_modules is for recompute=selective (or recompute_encoder=selective): leave it out")
        if self.recompute_layers is not None and "full" not in chosen:
            raise ValueError("recompute_layers is for recompute=full (or recompute_encoder=full): leave it out")
        return self

    @property
    def encoder_recompute(self) -> Recompute:
        """What the encoder's layers recompute."""
        return self.recompute if self.recompute_encoder is None else self.recompute_encoder
