#!/usr/bin/env bash
# What a GPU makes of asrkit, in at most 8 minutes, without network: is it right, how fast is it, what does it wait for.
#
#     benchmarks/gpu.sh OUT                        # on a machine with torch 2, one GPU and asrkit's requirements
#     DEVICE=cpu benchmarks/gpu.sh OUT quick       # every part in small, to try the script itself, as a test does
#
# OUT/results.jsonl has a line for each finding, OUT/log.txt everything that was said. A part that fails or runs out of its
# time leaves what it has found so far, and the others go on.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(mkdir -p "${1:?benchmarks/gpu.sh OUT [quick]}" && cd "$1" && pwd) quick=${2:-}
python=${PYTHON:-python3} began=$SECONDS work=$(mktemp -d)
# On the CPU a quick run takes turns, each with time enough for a busy laptop; else five parts share the cores.
[ -n "$quick" ] && export OMP_NUM_THREADS=1 slower=10 || export OMP_NUM_THREADS=3 slower=1
export DEVICE=${DEVICE:-cuda} PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/tests:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
trap 'rm -rf "$work"' EXIT

# part SECONDS NAME COMMAND...: runs it within its time, and notes how it ended.
part() {
    local limit=$(($1 * slower)) name=$2 start=$SECONDS status
    shift 2
    timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1
    status=$?
    echo "{\"part\": \"$name\", \"exit\": $status, \"seconds\": $((SECONDS - start)), \"at\": $((SECONDS - began))}" >>"$out/results.jsonl"
    { echo "=== $name: exit $status after $((SECONDS - start)) s"; tail -c 400000 "$work/$name.log"; } >>"$out/log.txt"
    echo "$name: exit $status after $((SECONDS - start)) s, at $((SECONDS - began)) s"
}
in_process() { part "$1" "$2" "$python" "benchmarks/$3" "$2" --out "$out/results.jsonl" ${quick:+--quick}; }

{ nvidia-smi 2>&1; "$python" -m asrkit doctor 2>&1; git log -1 --format=%H 2>&1; } >"$out/log.txt"

# Right? All at once: one GPU is large enough, and each leaves most of it idle.
for name in stages resume processes precision gradients; do
    script=gpu_stages.py
    [ $name = gradients ] && script=gpu_steps.py
    in_process 150 $name $script &
    [ -n "$quick" ] && wait
done
wait

# Fast? One at a time.
in_process 100 throughput gpu_steps.py
in_process 50 profile gpu_steps.py
in_process 30 launches gpu_steps.py
in_process 40 loss gpu_steps.py
in_process 60 loader gpu_stages.py

# The suite's own tests take the GPU where there is one.
export OMP_NUM_THREADS=1
tests=(-n 12 tests/training tests/methods tests/stages) limit=$((470 - SECONDS + began))
[ -n "$quick" ] && tests=(tests/test_devices.py) limit=60
part "$limit" tests "$python" -m pytest -q --tb=short -p no:cacheprovider "${tests[@]}"
echo "all in $((SECONDS - began)) s: $out/results.jsonl, $out/log.txt"
