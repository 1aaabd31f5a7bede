"""What the kernels take, for callers that have no Triton to ask."""

MAX_TRITON_WIDTH = 8192
"""Wider rows do not fit into one block's registers in the backward pass."""
