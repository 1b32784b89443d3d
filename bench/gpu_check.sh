#!/usr/bin/env bash
# Everything that only a GPU can show, without network, in two calls of at most nine minutes each.
#
#   bench/gpu_check.sh FOLDER tests   # build in place; the tests; compute-sanitizer on a few of them
#   bench/gpu_check.sh FOLDER bench   # build in place; python -m bench and its end-to-end part
#
# FOLDER receives a log of each stage, and results/. A stage that fails does not keep the next from running; the
# exit status says whether all went well. DRY_RUN=1 prints the commands instead.
set -uo pipefail
if [ $# -ne 2 ] || { [ "$2" != tests ] && [ "$2" != bench ]; }; then
    echo "usage: bench/gpu_check.sh FOLDER tests|bench" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
status=0

# stage NAME SECONDS COMMAND...: run it with its output in FOLDER/NAME.txt, and show the end of that.
stage() {
    local name=$1 seconds=$2 code=0
    shift 2
    echo "== $name (at most $seconds s): $*"
    [ -n "${DRY_RUN:-}" ] && return 0
    timeout "$seconds" "$@" >"$folder/$name.txt" 2>&1 || code=$?
    tail -15 "$folder/$name.txt"
    [ $code -eq 0 ] || { echo "== $name failed: exit status $code" && status=1; }
    return $code
}

sanitize() {
    # Kernels of ours alone are looked at; each allocation is the driver's own, so that its end is known.
    stage "$1" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
        --kernel-name kns=attn_sampler "$python" -m pytest -q -x --backend cuda -p no:cacheprovider \
        tests/contract/test_select_tokens.py::test_stated_cases \
        tests/contract/test_token_confidence.py::test_known_values \
        tests/contract/test_attention_map.py::test_rows_stand_at_their_key_positions \
        tests/contract/test_column_scores.py::test_given_lse_equals_computed_lse \
        tests/contract/test_decode_step.py::test_it_is_its_parts \
        tests/contract/test_revision.py::test_a_step_is_its_parts \
        tests/contract/test_row_sampling.py::test_a_step_of_rows_is_that_of_each \
        tests/contract/test_paged_keys.py::test_positions_count_from_each_end \
        tests/contract/test_revision.py::test_reduced_rows_are_added_into_out
}

stage build 150 "$python" -m pip install --no-build-isolation --no-deps --no-index --editable . || exit 1
if [ "$2" = tests ]; then
    # Several processes on one GPU: compiling the Triton kernels is most of the time.
    stage tests 170 "$python" -m pytest -q -n 8 --dist worksteal --durations=10 -m "not slow and not long"
    stage triton_kernels 60 "$python" -m pytest -q -n 4 --dist worksteal tests/backends/test_triton_kernels.py
    if [ -n "${DRY_RUN:-}" ] || command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck initcheck; do
            sanitize $tool
        done
    else
        echo "== sanitizers failed: compute-sanitizer was not found" && status=1
    fi
else
    stage bench 300 "$python" -m bench --backends cuda triton --seconds 200 --output "$folder/results"
    stage end_to_end 80 "$python" -m bench end-to-end --device cuda --output "$folder/results"
fi
exit $status
