"""Tensors and kernels: the only package that imports torch. ``environment`` must be imported and called first."""
