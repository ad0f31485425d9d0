"""What the Triton kernels of all operators share: tiles, launches, the table of launch options."""
