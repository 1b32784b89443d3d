"""Attn-Sampler in the models and engines that people run: a file for each, imported by its name.

Nothing here is imported by the rest of the package, and each file imports its library itself.
"""
