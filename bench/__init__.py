"""Benchmarks: ``python -m bench --help``. They measure and never assert."""
