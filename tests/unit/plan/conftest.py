"""Random metadata in the shape of a SampleIndex."""

from dataclasses import dataclass

import numpy as np
import pytest

from megavlm.data.resizing_base import PictureGrid


@dataclass
class FakeIndex:
    """A source without shards."""

    length_tokens: np.ndarray
    num_tiles: np.ndarray
    num_targets: np.ndarray
    fingerprint: str
    num_patches: np.ndarray
    patch_pairs: np.ndarray

    def __len__(self) -> int:
        return len(self.length_tokens)

    def grids(self, row: int) -> list[PictureGrid]:
        return []


def make_index(name: str, rows: int, most_tiles: int = 2, text: tuple[int, int] = (5, 60), tile_tokens: int = 36) -> FakeIndex:
    """`rows` samples with up to `most_tiles` tiles of 10 patches and texts of `text` tokens."""
    rng = np.random.default_rng(sum(name.encode()))
    tiles = rng.integers(0, most_tiles + 1, rows)
    texts = rng.integers(*text, rows)
    return FakeIndex(tiles * tile_tokens + texts, tiles, texts // 2, f"{name}-{rows}", tiles * 10, tiles * 100)


@pytest.fixture
def fake_index():
    """`make_index`."""
    return make_index
