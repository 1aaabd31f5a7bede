"""Linear layer whose three matrix products run in FP8."""

from megavlm_kernels.fp8_linear.op import Fp8Format, cast_weight, fp8_linear, whatever_stops_scaled_mm

__all__ = ["Fp8Format", "cast_weight", "fp8_linear", "whatever_stops_scaled_mm"]
