"""Saving and resuming: when a run is saved, where to, what is kept, and what follows when it cannot be."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megavlm.config.blocks import Block, NonNegativeInt, PositiveFloat, PositiveInt


class LocalTierConfig(Block):
    """Checkpoints on each node's own disk or in its memory, beside those in run.dir: written more often, lost with the node."""

    dir: str
    """A folder of each node, such as /dev/shm/megavlm or /local/scratch; one that nodes share works too, and is no faster. Created when
    missing; each run has a folder of its own in it, and in that each node. It must hold `keep_last` + 1 times what this node's ranks
    save."""
    every_steps: PositiveInt
    """Steps between two local checkpoints. One that is due while another save is under way is left out."""
    keep_last: PositiveInt = 1
    """Older local checkpoints are deleted. All of them are when the run is done."""


class CheckpointConfig(Block):
    """Saving and resuming."""

    every_steps: PositiveInt | None = None
    """None: only at the end of a stage, at max_steps and on a signal."""
    asynchronous: bool = True
    """Train on while a thread of each rank writes a copy of its part in host memory. The last save of a stage, and one that a signal asks
    for, are waited for all the same."""
    keep_last: PositiveInt = 2
    """Older checkpoints inside a stage are deleted; the last of every stage is kept."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this step are kept for good."""
    keep_best: NonNegativeInt = 0
    """So many checkpoints of each stage with the lowest held-out loss are kept. The loss is then measured before each save too; it needs
    evaluation.sources and evaluation.every_steps, and only stages whose objective is multimodal have one."""
    resume: bool = True
    """Continue from the newest checkpoint in run.dir when there is one."""
    timeout_s: PositiveFloat = 600.0
    """A save that takes longer than this ends the job instead of hanging."""
    on_disk_full: Literal["exit", "continue"] = "exit"
    """exit: a save for which there is no room ends the job (exit code 80). continue: it is told and left out, and training goes on; the
    last one of a stage or of a run ends the job all the same. One that a signal asks for is left out as any other: the job ends with the
    signal's code, and the next start goes on from an older checkpoint. Older checkpoints are never touched for it."""
    local: LocalTierConfig | None = Field(default=None)
    """A second, quicker tier. The newer one of both is resumed from."""
