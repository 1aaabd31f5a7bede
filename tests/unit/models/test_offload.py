"""What is not sent to host memory: tables that all layers read. tests/distributed/test_recompute_offload.py is about the rest."""

from __future__ import annotations

import torch

from megavlm.models.layers.offload import Offloader


def test_what_layers_share_stays() -> None:
    x, table, own = torch.randn(64, 32, requires_grad=True), torch.randn(128, 32), torch.randn(64, 32)
    offloader = Offloader(torch.device("cpu"))
    for shared, sent in (([table], 1), ([], 2)):
        with offloader.layer(torch.nn.Identity(), shared):
            y = x * table[:64] * own
        assert len(offloader._layers[-1]) == sent, "its own factor, and the table where nobody shares it"
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, own * table[:64])
