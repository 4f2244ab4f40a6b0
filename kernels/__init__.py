"""Kernels, one family of operations a file: C for the CPU, compiled when dpnn is installed, and CUDA sources."""
