"""What a SLURM cluster is like, in a file of its own: `configs/clusters/*.yaml`. Recipes say nothing of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megavlm.config.blocks import Block, NonNegativeInt, PositiveInt
from megavlm.config.compose import read_composition
from megavlm.config.errors import RecipeError
from megavlm.config.fields import Path as Place
from megavlm.config.messages import mistakes_of

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d{1,2}(:\d\d){0,2}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ContainerConfig(Block):
    """The image in which every rank runs."""

    image: str
    """A file (.sqsh, .sif) or a registry's name, as the runtime takes it."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """How it is entered: pyxis is srun's own --container-image (enroot); apptainer is called by every task."""
    mounts: list[str] = Field(default_factory=list)
    """host:container[:ro] each. The folder that the job was submitted from, the run's folder and checkpoint.local.dir are mounted at their
    own paths anyway."""

    @field_validator("mounts")
    @classmethod
    def _pairs(cls, mounts: list[str]) -> list[str]:
        for mount in mounts:
            if not 2 <= len(mount.split(":")) <= 3 or not mount.startswith("/") or "," in mount:
                raise ValueError(f"{mount!r} is not host:container or host:container:ro, with whole paths and no comma")
        return mounts


class ClusterConfig(Block):
    """A cluster's facts. `megavlm launch` takes each of them from the command line as well."""

    partition: str | None = None
    """None: the cluster's default."""
    account: str | None = None
    qos: str | None = None
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 8
    """A rank for each. 0: a cluster without GPUs, see ranks_per_node."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node=8, --gres=gpu:8 (older clusters), or not at all (whole nodes come with theirs)."""
    gpu_type: str | None = None
    """As the cluster names it, such as h100: asks for gpu:h100:8."""
    ranks_per_node: PositiveInt | None = None
    """None: one for each GPU."""
    cpus_per_rank: PositiveInt | None = None
    """Cores of each rank, for its data loader. None: what SLURM gives, often a single one."""
    exclusive: bool = True
    """Whole nodes. False: share them with other jobs."""
    memory_per_node: str | None = "0"
    """As in --mem: "0" is all of the node's, None the cluster's default."""
    time: str = "24:00:00"
    """Limit of one job: minutes, hours:minutes:seconds or days-hours:minutes:seconds. A run may take many, one after the other."""
    signal: Literal["USR1", "USR2"] = "USR2"
    """What asks the ranks to save and end before the limit. NCCL may catch USR1."""
    signal_before_s: PositiveInt = 120
    """So many seconds before the limit: long enough for a step and a checkpoint."""
    requeue: bool = True
    """Put the job back into the queue when it was stopped by the limit, a crash, a lost node or preemption. False, where a cluster forbids
    it: see --array-chain."""
    max_fruitless_restarts: PositiveInt = 2
    """So many restarts in a row without a newer checkpoint end the chain (exit code 86)."""
    setup: list[str] = Field(default_factory=list)
    """Lines of shell before the ranks start, such as `module load cuda`. Outside of a container."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of every rank, such as NCCL_SOCKET_IFNAME: ib0."""
    srun_options: list[str] = Field(default_factory=list)
    """More options of srun, one a line, such as --mpi=none."""
    sbatch_options: list[str] = Field(default_factory=list)
    """More options of sbatch, one a line, such as --constraint=h100."""
    container: ContainerConfig | None = None

    @property
    def ranks(self) -> int:
        return self.ranks_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str) -> str:
        if not _TIME.fullmatch(time):
            raise ValueError(f"{time!r} is no time limit: write minutes, hours:minutes:seconds or days-hours:minutes:seconds")
        return time

    @field_validator("env")
    @classmethod
    def _are_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be the name of an environment variable")
        return env

    @field_validator("srun_options", "sbatch_options")
    @classmethod
    def _are_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"{option!r} is not an option: each line begins with a dash")
        return options

    @model_validator(mode="after")
    def _has_ranks(self) -> ClusterConfig:
        if not self.ranks:
            raise ValueError("gpus_per_node is 0: say how many ranks a node gets (ranks_per_node)")
        return self


def load_cluster(path: str | Path) -> ClusterConfig:
    """The cluster of a YAML file, which may build on others (`base:`). Raises RecipeError naming the file and every field that is wrong."""
    found = read_composition(path)
    return checked_cluster(found.values, str(path), found.origins)


def checked_cluster(values: dict[str, Any], source: str, origins: Mapping[Place, str] | None = None) -> ClusterConfig:
    """Raises RecipeError naming the source and every field that is wrong; `origins`: where each was set."""
    try:
        return ClusterConfig.model_validate(values, strict=True)
    except ValidationError as error:
        raise RecipeError(source, mistakes_of(error, ClusterConfig, origins or {})) from None
