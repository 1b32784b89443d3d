#!/usr/bin/env bash
# wheel.sh BIN: the sdist, the wheel that it builds and the wheel's bill of materials, in dist/. BIN holds Python
# and what release/requirements.txt lists. TORCH and TORCH_INDEX as in the Makefile; ATTN_SAMPLER_CUDA as in setup.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1

python -m build --sdist --outdir "$work" .
python -m pip wheel --quiet --no-deps --wheel-dir "$work/built" "$work"/*.tar.gz
# The tag says which glibc this machine's compiler asks for. That of the published wheels, manylinux_2_28, takes
# the container in which cibuildwheel builds them.
auditwheel repair --wheel-dir "$work/repaired" "$work"/built/*.whl
twine check --strict "$work"/*.tar.gz "$work"/repaired/*.whl
check-wheel-contents "$work"/repaired/*.whl

python -m venv "$work/empty"
install=("$work/empty/bin/python" -m pip install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"})
[ "${TORCH:-}" = system ] || "${install[@]}" "${TORCH:-torch}"
"${install[@]}" "$work"/repaired/*.whl
cp release/decodes.py "$work"
(cd "$work" && empty/bin/attn-sampler info && empty/bin/python decodes.py)

mkdir -p dist
bill="dist/$(basename "$work"/repaired/*.whl .whl).cdx.json"
cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
    --output-file "$work/bill.json" "$work/empty/bin/python"
python release/compiled_in.py "$work/bill.json" "$work"/repaired/*.whl >"$bill"
cp "$work"/*.tar.gz "$work"/repaired/*.whl dist/
ls -l dist
