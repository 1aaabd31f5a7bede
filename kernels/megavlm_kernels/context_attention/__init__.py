"""Attention over a sequence that context ranks share: which way keys travel, and (in `op`, which needs torch) Transformer Engine's ways."""

from megavlm_kernels.context_attention.selection import COMMS, Comm, CommChoice, CommError, SharedCall, choose_comm, unmet_comm

__all__ = ["COMMS", "Comm", "CommChoice", "CommError", "SharedCall", "choose_comm", "unmet_comm"]
