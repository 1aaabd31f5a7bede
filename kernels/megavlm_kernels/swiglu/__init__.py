"""Gated linear units (SwiGLU, GeGLU and their like) that keep nothing but their input."""

from megavlm_kernels.swiglu.op import gated_linear_unit

__all__ = ["gated_linear_unit"]
