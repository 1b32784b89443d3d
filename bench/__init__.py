"""Benchmarks: ``python -m bench --help``. Each result is checked, then timed."""

import os

# Threads that spin between parallel regions stall for whole time slices where anything else runs. PyTorch has
# more such regions than the kernels here: on a shared machine spinning would flatter us. Read as torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
