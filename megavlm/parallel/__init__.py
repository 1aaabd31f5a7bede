"""megatron-core start-up, process groups, the CPU backend, reductions: the only floor that knows parallel_state."""
