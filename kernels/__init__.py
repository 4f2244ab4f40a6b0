"""CUDA sources, one family of operations a file; installed as the package data `dpnn.kernels`."""
