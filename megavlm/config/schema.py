"""The typed recipe: every field of a run, with its unit in the name and its meaning beside it.

A recipe is plain data. Nothing here imports torch, touches a file or knows a rank; `megavlm.config.load` reads YAML
into these classes. Unknown keys are refused. The order of the classes is the order of a recipe's blocks:
run, model, parallel, precision, data, stages, evaluation, checkpoint, tracking.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Block(BaseModel):
    """Base of every block: unknown keys are errors, values are checked on assignment, nothing is coerced silently."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=False, use_attribute_docstrings=True)


# ------------------------------------------------------------------------------------------------------------- run


class RunConfig(Block):
    """What the run is called, where it lives and how long it may go on."""

    name: str = "run"
    """Shown in logs and in MLflow."""
    dir: str
    """Folder of the run: resolved recipe, metrics, checkpoints. Created when missing."""
    seed: int = 1234
    """Seeds weight initialisation, sample order and packing. The same seed gives the same run in every layout."""
    num_ranks: PositiveInt | None = None
    """Local ranks that `megavlm train` starts by itself; None: one per GPU, or one on a CPU. Ignored under torchrun and SLURM."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps over all stages, with a checkpoint; None: run every stage to its end."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when a GPU is visible, else the CPU over gloo."""
    deterministic: bool = True
    """Ask torch for deterministic kernels; resume is bit-exact only with this on."""
    distributed_timeout_s: PositiveFloat = 600.0
    """A collective that waits longer than this ends the job."""


# ----------------------------------------------------------------------------------------------------------- model


class VisionConfig(Block):
    """A pre-LayerNorm vision transformer (CLIP and SigLIP styles)."""

    image_size_px: PositiveInt = 336
    """Side of the square tile that the encoder sees."""
    patch_size_px: PositiveInt = 14
    num_channels: PositiveInt = 3
    num_layers: PositiveInt = 24
    """Transformer layers that the weights have (including any above `feature_layer`)."""
    hidden_size: PositiveInt = 1024
    num_attention_heads: PositiveInt = 16
    ffn_hidden_size: PositiveInt = 4096
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    norm_eps: PositiveFloat = 1e-5
    class_token: bool = True
    """CLIP has one, SigLIP has none."""
    pre_norm: bool = True
    """A LayerNorm between embeddings and the first layer (CLIP)."""
    patch_bias: bool = False
    """Bias of the patch embedding (SigLIP)."""
    feature_layer: int = -2
    """Which hidden state feeds the projector, counted as Hugging Face does: -1 is the last layer's output, -2 the one before."""
    final_norm: bool = False
    """Apply the encoder's final LayerNorm to the features. LLaVA takes raw hidden states: False."""
    keep_class_token: bool = False
    """Feed the class token to the LLM as well (Hugging Face's vision_feature_select_strategy="full")."""
    pooling_head: bool = False
    """The imported weights hold an attention-pooling head (SigLIP); carried along untouched for a lossless export."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return (self.image_size_px // self.patch_size_px) ** 2

    @property
    def num_used_layers(self) -> int:
        """Layers that the forward pass executes."""
        return self.feature_layer + 1 + self.num_layers if self.feature_layer < 0 else self.feature_layer

    @property
    def num_features(self) -> int:
        """Feature vectors that one tile hands to the projector."""
        return self.num_patches + (1 if self.class_token and self.keep_class_token else 0)

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.image_size_px % self.patch_size_px:
            raise ValueError(f"image_size_px={self.image_size_px} is not a multiple of patch_size_px={self.patch_size_px}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")
        if not 1 <= self.num_used_layers <= self.num_layers:
            raise ValueError(f"feature_layer={self.feature_layer} does not name the output of one of {self.num_layers} layers")
        if self.final_norm and self.num_used_layers != self.num_layers:
            raise ValueError("final_norm needs feature_layer=-1: the final norm belongs to the last layer's output")
        return self


class ProjectorConfig(Block):
    """What maps visual features to the LLM's width."""

    num_layers: Literal[1, 2] = 2
    """1: one linear layer; 2: linear, GELU, linear (LLaVA-1.5)."""
    hidden_size: PositiveInt | None = None
    """Width between the two layers; None: the LLM's hidden size."""
    bias: bool = True
    pixel_shuffle: PositiveInt = 1
    """Merge pixel_shuffle x pixel_shuffle neighbouring patches into one token before the projection (InternVL uses 2)."""
    input_norm: bool = False
    """A LayerNorm on the (shuffled) features before the first linear layer (InternVL)."""


