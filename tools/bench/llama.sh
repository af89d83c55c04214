#!/bin/sh
# Builds llama-bench for this processor from the llama.cpp that llama-cpp-python's
# source package carries, into build/llama, with the gguf package of the same source
# beside it. Needs cmake, a C++ compiler and pip; takes some minutes. Does nothing if
# it is there already. `make llama` runs it; tools/bench/compare.py finds it.
set -eu

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

cd "$(dirname "$0")/../.."
target=build/llama
[ "$(cat $target/version 2>/dev/null)" = "$version" ] && [ -x $target/llama-bench ] && exit 0

work=$target/work
rm -rf $work
mkdir -p $work
trap 'rm -rf $work' EXIT
trap 'exit 1' INT TERM
echo "building llama.cpp as of llama-cpp-python $version" >&2
# pip asks the package for its requirements, for which it sets up its build tools.
python3 -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary llama-cpp-python --dest $work "llama-cpp-python==$version"
archive=$work/llama_cpp_python-$version.tar.gz
echo "$sha256  $archive" | sha256sum --check --quiet
tar -xzf "$archive" -C $work
source=$work/llama_cpp_python-$version/vendor/llama.cpp
quietly() { # its output matters only when it fails
    "$@" > $work/log 2>&1 || { tail -n 40 $work/log >&2; exit 1; }
}
quietly cmake -S "$source" -B $work/cmake -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
quietly cmake --build $work/cmake --target llama-bench --parallel "${JOBS:-$(nproc)}"
rm -rf $target/gguf
cp -r "$source/gguf-py/gguf" $target/gguf
cp $work/cmake/bin/llama-bench $target/llama-bench
echo $version > $target/version
