"""The typed recipe: every field of a run, with its unit in the name and its meaning beside it.

A recipe is plain data. Nothing here imports torch, touches a file or knows a rank; `megavlm.config.load` reads YAML
into these classes. Unknown keys are refused. The order of a recipe's blocks is run, init, model, parallel, precision, data, stages,
evaluation, checkpoint, faults, tracking; init, model, data, stages, checkpoint and faults have files of their own beside this one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megavlm.config.blocks import Block, NonNegativeInt, PositiveFloat, PositiveInt
from megavlm.config.checkpoint import CheckpointConfig
from megavlm.config.data import DataConfig, ImageConfig, LossConfig, MixtureEntry, PictureMarks, SourceConfig
from megavlm.config.faults import FaultsConfig, WatchdogConfig
from megavlm.config.init import InitConfig
from megavlm.config.language import CrossAttentionConfig, LanguageConfig, MoeConfig, RopeScaling
from megavlm.config.model import ModelConfig
from megavlm.config.parallel import ParallelConfig
from megavlm.config.precision import PrecisionConfig
from megavlm.config.projector import ProjectorConfig
from megavlm.config.stages import ModuleTraining, OptimizerConfig, ScheduleConfig, StageConfig
from megavlm.config.tensor_split import check_tensor_split
from megavlm.config.tracking import ProfileConfig, TrackingConfig
from megavlm.config.vision import VisionConfig

__all__ = [
    "Block",
    "CheckpointConfig",
    "CrossAttentionConfig",
    "DataConfig",
    "EvaluationConfig",
    "FaultsConfig",
    "ImageConfig",
    "InitConfig",
    "LanguageConfig",
    "LossConfig",
    "MixtureEntry",
    "ModelConfig",
    "ModuleTraining",
    "MoeConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PictureMarks",
    "PrecisionConfig",
    "ProfileConfig",
    "ProjectorConfig",
    "Recipe",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TrackingConfig",
    "VisionConfig",
    "WatchdogConfig",
]

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


# ------------------------------------------------------------------------------------------------------- evaluation


class EvaluationConfig(Block):
    """Held-out loss during training."""

    sources: list[str] = Field(default_factory=list)
    """Names in data.sources whose loss is measured (use a held-out split)."""
    every_steps: PositiveInt | None = None
    """None: no evaluation during training."""
    packs: PositiveInt = 8
    """Packs measured each time; always the same ones."""
    num_answers: NonNegativeInt = 0
    """So many held-out samples of each task are answered after each measurement, and kept in <run.dir>/answers (and MLflow) with picture,
    reference and answer. 0: none. Only in grids that generation runs in (docs/training.md); elsewhere a line says so."""

    @model_validator(mode="after")
    def _answers_follow_measurements(self) -> EvaluationConfig:
        if self.num_answers and (not self.sources or self.every_steps is None):
            raise ValueError(f"num_answers={self.num_answers} comes behind measurements, and there are none: set sources and every_steps")
        return self


class Recipe(Block):
    """A whole run."""

    run: RunConfig
    init: InitConfig = Field(default_factory=InitConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    stages: list[StageConfig] = Field(min_length=1)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
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
            for module, total in (
                ("vision", min(e.num_used_layers for e in self.model.encoders)),
                ("language", self.model.language.num_layers),
            ):
                wanted = getattr(stage, module).last_layers
                if wanted is not None and wanted > total:
                    raise ValueError(f"stages[{i}].{module}.last_layers={wanted}, but {total} layers of model.{module} are used")
        language = self.model.language
        if language.positions == "learned" and self.data.seq_len_tokens > language.max_positions:
            raise ValueError(
                f"data.seq_len_tokens={self.data.seq_len_tokens} exceeds model.language.max_positions={language.max_positions}: "
                "learned positions end there"
            )
        if self.checkpoint.keep_best and (not self.evaluation.sources or self.evaluation.every_steps is None):
            raise ValueError(
                "checkpoint.keep_best goes by the held-out loss: set evaluation.sources and evaluation.every_steps, or keep_best=0"
            )
        self._check_text_only()
        self._check_pictures()
        check_tensor_split(self.model, self.parallel)
        self._check_experts()
        self._check_instructions()
        return self

    def _check_text_only(self) -> None:
        if not self.model.text_only:
            return
        for i, stage in enumerate(self.stages):
            if stage.objective != "text":
                raise ValueError(f"stages[{i}].objective={stage.objective}, but model.text_only=true has no encoder: set objective=text")
            for module in ("vision", "projector"):
                if getattr(stage, module) != StageConfig.model_fields[module].get_default(call_default_factory=True):
                    raise ValueError(f"stages[{i}].{module}: model.text_only=true has no {module}: leave it out")

    def _check_pictures(self) -> None:
        policy = self.data.image.policy
        self._check_canvas(policy)
        if policy in ("anyres", "native") and self.model.vision.class_token and self.model.vision.keep_class_token:
            raise ValueError(f"data.image.policy={policy} arranges patches in a plane: set model.vision.keep_class_token=false")
        if policy == "anyres" and self.model.projector.tokens_per_picture is not None:
            raise ValueError(
                f"data.image.policy=anyres arranges patches in a plane, and model.projector.kind={self.model.projector.kind} makes none: "
                "use fixed, tiles, split or native"
            )
        if self.model.projector.image_newline and policy != "anyres":
            raise ValueError(f"model.projector.image_newline=true goes with data.image.policy=anyres, not {policy}")
        mrope = self.model.language.mrope_sections is not None and not self.model.text_only
        if mrope and (policy not in ("native", "fixed") or self.data.image.marks.inner):
            raise ValueError(
                "model.language.mrope_sections gives a picture's visual tokens its rows and columns: set data.image.policy=native (or "
                "fixed), and no data.image.marks between them"
            )
        if policy == "native" and any(stage.objective == "vision_classification" for stage in self.stages):
            raise ValueError(
                "data.image.policy=native and objective=vision_classification do not go together: it takes one square tile a picture"
            )

    def _check_canvas(self, policy: str) -> None:
        if policy == "canvas" and self.model.vision.canvas is None:
            raise ValueError("data.image.policy=canvas needs model.vision.canvas: an encoder that sees a picture's tiles together")
        if self.model.vision.canvas is not None and policy not in ("canvas", "fixed"):
            raise ValueError(f"model.vision.canvas goes with data.image.policy=canvas (or fixed), not {policy}")
        alone = [stage.name for stage in self.stages if stage.objective == "vision_classification"]
        if alone and (self.model.vision.canvas is not None or self.model.language.cross_attention is not None):
            raise ValueError(
                f"stage {alone[0]!r} has objective=vision_classification, which takes a picture apart into tiles of their own: "
                "it does not go with model.vision.canvas or model.language.cross_attention"
            )
        if self.model.vision.canvas is not None and any(stage.vision.train == "last_layers" for stage in self.stages):
            raise ValueError("vision.train=last_layers: an encoder with model.vision.canvas has two stacks of layers; use frozen or full")

    def _check_experts(self) -> None:
        moe, parallel = self.model.language.moe, self.parallel
        if self.precision.dtype == "fp16" and parallel.zero >= 2:
            raise ValueError(
                f"precision.dtype=fp16 with parallel.zero={parallel.zero}: a rank sees overflows in its own part of the gradients and "
                "would skip steps that others take: use zero=1, or bf16"
            )
        if moe is not None and self.precision.dtype == "fp16":
            raise ValueError(
                "precision.dtype=fp16 with model.language.moe: experts and the rest would each have a loss scale of their own, and these "
                "would drift apart: use bf16"
            )
        if moe is None:
            if parallel.expert > 1:
                raise ValueError(f"parallel.expert={parallel.expert} needs model.language.moe: the language model has no experts")
            return
        if parallel.recompute == "selective" and "mlp" in parallel.recompute_modules:
            raise ValueError(
                "parallel.recompute_modules=mlp with model.language.moe would send every token to its experts a second time: use "
                "recompute=full, or core_attn alone"
            )
        if moe.num_experts % parallel.expert:
            raise ValueError(f"parallel.expert={parallel.expert} does not divide model.language.moe.num_experts={moe.num_experts}")
        if parallel.expert == 1 and moe.ffn_hidden_size % parallel.tensor:
            raise ValueError(f"parallel.tensor={parallel.tensor} does not divide model.language.moe.ffn_hidden_size={moe.ffn_hidden_size}")
        if parallel.tensor > 1 and not parallel.sequence:
            raise ValueError(
                "model.language.moe with parallel.tensor > 1 needs parallel.sequence=true: without it each tensor rank would send "
                "the same tokens to the experts again"
            )

    def _check_instructions(self) -> None:
        qformer, given = self.model.projector.qformer, self.data.instruction_tokenizer
        reads = qformer is not None and qformer.instruction is not None
        if reads != (given is not None):
            raise ValueError(
                "model.projector.qformer.instruction and data.instruction_tokenizer go together: the Q-Former reads the text of a "
                "picture's message in a vocabulary of its own; give both or neither"
            )
        if reads and self.data.image.policy != "fixed":
            raise ValueError(
                f"data.image.policy={self.data.image.policy}: a Q-Former with an instruction reads one tile a picture; use fixed"
            )
