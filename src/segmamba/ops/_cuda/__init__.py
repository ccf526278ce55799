"""Operators by CUDA kernels, for NVIDIA GPUs; compiled where they run."""
