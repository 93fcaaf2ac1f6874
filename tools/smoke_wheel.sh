#!/usr/bin/env bash
# Installs a wheel in an empty environment and uses it outside the repository. `make wheel` runs it.
#   tools/smoke_wheel.sh UV WHEEL FOLDER
# The packages are those that the wheel declares, in the versions of requirements.lock, and no others.
set -euo pipefail
uv=$(realpath "$1") wheel=$(realpath "$2") folder=$3
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$folder" && mkdir -p "$folder" && folder=$(realpath "$folder")
python=$folder/venv/bin/python
"$uv" venv --quiet --python "$root/.venv/bin/python" "$folder/venv"
# The lock has no version of torch, and its hashes would be demanded of torch, too.
sed -E '/^ +--hash/d; s/ *\\$//' "$root/requirements.lock" >"$folder/versions.txt"
"$uv" pip install --quiet --python "$python" torch==2.13.0
"$uv" pip install --quiet --python "$python" --constraint "$folder/versions.txt" "$wheel"

cp -r "$root/examples/zorb/images" "$folder/"
cd "$folder"
unset PYTHONPATH
export PATH=$folder/venv/bin:$PATH LORALINE_HOME=$folder/home HF_HUB_OFFLINE=1
"$uv" pip check --quiet --python "$python"
loraline --help >/dev/null
"$python" - <<'EOF'
import pathlib
import lora_engine
import registry

packages = pathlib.Path(lora_engine.__file__).parents[1]
assert packages.name == "site-packages", packages
foreign = [name for name in ("tests", "tools", "docs", "benchmarks", "examples") if (packages / name).exists()]
assert not foreign, foreign
assert all(hasattr(package, name) for package in (lora_engine, registry) for name in package.__all__)
EOF
loraline init project >/dev/null
cp images/* project/images/
sed -i 's/steps: 300/steps: 4/; s/    alias: staging.*//' project/pipeline.yaml
loraline run project/pipeline.yaml
"$python" - <<'EOF'
import lora_engine as le
from registry import Registry

with Registry.open("home", create=False) as reg:
    file = reg["sks@1"].checkout("sks.safetensors")
print(le.load(file, base="tiny"))
EOF
loraline report sks@1 -o report.html
loraline card sks@1 >card.md
test -s report.html && test -s card.md
