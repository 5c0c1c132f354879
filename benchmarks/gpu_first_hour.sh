#!/usr/bin/env bash
# What only GPUs can tell. On a node with at least one, in about an hour; it fills "Measured" in docs/gpu.md.
#
#     benchmarks/gpu_first_hour.sh                 everything
#     benchmarks/gpu_first_hour.sh layouts page    some parts, and the page anew
#
# In the Dockerfile's container, or where a CUDA build of torch is installed beside this project (PYTHON=... names the
# interpreter). Every part leaves what it prints in results/gpu/PART.txt. One that fails does not stop the others; the
# exit code is 1 then. Nothing is downloaded: models have random weights.
set -u -o pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
RESULTS=results/gpu
PARTS=(machine tests layouts attention step_1b step_8b_lora reference_modes page)

part_machine() { nvidia-smi && nvidia-smi topo -m && "$PYTHON" -m nemo_kto.cli doctor trainer.accelerator=gpu; }
part_tests() { "$PYTHON" -m pytest -p no:cacheprovider -m gpu -n 0; }
part_layouts() { "$PYTHON" benchmarks/layouts.py; }
part_attention() { "$PYTHON" benchmarks/attention.py; }
part_step_1b() { "$PYTHON" benchmarks/step_time.py --shape 1B --transformers; }
part_step_8b_lora() { "$PYTHON" benchmarks/step_time.py --shape 8B --lora; }
part_reference_modes() { "$PYTHON" benchmarks/reference_modes.py; }
part_page() { "$PYTHON" benchmarks/gpu_page.py "$RESULTS"; }

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
if [ "$gpus" -eq 0 ]; then
    echo "error: nvidia-smi lists no GPU; this script is for a machine that has one." >&2
    exit 1
fi
[ $# -gt 0 ] || set -- "${PARTS[@]}"
for part in "$@"; do
    if ! declare -F "part_$part" >/dev/null; then
        echo "error: there is no part $part; there are: ${PARTS[*]}" >&2
        exit 1
    fi
done

mkdir -p "$RESULTS"
failed=()
for part in "$@"; do
    echo "== $part, of $gpus GPUs, $(date +%H:%M)"
    started=$SECONDS
    "part_$part" 2>&1 | tee "$RESULTS/$part.txt"
    code=$?
    [ "$code" -eq 0 ] || failed+=("$part")
    printf '%s\t%s\t%s\n' "$part" "$code" $((SECONDS - started)) >"$RESULTS/$part.tsv"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: these parts failed, see $RESULTS: ${failed[*]}" >&2
    exit 1
fi
