"""Rotary positions in one sweep each way, from tables of cosines and sines of each row."""

from megavlm_kernels.rotary.op import rotary

__all__ = ["rotary"]
