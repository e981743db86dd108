"""CUDA kernels of the two operators, and what makes TensorRT and PyTorch run them.

The sources (``.cuh``, ``.cu``, ``.h``) lie beside this file; nothing is compiled on import.
"""
