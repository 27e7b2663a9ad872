"""Kernels of ours with declared parameters: `build(**options)` makes the function of tensors."""
