"""How tensors reach the compiled extension, `msformer_kernels._native`."""
