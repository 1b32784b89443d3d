#!/usr/bin/env bash
# What only a GPU can show, without network, in three calls of at most five minutes each; what is most likely to
# be wrong comes first, and each call is of use without the next.
#
#   bench/gpu_check.sh FOLDER correct   # graphs, streams, threads, steps; kernels alone under compute-sanitizer
#   bench/gpu_check.sh FOLDER timing    # steps of six real shapes beside their rivals; three of them under ncu
#   bench/gpu_check.sh FOLDER rest      # the other tests of the backends; the other sanitizers
#
# Each builds in place first, with the kernels for Hopper, for this machine's GPU alone. FOLDER receives a log of
# each stage, and results/. A stage that went well is not run again, in this call or another, unless what it reads
# has changed; one that fails does not keep the next from running. Last comes a table of all stages so far; the
# exit status says whether those of this call went well. DRY_RUN=1 prints the commands instead.
set -uo pipefail
if [ $# -ne 2 ] || [[ ! "$2" =~ ^(correct|timing|rest)$ ]]; then
    echo "usage: bench/gpu_check.sh FOLDER correct|timing|rest" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
call_limit=300 # seconds: what is left of them is the most that any stage gets
status=0
library="csrc kernels attn_sampler CMakeLists.txt setup.py pyproject.toml"

# inputs FOLDERS...: a fingerprint of what lies there, but for what is built or measured.
inputs() {
    find "$@" -type f ! -name '*.so' ! -name '*.pyc' ! -path 'bench/results/*' -print0 2>/dev/null |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# note NAME STATE SECONDS: what the table says of a stage.
note() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >"$folder/$1.state"; }

# stage NAME SECONDS INPUTS COMMAND...: run it with its output in FOLDER/NAME.txt, and show the end of that.
stage() {
    local name=$1 seconds=$2 code=0 key start left
    key="$(inputs $3) ${*:4}"
    shift 3
    echo "== $name (at most $seconds s): $*"
    [ -n "${DRY_RUN:-}" ] && return 0
    if [ "$key" = "$(cat "$folder/$name.done" 2>/dev/null)" ]; then
        echo "== $name went well before"
        return 0
    fi
    rm -f "$folder/$name.done"
    left=$((call_limit - SECONDS))
    if [ $left -le 5 ]; then
        note "$name" "not started: no time was left" 0
        status=1
        return 1
    fi
    start=$SECONDS
    timeout $((seconds < left ? seconds : left)) "$@" >"$folder/$name.txt" 2>&1 || code=$?
    tail -15 "$folder/$name.txt"
    if [ $code -eq 0 ]; then
        echo "$key" >"$folder/$name.done"
        note "$name" ok $((SECONDS - start))
    else
        [ $code -eq 124 ] && note "$name" "out of time" $((SECONDS - start)) ||
            note "$name" "failed: exit status $code" $((SECONDS - start))
        echo "== $name failed: exit status $code"
        status=1
    fi
    return $code
}

# found TOOL NAMES...: whether a tool is here; if not, the stages of these names say so.
found() {
    local tool=$1 name
    shift
    [ -n "${DRY_RUN:-}" ] && return 0
    command -v "$tool" >/dev/null && return 0
    for name in "$@"; do
        note "$name" "skipped: $tool was not found" 0
    done
    return 1
}

table() {
    echo "== stages so far, in $folder"
    cat "$folder"/*.state 2>/dev/null | awk -F'\t' '{ printf "%-16s %4s s  %s\n", $1, $3, $2 }'
}

# The kernels' own program: no torch, whose import takes a sanitizer longer than all the kernels.
sanitize() {
    stage "$1" 20 "$library tests/support" bash -c \
        "compute-sanitizer --tool $1 --error-exitcode 1 build/cmake-*/cuda_check 0 24"
}

# A build for one architecture, Hopper's unless the GPU says otherwise.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
case ${capability:-90} in
90) architecture=90a-real wgmma=ON ;;
*) architecture=$capability-real wgmma=OFF ;;
esac
if ! compgen -G "attn_sampler/_C.*.so" || ! compgen -G "build/cmake-*/cuda_check"; then
    rm -f "$folder/build.done" # FOLDER came from another machine
fi >/dev/null
stage build 120 "$library tests/support" \
    env ATTN_SAMPLER_CUDA=1 ATTN_SAMPLER_CHECKS=ON ATTN_SAMPLER_WGMMA=$wgmma CUDAARCHS=$architecture \
    "$python" -m pip install --no-build-isolation --no-deps --no-index --editable . || { table && exit 1; }
test="$python -m pytest -q -p no:cacheprovider --durations=5"
case $2 in
correct)
    stage kernels 10 "$library tests/support" bash -c "build/cmake-*/cuda_check"
    stage graphs 60 "$library tests" $test --backend cuda tests/backends/test_cuda_graphs.py
    if found compute-sanitizer memcheck racecheck; then
        sanitize memcheck
        sanitize racecheck
    fi
    stage steps 25 "$library tests" $test --backend cuda tests/contract/test_decode_step.py
    # Several processes on one GPU: compiling the Triton kernels is most of the time.
    stage triton 40 "$library tests" $test -n 6 --dist worksteal --backend triton -k "not tiles" \
        tests/backends/test_cuda_graphs.py \
        tests/contract/test_decode_step.py::test_it_is_its_parts \
        tests/contract/test_decode_step.py::test_steps_fill_the_block
    ;;
timing)
    measure="$python -m bench kernels --cases step --backends cuda triton"
    stage bench_first 70 "$library bench" $measure --rows 13 10 6 --seconds 40 --output "$folder/results/first"
    stage bench_second 50 "$library bench" $measure --rows 12 4 2 --seconds 25 --output "$folder/results/second"
    for row in 10 13 6; do
        if found ncu "ncu_$row"; then
            stage "ncu_$row" 20 "$library bench" ncu --set full --profile-from-start off \
                --kernel-name regex:step --launch-count 1 "$python" -m bench.profiled --row $row --backend cuda
        fi
    done
    ;;
rest)
    stage tests 110 "$library tests" $test -v -n 8 --dist worksteal -m "not slow and not long" \
        --backend cuda --backend triton tests/contract tests/backends
    if found compute-sanitizer synccheck initcheck; then
        sanitize synccheck
        sanitize initcheck
    fi
    ;;
esac
table
exit $status
