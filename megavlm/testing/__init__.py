"""Helpers for tests: a pool of gloo ranks, tiny models and data."""
