"""Cast to FP8 with scales by absolute maxima, and the transposed matrix in the same sweep."""

from megavlm_kernels.fp8_cast.op import fp8_cast
from megavlm_kernels.fp8_cast.reference import E4M3, E5M2, Fp8Matrix

__all__ = ["E4M3", "E5M2", "Fp8Matrix", "fp8_cast"]
