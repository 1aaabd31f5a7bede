"""Sections of benchmarks/gpu_validate.py: each module makes tasks, `runner` gives each section processes of its own and a time limit."""
