"""The recipe's tracking block: where metrics go, and a profile of some steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megavlm.config.blocks import Block, NonNegativeInt, PositiveFloat, PositiveInt


class ProfileConfig(Block):
    """A close look at some steps: a picture of where their time goes on every rank, and torch profiler traces of some."""

    first_step: PositiveInt | None = None
    """Steps are counted over all stages, from 1; None: no profile. A run that resumes behind this step makes none."""
    steps: PositiveInt = 2
    """So many steps from first_step on, as far as the stage has them. The picture shows them one behind the other."""
    trace_ranks: list[NonNegativeInt] | Literal["all", "none"] = Field(default_factory=lambda: [0])
    """Ranks that write a torch profiler trace (for chrome://tracing or https://ui.perfetto.dev). Tracing slows these ranks, and with them
    all that wait for them: "none" gives the truest picture."""

    @field_validator("trace_ranks")
    @classmethod
    def _once(cls, ranks: list[int] | str) -> list[int] | str:
        if not isinstance(ranks, str) and len(set(ranks)) < len(ranks):
            raise ValueError(f"trace_ranks={ranks} names a rank twice")
        return ranks


class TrackingConfig(Block):
    """Where metrics go besides metrics.jsonl."""

    mlflow: bool = True
    mlflow_uri: str | None = None
    """None: MLFLOW_TRACKING_URI, or sqlite:///<run.dir>/../mlflow.db."""
    experiment: str = "megavlm"
    system_metrics_every_s: PositiveFloat | None = 10.0
    """MLflow gets each node's use of processors, memory, disk, network and GPUs so often (MLFLOW_SYSTEM_METRICS_NODE_ID names a node; else
    node-0, node-1, ...). None: never."""
    register_model: Annotated[str, Field(pattern=r"^[^/:]+$")] | None = None
    """When the run ends well (the recipe is done, or run.max_steps reached), its newest checkpoint is exported to <run.dir>/hf and
    registered in MLflow as a new version of the model of this name; the whole folder is uploaded. None: not; later with
    `megavlm convert export --register NAME`."""
    register_timeout_s: PositiveFloat = 3600.0
    """So long rank 0 waits for that upload while the server answers; what is not done then waits in the spool."""
    log_every_steps: PositiveInt = 10
    """Console line interval; metrics.jsonl always gets every step."""
    num_sample_pictures: NonNegativeInt = 8
    """Training pictures with their conversations logged as artifacts at the start of each stage."""
    peak_tflops_per_rank: PositiveFloat | None = None
    """Peak of one rank's device for MFU; None: known GPUs by name, a measured matmul rate on a CPU."""
    step_parts: bool = True
    """Take apart each step's time (data, encoder, LLM, head, backward, communication, pipeline, optimizer): time_s in metrics.jsonl."""
    profile: ProfileConfig = Field(default_factory=ProfileConfig)

    @model_validator(mode="after")
    def _has_a_registry(self) -> TrackingConfig:
        if self.register_model is not None and not self.mlflow:
            raise ValueError(f"register_model={self.register_model} with mlflow=false: there is no MLflow to register it in")
        return self
