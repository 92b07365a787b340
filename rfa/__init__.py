"""Residual feature alignment: the unlearning method as tensors and modules.

It knows no Ray, no files and no tracking, so that it also runs in a notebook, as README.md shows.
The method is after Qin et al. 2024 (arXiv 2411.08443). The reconstruction is this project's.
"""
