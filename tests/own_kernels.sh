# Sourced by scripts that test kernels built in their own way.

# own_kernels PYTHON FOLDER [CMake options]: FOLDER/package gets the packages and the tests, with CPU kernels built
# so. The build folder FOLDER/cpu is kept, so that the next build is short.
own_kernels() {
  local python=$1 folder=$2
  shift 2
  rm -rf "$folder/package" && mkdir -p "$folder/package"
  cp -r pgl_ops tests pyproject.toml "$folder/package"
  rm -f "$folder"/package/pgl_ops/*.so # else they would pass for what is built here
  cmake -S . -B "$folder/cpu" -G Ninja -DPython_EXECUTABLE="$python" -DPGL_OPS_CUDA=OFF "$@" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DPGL_OPS_OUTPUT="$PWD/$folder/package/pgl_ops" > /dev/null
  cmake --build "$folder/cpu" | tail -1
}
