"""Which language-model layers live on which pipeline rank and virtual chunk.

The even split of megatron-core (`transformer_layer.get_transformer_layer_offset`): with several chunks a rank holds layers from
all over the depth, chunk after chunk (interleaved schedule, Narayanan et al. 2021, arXiv 2104.04473, section 2.2). The vision
encoder, the projector and the embedding stand before the first layer; the final norm, the head and the loss after the last.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.topology.table import text_table


class PipelineError(ValueError):
    """Layers cannot be split evenly over the pipeline."""


@dataclass(frozen=True)
class PipelineSplit:
    """Even split of `num_layers` layers over `pipeline` ranks x `virtual_pipeline` chunks.

    Raises:
        PipelineError: the layers are not a multiple of pipeline x virtual_pipeline.
    """

    num_layers: int
    pipeline: int = 1
    virtual_pipeline: int = 1

    def __post_init__(self) -> None:
        chunks = self.pipeline * self.virtual_pipeline
        if self.num_layers < 1 or chunks < 1 or self.num_layers % chunks:
            divisors = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            raise PipelineError(
                f"model.language.num_layers={self.num_layers} cannot be split evenly over parallel.pipeline={self.pipeline} x "
                f"parallel.virtual_pipeline={self.virtual_pipeline} = {chunks} chunks: the product must be one of "
                f"{', '.join(map(str, divisors))}"
            )

    @property
    def layers_per_chunk(self) -> int:
        return self.num_layers // (self.pipeline * self.virtual_pipeline)

    def layers(self, pipeline_rank: int, chunk: int = 0) -> range:
        """Layers (counted from 0) of one chunk. Raises PipelineError for a rank or chunk that does not exist."""
        if not (0 <= pipeline_rank < self.pipeline and 0 <= chunk < self.virtual_pipeline):
            raise PipelineError(
                f"pipeline rank {pipeline_rank}, chunk {chunk} is outside {self.pipeline} ranks x {self.virtual_pipeline} chunks"
            )
        first = (chunk * self.pipeline + pipeline_rank) * self.layers_per_chunk
        return range(first, first + self.layers_per_chunk)

    def rank_layers(self, pipeline_rank: int) -> list[range]:
        """Layers of every chunk of one pipeline rank."""
        return [self.layers(pipeline_rank, chunk) for chunk in range(self.virtual_pipeline)]

    def owner(self, layer: int) -> tuple[int, int]:
        """(pipeline rank, chunk) that holds `layer`. Raises PipelineError when there is no such layer."""
        if not 0 <= layer < self.num_layers:
            raise PipelineError(f"layer {layer} does not exist: the model has {self.num_layers} layers (0 to {self.num_layers - 1})")
        chunk, pipeline_rank = divmod(layer // self.layers_per_chunk, self.pipeline)
        return pipeline_rank, chunk

    def is_first(self, pipeline_rank: int, chunk: int = 0) -> bool:
        """Does this chunk hold the encoder, the projector and the embedding?"""
        return pipeline_rank == 0 and chunk == 0

    def is_last(self, pipeline_rank: int, chunk: int | None = None) -> bool:
        """Does this chunk (None: the rank's last one) hold the final norm, the head and the loss?"""
        return pipeline_rank == self.pipeline - 1 and chunk in (None, self.virtual_pipeline - 1)

    def table(self) -> str:
        """The split as text for --dry-run, one line a chunk in order of the layers."""
        rows = []
        for chunk in range(self.virtual_pipeline):
            for rank in range(self.pipeline):
                layers = self.layers(rank, chunk)
                before = "encoder, projector, embedding" if self.is_first(rank, chunk) else ""
                after = "norm, head, loss" if self.is_last(rank, chunk) else ""
                rows.append((rank, chunk, f"{layers[0]}-{layers[-1]}", ", ".join(filter(None, (before, after)))))
        return text_table(("pipeline rank", "chunk", "layers", "also"), rows)
