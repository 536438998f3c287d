"""Hosts whose transformers a student can serve."""
