#!/bin/sh
# install_nvcc.sh 13-0: nvcc and the static CUDA run-time, in the manylinux_2_28 container (AlmaLinux 8).
set -eu
dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf install -y "cuda-nvcc-$1" "cuda-cudart-devel-$1"
