"""From logits to the next token: greedy, or temperature with top-k and top-p; with or without a penalty on repetition.

Shape legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class GenerationError(ValueError):
    """A request for generation that cannot be met."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    Raises GenerationError for a value out of range, and for top_k or top_p beside temperature=0, where they would change nothing.
    """

    temperature: float = 0.0
    """0: always the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens may be drawn; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability may be drawn (https://arxiv.org/abs/1904.09751); 1: all."""
    seed: int = 0
    repetition_penalty: float = 1.0
    """Logits of tokens that the sequence holds already (the prompt's too) are divided by this where positive, multiplied where negative
    (https://arxiv.org/abs/1909.05858, section 4.1); 1: none. Greedy choices heed it too."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise GenerationError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise GenerationError(f"top_k={self.top_k} must be 0 (all tokens) or positive")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise GenerationError(f"repetition_penalty={self.repetition_penalty} must be positive: 1 for none, above 1 against repetition")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise GenerationError(f"top_k={self.top_k}, top_p={self.top_p} do nothing at temperature=0 (greedy): set a temperature")


def filtered_logits(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits after temperature, top-k, top-p, in the order of Hugging Face's generate; excluded tokens are -inf."""
    logits = logits_BV / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
        before[:, 0] = 0  # the most probable token always stays
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits


def penalised(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits with those of the tokens `seen` (bool) made less probable, as Hugging Face's RepetitionPenaltyLogitsProcessor does."""
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


class Sampler:
    """Chooses tokens. Each sequence draws from its own stream, seeded by (seed, number of the sequence).

    What a sequence draws therefore depends neither on its neighbours nor on when they end.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._streams: dict[int, torch.Generator] = {}
        self._seen: dict[int, torch.Tensor] = {}

    def start(self, sequence: int, ids: Sequence[int]) -> None:
        """Say what a sequence begins with: the penalty on repetition counts it."""
        self._seen[sequence] = torch.tensor(sorted(set(ids)))

    def next_tokens(self, logits_BV: torch.Tensor, sequences: list[int]) -> torch.Tensor:
        """int64 (B): the next token of each of `sequences` (their numbers, which name their random streams)."""
        if self.sampling.repetition_penalty == 1.0:
            return self._chosen(logits_BV, sequences)
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            seen = self._seen.get(sequence, torch.empty(0, dtype=torch.int64))
            # What lies beyond the head (Mllama's image token) can never come next.
            seen_BV[row, seen[seen < logits_BV.shape[-1]].to(logits_BV.device)] = True
        tokens = self._chosen(penalised(logits_BV, seen_BV, self.sampling.repetition_penalty), sequences)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            self._seen[sequence] = torch.cat([self._seen.get(sequence, torch.empty(0, dtype=torch.int64)), torch.tensor([token])])
        return tokens

    def _chosen(self, logits_BV: torch.Tensor, sequences: list[int]) -> torch.Tensor:
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        probability = filtered_logits(logits_BV, self.sampling).double().softmax(-1)
        draws = torch.stack([torch.rand((), generator=self._stream(s), dtype=torch.float64) for s in sequences])
        cumulative = probability.cumsum(-1)
        # Strictly above the draw: a token of probability 0 never moves the sum, so it is never the first above it.
        target = draws.to(logits_BV.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits_BV.shape[-1] - 1)

    def _stream(self, sequence: int) -> torch.Generator:
        if sequence not in self._streams:
            seed = zlib.crc32(f"{self.sampling.seed}/{sequence}".encode())
            self._streams[sequence] = torch.Generator().manual_seed(seed)
        return self._streams[sequence]
