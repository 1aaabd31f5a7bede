"""Whole Hugging Face model classes, one small file each."""