class LanguageConfig(Block):
    """A decoder-only language model: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    vocab_size: PositiveInt = 32064
    """Rows of the embedding as the tokenizer and Hugging Face know it; padded internally for tensor parallelism."""
    num_layers: PositiveInt = 32
    hidden_size: PositiveInt = 4096
    num_attention_heads: PositiveInt = 32
    num_query_groups: PositiveInt | None = None
    """Key/value heads (grouped-query attention); None: as many as attention heads."""
    head_dim: PositiveInt | None = None
    """Width of a head; None: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt = 11008
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    qkv_bias: bool = False
    """Bias on query, key and value (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key (Qwen3)."""
    tie_embeddings: bool = False
    """Output head shares the embedding's weight."""
    max_positions: PositiveInt = 4096

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _check(self) -> LanguageConfig:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")
        if self.head_width % 2:
            raise ValueError(f"heads are {self.head_width} wide, and rotary positions need an even width: change head_dim or hidden_size")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} is not a multiple of num_query_groups={self.kv_heads}")
        return self


class ModelConfig(Block):
    """Encoder x projector x LLM."""

    family: Literal["llava"] = "llava"
    """Which Hugging Face class the export becomes."""
    vision: VisionConfig = Field(default_factory=VisionConfig)
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    language: LanguageConfig = Field(default_factory=LanguageConfig)
    init_from: str | None = None
    """Hugging Face folder whose weights the run starts from; None: random initialisation."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of random initialisation (linear layers, embeddings)."""

    @property
    def visual_tokens_per_tile(self) -> int:
        """Placeholders that one tile expands to."""
        if self.projector.pixel_shuffle == 1:
            return self.vision.num_features
        return self.vision.num_patches // self.projector.pixel_shuffle**2

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        shuffle, side = self.projector.pixel_shuffle, self.vision.image_size_px // self.vision.patch_size_px
        if side % shuffle:
            raise ValueError(f"projector.pixel_shuffle={shuffle} does not divide the {side} patches on a tile's side")
        if shuffle > 1 and self.vision.class_token and self.vision.keep_class_token:
            raise ValueError("projector.pixel_shuffle needs a square of patches: set vision.keep_class_token=false")
        return self


# -------------------------------------------------------------------------------------------------------- parallel


class ParallelConfig(Block):
    """Shape of the rank grid; data parallelism takes what is left."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: PositiveInt = 1
    """Ranks that share each sequence."""
    expert: PositiveInt = 1
    """Ranks that share the experts of a mixture-of-experts layer; a dense model takes only 1."""
    sequence: bool = False
    """Megatron sequence parallelism: activations outside attention and MLP are split over the tensor ranks."""
    distributed_optimizer: bool = False
    """ZeRO-1: optimizer state is split over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the distributed optimizer's parameter gather with the forward pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in LLM and encoder: attention only, or whole layers."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor > 1: there is no tensor group to split over")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline > 1 needs pipeline > 1")
        if self.expert > 1:
            raise ValueError("expert > 1 needs a mixture-of-experts model, and model.language describes a dense one: set expert=1")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed_optimizer=true and overlap_grad_reduce=true")
        return self


class PrecisionConfig(Block):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Format of parameters and activations in forward and backward. bf16 keeps fp32 master weights in the optimizer."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""


# ------------------------------------------------------------------------------------------------------------ data


class SourceConfig(Block):
    """One data set: a folder of shards."""

    path: str
    """Folder holding shard-*.tar files (see docs/data.md)."""
    split: str = "train"
    """Only samples whose metadata says this split; the index refuses a split that has no sample."""
    tasks: list[str] | None = None
    """Only samples of these tasks; None: all."""


class ImageConfig(Block):
    """From a picture to tiles. Tile size comes from model.vision.image_size_px."""

    max_tiles: PositiveInt = 1
    """Most tiles of one image (InternVL's aspect-ratio grid); 1: the whole picture resized to one tile."""
    thumbnail: bool = False
    """Add the whole picture as one more tile when it was cut into several."""
    decoder: Literal["auto", "pillow", "nvimgcodec"] = "auto"
    """auto: nvImageCodec when a GPU can be used, else Pillow."""


