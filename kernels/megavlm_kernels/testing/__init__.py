"""For tests of kernels: compiling ahead of time without a GPU, and running under Triton's interpreter."""
