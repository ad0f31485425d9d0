"""What the CUDA kernels of all operators share on the side of Python; the kernels are in csrc/cuda."""
