"""Visual features in the place of their placeholders, without the host waiting for the device."""

from megavlm_kernels.scatter_features.op import scatter_features

__all__ = ["scatter_features"]
