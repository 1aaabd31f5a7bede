"""LM head + cross-entropy on target rows only, in chunks, vocabulary-parallel."""

from megavlm_kernels.linear_cross_entropy.op import HeadLoss, linear_cross_entropy

__all__ = ["HeadLoss", "linear_cross_entropy"]
