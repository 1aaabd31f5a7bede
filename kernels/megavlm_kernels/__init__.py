"""Kernels: each in its own folder with a plain reference, an operation that picks the best backend, a test and a benchmark."""
