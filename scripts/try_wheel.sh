#!/usr/bin/env bash
# Is the wheel whole? Build it from a clean clone of what is committed, install it into an empty environment, and use it from there.
#
#     scripts/try_wheel.sh k2|modern          (or: make wheel ENV=k2|modern)
#
# The environment has the versions of requirements/, but only those packages that the wheel itself asks for. It is removed at the end.
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unset PYTHONPATH
env=${1:-k2}
root=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
say() { echo "wheel ($env): $*"; }

say "building from a clean clone"
git clone -q "$root" "$folder/clone"
"$root/.venv-$env/bin/python" -m pip wheel -qq --disable-pip-version-check --no-deps "$folder/clone" --wheel-dir "$folder/dist"
wheel=$(echo "$folder"/dist/asrkit-*.whl)

say "installing $(basename "$wheel") into an empty environment"
"$root/.venv-$env/bin/python" -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@" -qq --disable-pip-version-check --no-input; }
pip install --constraint "requirements/$env.txt" "$wheel[synth,report,export]"
pip check

# From here on nothing of the clone or of this directory is in reach.
cd "$folder" && mkdir work && cd work

export OMP_NUM_THREADS=1
asrkit=$folder/venv/bin/asrkit
say "asrkit doctor"
$asrkit doctor

say "made speech, checked"
printf '%s\n' 'please hold the line' 'the number is busy' 'press one to go on' 'nobody is here' 'call again later' >texts.txt
$asrkit data synthesize --text texts.txt --lang en --out data --minutes 0.5
$asrkit data check data/train.jsonl.gz

say "a training of two steps, and everything after it"
short=(--max-duration 10 --set training.steps=2 --set training.tensorboard=false --set data.num_workers=0)
small=(--set model.num_layers=2 --set model.dim=32 --set model.feedforward_dim=32 --set tokenizer.vocab_size=30)
$asrkit train-backbone --manifest data/train.jsonl.gz --out exp/backbone "${short[@]}" "${small[@]}"
$asrkit evaluate --from exp/backbone --manifest data/train.jsonl.gz
$asrkit quantize --from exp/backbone --bits 8 --out exp/int8
$asrkit export --from exp/int8 --out exp/onnx
$asrkit report exp/backbone exp/int8 exp/onnx --out exp/report.html
grep -q 'id="report-data"' exp/report.html

say "a method from an entry point"
mkdir method
"$folder/venv/bin/python" - "$root/docs/add-a-method.md" <<'PYTHON'
import re, sys
from pathlib import Path

page = Path(sys.argv[1]).read_text(encoding="utf-8")
for kind, name in (("toml", "pyproject.toml"), ("python", "confidence_penalty.py")):
    Path("method", name).write_text(re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1], encoding="utf-8")
PYTHON
pip install --no-deps ./method
$asrkit penalty --from exp/backbone --manifest data/train.jsonl.gz --out exp/penalty "${short[@]}"
test -f exp/penalty/done
say "the wheel works"
