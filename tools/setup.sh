#!/bin/sh
# Sets up .venv for this machine: tools/setup.sh EXTRAS (a pip extras list such as "demo" or "dev").
#
# torch goes in first and alone, because what pip would choose by itself on a machine without a GPU is several gigabytes
# of CUDA libraries. TORCH_CPU is the version taken from pip's ordinary index where PyTorch's own cannot be reached.
set -eu
extras=$1
python=${PYTHON:-python3}
venv=.venv
TORCH_CPU=${TORCH_CPU:-2.13.0}
say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "nanovllm needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=python3.11 or the like." >&2
    exit 1
}
if [ ! -x "$venv/bin/python" ]; then
    say "Creating the virtual environment $venv with $("$python" --version)"
    "$python" -m venv "$venv" || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
fi
# Off a terminal pip says nothing for minutes: a line every 5 s tells how long it has been, and how much is there.
pip() {
    started=$(date +%s)
    while sleep 5 >/dev/null 2>&1; do
        printf '    %d s, %s MB in %s\n' "$(($(date +%s) - started))" "$(du -sm "$venv" | cut -f 1)" "$venv"
    done &
    ticker=$!
    "$venv/bin/python" -m pip --disable-pip-version-check "$@" || { kill "$ticker"; return 1; }
    kill "$ticker"
}
ticker=
trap '[ -z "$ticker" ] || kill "$ticker" 2>/dev/null || :' EXIT
trap 'exit 130' INT TERM

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        say "Installing PyTorch for CUDA ($(nvidia-smi -L | head -n 1))"
        pip install --quiet torch
    else
        say "No NVIDIA GPU here: installing a CPU build of PyTorch"
        # The probe costs seconds; pip's own retries against an index that cannot be reached would cost a minute.
        if "$venv/bin/python" -c 'import urllib.request as u; u.urlopen("https://download.pytorch.org/whl/cpu/", timeout=5)' 2>/dev/null; then
            pip install --quiet --index-url https://download.pytorch.org/whl/cpu torch
        else
            say "PyTorch's index of CPU builds cannot be reached: taking torch==$TORCH_CPU from pip's own index"
            pip install --quiet "torch==$TORCH_CPU"
        fi
    fi
fi
say "Installing nanovllm[$extras] (a minute or two the first time)"
pip install --quiet --editable ".[$extras]"