class DataConfig(Block):
    """Sources, sequence and packing budgets, conversation format."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    tokenizer: str = ""
    """A SentencePiece model file (*.model) or a Hugging Face folder with tokenizer.json."""
    chat_template: Literal["megavlm", "chatml", "llava-v1", "plain"] = "megavlm"
    """Named conversation format; see docs/data.md."""
    image: ImageConfig = Field(default_factory=ImageConfig)
    seq_len_tokens: PositiveInt = 4096
    """Length of a pack: a hard budget on LLM tokens, visual tokens included."""
    pack_window_samples: PositiveInt = 256
    """Samples waiting for a place; the packer fills each pack from these."""
    max_tiles_per_pack: PositiveInt | None = None
    """Hard budget on tiles (vision work) of one pack; None: no limit."""
    packing: bool = True
    """False: one sample per sequence (for comparison)."""
    num_workers: NonNegativeInt = 1
    """Threads that decode and tokenise ahead; 0: in the training thread."""
    prefetch_steps: PositiveInt = 2
    """Steps kept ready ahead of the training thread."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than this share of the samples so far could not be read."""


# ---------------------------------------------------------------------------------------------------------- stages


class ModuleTraining(Block):
    """What of one module trains, and how fast."""

    train: Literal["frozen", "full", "last_layers"] = "full"
    last_layers: PositiveInt | None = None
    """With train=last_layers: this many top transformer layers (and what comes after them) train."""
    lr_scale: PositiveFloat = 1.0
    """Learning rate of this module = schedule x lr_scale."""
    weight_decay: NonNegativeFloat | None = None
    """Overrides optimizer.weight_decay for this module."""

    @model_validator(mode="after")
    def _check(self) -> ModuleTraining:
        if (self.train == "last_layers") != (self.last_layers is not None):
            raise ValueError("last_layers goes with train=last_layers, and train=last_layers needs it")
        return self


class OptimizerConfig(Block):
    """AdamW."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """On matrices only; biases, norms, embeddings' positions and class tokens never decay."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm is scaled down to this; 0: no clipping."""


class ScheduleConfig(Block):
    """Learning rate over the steps of the stage."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """wsd: warm-up, stable, decay (linear, over the last decay_steps)."""
    warmup_steps: NonNegativeInt = 0
    decay_steps: NonNegativeInt | None = None
    """wsd only: length of the final decay."""
    min_lr_fraction: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


class StageConfig(Block):
    """One stage of the recipe: what trains, on what, how long."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """Letters, digits, "-" and "_": checkpoints' folders are called after it."""
    objective: Literal["multimodal", "text", "vision_classification"] = "multimodal"
    """multimodal: next token of the whole model. text: the language model alone, on samples without images.
    vision_classification: the encoder alone, class of each labelled patch, through a head that is dropped after the stage."""
    steps: PositiveInt
    """Optimizer steps."""
    packs_per_step: PositiveInt = 8
    """Global batch: packs of data.seq_len_tokens per optimizer step, over all ranks and microbatches.
    For vision_classification: images per step = packs_per_step x images_per_pack."""
    micro_batch_packs: PositiveInt = 1
    """Packs that go through the model together on one rank."""
    images_per_pack: PositiveInt = 16
    """vision_classification only: images that form one pack."""
    num_classes: PositiveInt | None = None
    """vision_classification only: classes of the patch labels in the data."""
    mixture: dict[str, NonNegativeFloat]
    """Source name -> weight (share of samples); weights need not add up to one."""
    vision: ModuleTraining = Field(default_factory=lambda: ModuleTraining(train="frozen"))
    projector: ModuleTraining = Field(default_factory=ModuleTraining)
    language: ModuleTraining = Field(default_factory=ModuleTraining)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if not any(self.mixture.values()):
            raise ValueError("mixture has no source with a weight above 0")
        if (self.objective == "vision_classification") != (self.num_classes is not None):
            raise ValueError("num_classes goes with objective=vision_classification, and that objective needs it")
        if self.packs_per_step % self.micro_batch_packs:
            raise ValueError(f"packs_per_step={self.packs_per_step} is not a multiple of micro_batch_packs={self.micro_batch_packs}")
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds steps={self.steps}")
        decay = self.schedule.decay_steps
        if decay is not None and self.schedule.kind != "wsd":
            raise ValueError(f"schedule.decay_steps={decay} goes with kind=wsd; kind={self.schedule.kind} decays over the whole stage")
        if decay is not None and self.schedule.warmup_steps + decay > self.steps:
            raise ValueError(f"schedule.warmup_steps={self.schedule.warmup_steps} + decay_steps={decay} exceed steps={self.steps}")
        if self.projector.train == "last_layers":
            raise ValueError("projector.train=last_layers: the projector has no transformer layers; use frozen or full")
        if self.objective == "multimodal" and all(m.train == "frozen" for m in (self.vision, self.projector, self.language)):
            raise ValueError("every module is frozen: nothing would train")
        return self


