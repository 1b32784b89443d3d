#!/usr/bin/env bash
# Everything that only a GPU can show, in under 8 minutes and without network: build in place, run the
# tests but the slow ones, run the Triton kernels' own, measure.
#
#   bench/gpu_check.sh FOLDER
#
# FOLDER receives build.txt, tests.txt, gpu.json and gpu.md. The measurement runs even where a test fails; the exit
# status says whether all of it went well.
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: bench/gpu_check.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
status=0

echo "build: $folder/build.txt"
"$python" -m pip install --no-build-isolation --no-deps --no-index --editable . >"$folder/build.txt" 2>&1 || {
    tail -20 "$folder/build.txt"
    exit 1
}
echo "tests: $folder/tests.txt"
{
    # Several processes on one GPU: compiling the Triton kernels is most of the time.
    timeout 240 "$python" -m pytest -q -n 8 --dist worksteal --durations=10 -m "not slow and not long" &&
        timeout 90 "$python" -m pytest -q -n 4 --dist worksteal tests/triton_kernels.py
} >"$folder/tests.txt" 2>&1 || status=1
tail -15 "$folder/tests.txt"
echo "measurements: $folder/gpu.md"
timeout 180 "$python" -m bench.gpu "$folder" --seconds 140 || status=1
exit $status
