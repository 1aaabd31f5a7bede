"""Which language-model layers live on which pipeline rank and virtual chunk.

With several chunks a rank holds layers from all over the depth, chunk after chunk (interleaved schedule, Narayanan et al. 2021,
arXiv 2104.04473, section 2.2). The vision encoder, the projector and the embedding stand before the first layer; the final norm, the
head and the loss after the last. Chunks need not hold equally many layers, and the first and the last may hold none.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from megavlm.config.schema import ParallelConfig


class PipelineError(ValueError):
    """Layers cannot be split over the pipeline as asked."""


@dataclass(frozen=True)
class PipelineSplit:
    """Split of `num_layers` layers over `pipeline` ranks x `virtual_pipeline` chunks.

    `counts`: layers of each chunk from the bottom of the model to its top: chunk 0 of every rank, then chunk 1 of every rank, ...;
    empty: equally many each.

    Raises:
        PipelineError: the layers are not a multiple of pipeline x virtual_pipeline; `counts` do not add up, are too many or too few, or
            leave a chunk in the middle without a layer.
    """

    num_layers: int
    pipeline: int = 1
    virtual_pipeline: int = 1
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        chunks = self.num_chunks
        if self.counts:
            self._check_counts()
            return
        if self.num_layers < 1 or chunks < 1 or self.num_layers % chunks:
            divisors = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            raise PipelineError(
                f"model.language.num_layers={self.num_layers} cannot be split evenly over parallel.pipeline={self.pipeline} x "
                f"parallel.virtual_pipeline={self.virtual_pipeline} = {chunks} chunks: the product must be one of "
                f"{', '.join(map(str, divisors))}; or set parallel.split=balanced or parallel.layers_per_stage"
            )
        object.__setattr__(self, "counts", (self.num_layers // chunks,) * chunks)

    @classmethod
    def of(cls, num_layers: int, parallel: ParallelConfig) -> PipelineSplit:
        """The split that a recipe's `parallel` block describes.

        Raises:
            PipelineError: as the class; a balanced split over several stages that nobody has settled (planner.stages.settled).
        """
        if parallel.pipeline > 1 and parallel.split != "even":
            raise PipelineError(
                f"parallel.split={parallel.split} depends on what packs cost: planner.stages.settled turns it into layers_per_stage"
            )
        return cls(num_layers, parallel.pipeline, parallel.virtual_pipeline, tuple(parallel.layers_per_stage or ()))

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole model."""
        return self.pipeline * self.virtual_pipeline

    @property
    def is_even(self) -> bool:
        """Do all chunks hold equally many layers?"""
        return len(set(self.counts)) == 1

    def layers(self, pipeline_rank: int, chunk: int = 0) -> range:
        """Layers (counted from 0) of one chunk, which may be none. Raises PipelineError for a rank or chunk that does not exist."""
        if not (0 <= pipeline_rank < self.pipeline and 0 <= chunk < self.virtual_pipeline):
            raise PipelineError(
                f"pipeline rank {pipeline_rank}, chunk {chunk} is outside {self.pipeline} ranks x {self.virtual_pipeline} chunks"
            )
        depth = chunk * self.pipeline + pipeline_rank
        return range(self._starts[depth], self._starts[depth + 1])

    def rank_layers(self, pipeline_rank: int) -> list[range]:
        """Layers of every chunk of one pipeline rank."""
        return [self.layers(pipeline_rank, chunk) for chunk in range(self.virtual_pipeline)]

    def owner(self, layer: int) -> tuple[int, int]:
        """(pipeline rank, chunk) that holds `layer`. Raises PipelineError when there is no such layer."""
        if not 0 <= layer < self.num_layers:
            raise PipelineError(f"layer {layer} does not exist: the model has {self.num_layers} layers (0 to {self.num_layers - 1})")
        chunk, pipeline_rank = divmod(bisect_right(self._starts, layer) - 1, self.pipeline)
        return pipeline_rank, chunk

    def is_first(self, pipeline_rank: int, chunk: int = 0) -> bool:
        """Does this chunk hold the encoder, the projector and the embedding?"""
        return pipeline_rank == 0 and chunk == 0

    def is_last(self, pipeline_rank: int, chunk: int | None = None) -> bool:
        """Does this chunk (None: the rank's last one) hold the final norm, the head and the loss?"""
        return pipeline_rank == self.pipeline - 1 and chunk in (None, self.virtual_pipeline - 1)

    def modules(self) -> list[list[str]]:
        """What each chunk holds, from bottom to top: megatron-core's `pipeline_model_parallel_layout`."""
        chunks = [["decoder"] * count for count in self.counts]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        return chunks

    def layer_names(self, pipeline_rank: int, chunk: int) -> str:
        """A chunk's layers in words: "3-5", "3" or "none"."""
        layers = self.layers(pipeline_rank, chunk)
        if not layers:
            return "none"
        return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"

    def also(self, pipeline_rank: int, chunk: int) -> str:
        """What a chunk holds besides layers, in words."""
        before = "encoder, projector, embedding" if self.is_first(pipeline_rank, chunk) else ""
        after = "norm, head, loss" if self.is_last(pipeline_rank, chunk) else ""
        return ", ".join(filter(None, (before, after)))

    @cached_property
    def _starts(self) -> list[int]:
        """First layer of each chunk in order of depth, and the number of layers."""
        return [0, *accumulate(self.counts)]

    def _check_counts(self) -> None:
        given = f"parallel.layers_per_stage={list(self.counts)}"
        if len(self.counts) != self.num_chunks:
            raise PipelineError(
                f"{given} has {len(self.counts)} numbers, but parallel.pipeline={self.pipeline} x "
                f"parallel.virtual_pipeline={self.virtual_pipeline} = {self.num_chunks} chunks need one each, from the bottom of the model "
                "to its top: chunk 0 of every rank, then chunk 1 of every rank"
            )
        if sum(self.counts) != self.num_layers:
            raise PipelineError(
                f"{given} adds up to {sum(self.counts)} layers, but model.language.num_layers={self.num_layers}: change the list"
            )
        for depth, count in enumerate(self.counts):
            if count < 0 or (count == 0 and 0 < depth < self.num_chunks - 1):
                raise PipelineError(
                    f"{given}: number {depth + 1} leaves its chunk without a layer, and so without work; only the first (encoder, "
                    "projector, embedding) and the last (norm, head, loss) may have none"
                )
