"""Residual feature alignment: the unlearning method as tensors and modules; no Ray, no files, no tracking.

After Qin et al. 2024 (arXiv 2411.08443); the reconstruction is this project's. README.md shows its use in a notebook.
"""
