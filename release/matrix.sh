#!/usr/bin/env bash
# matrix.sh TORCH...: the contract's and the decoder's tests on the CPU backends with each of these requirements,
# such as torch==2.6.0, in an environment of its own under build/matrix, for the interpreter PYTHON (python3).
# TORCH_INDEX adds a package index. A table ends the run; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
status=0
table=""
for torch in "$@"; do
    environment="build/matrix/$(${PYTHON:-python3} -c 'import sys; print(sys.implementation.cache_tag)')-$torch"
    python="$environment/bin/python"
    verdict=FAILED
    ${PYTHON:-python3} -m venv "$environment" &&
        "$python" -m pip install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch" &&
        "$python" -m pip install --quiet 'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6.100' matplotlib &&
        ATTN_SAMPLER_CUDA=0 "$python" -m pip install --quiet --editable . &&
        "$python" -m pytest -q -n auto --backend cpu --backend reference tests/contract tests/decoder &&
        verdict=passed
    [ $verdict = passed ] || status=1
    table+="$("$python" --version) with $torch: $verdict"$'\n'
done
printf '%s' "$table"
exit $status