# ------------------------------------------------------------------------------------- evaluation, checkpoint, tracking


class EvaluationConfig(Block):
    """Held-out loss during training."""

    sources: list[str] = Field(default_factory=list)
    """Names in data.sources whose loss is measured (use a held-out split)."""
    every_steps: PositiveInt | None = None
    """None: no evaluation during training."""
    packs: PositiveInt = 8
    """Packs measured each time; always the same ones."""


class CheckpointConfig(Block):
    """Saving and resuming."""

    every_steps: PositiveInt | None = None
    """None: only at the end of a stage, at max_steps and on a signal."""
    keep_last: PositiveInt = 2
    """Older checkpoints inside a stage are deleted; the last of every stage is kept."""
    resume: bool = True
    """Continue from the newest checkpoint in run.dir when there is one."""
    timeout_s: PositiveFloat = 600.0
    """A save that takes longer than this ends the job instead of hanging."""


class TrackingConfig(Block):
    """Where metrics go besides metrics.jsonl."""

    mlflow: bool = True
    mlflow_uri: str | None = None
    """None: MLFLOW_TRACKING_URI, or sqlite:///<run.dir>/../mlflow.db."""
    experiment: str = "megavlm"
    log_every_steps: PositiveInt = 10
    """Console line interval; metrics.jsonl always gets every step."""
    num_sample_pictures: NonNegativeInt = 8
    """Training pictures with their conversations logged as artifacts at the start of each stage."""
    peak_tflops_per_rank: PositiveFloat | None = None
    """Peak of one rank's device for MFU; None: known GPUs by name, a measured matmul rate on a CPU."""


class Recipe(Block):
    """A whole run."""

    run: RunConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    stages: list[StageConfig] = Field(min_length=1)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @field_validator("stages")
    @classmethod
    def _unique_names(cls, stages: list[StageConfig]) -> list[StageConfig]:
        names = [s.name for s in stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called {name!r}: names must differ")
        return stages

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        known = set(self.data.sources)
        for i, stage in enumerate(self.stages):
            for source in stage.mixture:
                if source not in known:
                    raise ValueError(
                        f"stages[{i}].mixture names {source!r}, which is not in data.sources ({', '.join(sorted(known)) or 'empty'})"
                    )
        for source in self.evaluation.sources:
            if source not in known:
                raise ValueError(
                    f"evaluation.sources names {source!r}, which is not in data.sources ({', '.join(sorted(known)) or 'empty'})"
                )
        for i, stage in enumerate(self.stages):
            for module, total in (("vision", self.model.vision.num_used_layers), ("language", self.model.language.num_layers)):
                wanted = getattr(stage, module).last_layers
                if wanted is not None and wanted > total:
                    raise ValueError(f"stages[{i}].{module}.last_layers={wanted}, but {total} layers of model.{module} are used")
        self._check_tensor_split()
        return self

    def _check_tensor_split(self) -> None:
        heads, kv, tp = self.model.language.num_attention_heads, self.model.language.kv_heads, self.parallel.tensor
        if heads % tp or (kv % tp and tp % kv):
            raise ValueError(f"parallel.tensor={tp} does not divide model.language's {heads} attention heads and {kv} key/value heads")
        projector = self.model.projector
        widths = {
            "vision.num_attention_heads": self.model.vision.num_attention_heads,
            "vision.ffn_hidden_size": self.model.vision.ffn_hidden_size,
            "language.ffn_hidden_size": self.model.language.ffn_hidden_size,
            "language.hidden_size": self.model.language.hidden_size,
            "projector.hidden_size": projector.hidden_size or self.model.language.hidden_size,
        }
        for name, width in widths.items():
            if width % tp:
                raise ValueError(f"parallel.tensor={tp} does not divide model.{name}={width}")
