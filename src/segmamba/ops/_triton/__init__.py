"""Operators by Triton, for GPUs."""
