"""Root-mean-square norm in one sweep each way."""

from megavlm_kernels.rms_norm.op import rms_norm

__all__ = ["rms_norm"]
