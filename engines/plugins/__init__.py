"""CUDA kernels of the operators, and what makes TensorRT and PyTorch run them.

The sources (``.cu``, ``.cuh``, ``.h``, ``.cpp``) lie beside this file; nothing is compiled on
import.
"""
