"""The recipe's `stages`: what trains, on what, how long."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from megavlm.config.blocks import Block, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from megavlm.config.data import LossConfig, MixtureEntry


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


def _weight_or_entry(value: object) -> str:
    return "<entry>" if isinstance(value, dict | MixtureEntry) else "<weight>"


WeightOrEntry = Annotated[
    Annotated[NonNegativeFloat, Tag("<weight>")] | Annotated[MixtureEntry, Tag("<entry>")], Discriminator(_weight_or_entry)
]
"""A plain number is a weight. Told apart by what was written, so that a mistake is named once and where it is."""


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
    mixture: dict[str, WeightOrEntry]
    """Source name -> weight (share of samples; weights need not add up to one), or more about it: weights that change over the steps,
    repeats, a cap."""
    loss: LossConfig = Field(default_factory=LossConfig)
    vision: ModuleTraining = Field(default_factory=lambda: ModuleTraining(train="frozen"))
    projector: ModuleTraining = Field(default_factory=ModuleTraining)
    language: ModuleTraining = Field(default_factory=ModuleTraining)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)

    @property
    def mixture_entries(self) -> dict[str, MixtureEntry]:
        """The sources that are drawn from at some step, each with its full entry."""
        entries = {name: e if isinstance(e, MixtureEntry) else MixtureEntry(weight=e) for name, e in self.mixture.items()}
        return {name: entry for name, entry in entries.items() if entry.is_used}

    @property
    def sources(self) -> list[str]:
        """Names of the sources that are drawn from at some step, in the mixture's order."""
        return list(self.mixture_entries)

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if not self.sources:
            raise ValueError("mixture has no source with a weight above 0")
        if len({entry.repeats is None for entry in self.mixture_entries.values()}) > 1:
            raise ValueError("mixture: give every source a weight, or every source repeats; the two cannot be compared")
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
        if self.objective == "text" and self.language.train == "frozen":
            raise ValueError("objective=text with language.train=frozen: nothing would train")
        if self.objective == "multimodal" and all(m.train == "frozen" for m in (self.vision, self.projector, self.language)):
            raise ValueError("every module is frozen: nothing would train")
        return self
