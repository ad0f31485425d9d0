"""What decides the quality of segmentations; not benchmarks of kernels."""
