"""Pictures that the LLM reads by cross-attention: whatever the policy makes of a picture, it is one token in the text."""

from __future__ import annotations

import numpy as np
import torch

from megavlm.data.resizing_base import PictureGrid, Resizing, check_cap


class OneToken(Resizing):
    """Another policy with one visual token a picture. Caps on visual tokens then lower no resolution: each picture has its one."""

    def __init__(self, policy: Resizing) -> None:
        self.policy, self.native = policy, policy.native

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        check_cap(max_tokens, 1, width, height, "of one token a picture")
        return self.policy.grid(width, height)._replace(tokens=1)

    def least(self, width: int, height: int) -> int:
        return 1

    def for_several(self) -> OneToken:
        return OneToken(self.policy.for_several())

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        return self.policy.cut(picture_HWC, grid)

    def grey(self, grid: PictureGrid) -> torch.Tensor:
        return self.policy.grey(grid)
