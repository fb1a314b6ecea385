#!/usr/bin/env bash
# The package built and installed as a user would, in clean environments.
#
#   tests/installs.sh FOLDER [PYTHON=TORCH,TORCHVISION ...]
#
# FOLDER is for everything that is made; it must not exist yet. BUILDER (default: .venv/bin/python) has the build
# tools and a torch. Each further argument is an environment, such as python3.12=2.11.0,0.26.0; without any it is
# BUILDER's own Python with the torch of constraints.txt. An environment that cannot be had (no such interpreter,
# no such torch, none without gigabytes of CUDA libraries that the disk has no room for) is skipped, by name. The
# wheel is for one Python, so for another one it is built anew, with that environment's torch.
#
# WHEELS=FOLDER takes the wheels (cpu/, and full/ if there is one) that an earlier call has left there. NO_NVCC=1 builds
# none with nvcc. An environment that has passed is removed, as several would fill a disk (6 GB each with a CUDA build of
# torch); KEEP=1 leaves them, at FOLDER/environment1 and so on. UV=COMMAND lets uv install what the package needs: it
# keeps the files of one torch for several environments. Ends with 1 if anything does not hold.
set -euo pipefail
folder=$(realpath -m "${1:?usage: tests/installs.sh FOLDER [PYTHON=TORCH,TORCHVISION ...]}")
shift
cd "$(dirname "$0")/.."
root=$PWD
builder=$(realpath -s "${BUILDER:-.venv/bin/python}")
[ -e "$folder" ] && { echo "installs: $folder is already there" >&2; exit 2; }
mkdir -p "$folder"
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
pins=$(sed -n 's/^\(torch\|torchvision\)==//p' constraints.txt | paste -sd,)
[ $# -gt 0 ] || set -- "$builder=$pins"
passed=0 skipped=0
say() { echo "installs: $*"; }
fail() { say "BROKEN: $*" >&2; exit 1; }
without_nvcc() { # the PATH without folders that hold an nvcc
  local kept=() part
  IFS=: read -ra parts <<< "$PATH"
  for part in "${parts[@]}"; do [ -x "$part/nvcc" ] || kept+=("$part"); done
  (IFS=:; echo "${kept[*]}")
}
install() { # ENVIRONMENT PACKAGE...: what the package needs; the package itself comes by pip, see check
  if [ -n "${UV:-}" ]; then
    "$UV" pip install -q --python "$1/bin/python" "${@:2}"
  else
    "$1/bin/python" -m pip install -q "${@:2}"
  fi
}
wheel() { # PYTHON SOURCE TARGET [pip's log]: builds it without isolation, against that Python's own torch
  "$1" -m pip wheel -v --no-build-isolation --no-deps -w "$3" "$2" > "${4:-$3.log}" 2>&1 \
    || { tail -30 "${4:-$3.log}" >&2; fail "no wheel with $1"; }
}

# --- the source distribution, from what git knows alone ---
mkdir "$folder/tree"
git ls-files -z | xargs -0 cp --parents -t "$folder/tree"
(cd "$folder/tree" && "$builder" setup.py -q sdist -d "$folder/sdist" > "$folder/sdist.log" 2>&1) \
  || { tail "$folder/sdist.log" >&2; fail "no source distribution"; }
sdist=$(ls "$folder"/sdist/*.tar.gz)
tar -xzf "$sdist" -C "$folder"
unpacked=$folder/$(basename "$sdist" .tar.gz)
(cd "$folder/tree" && find . -type f | sort) > "$folder/in-git"
(cd "$unpacked" && find . -type f | sort) > "$folder/in-sdist"
missing=$(comm -23 "$folder/in-git" "$folder/in-sdist" | grep -vx './.gitignore' || true)
[ -z "$missing" ] || fail "$(basename "$sdist") lacks" $missing
say "$(basename "$sdist"): $(wc -l < "$folder/in-sdist") files, all of the repository but .gitignore"

# --- other Pythons: no torch for them is needed to read the sources and to be told what is missing ---
for other in python3.10 python3.11 python3.12 python3.13 python3.14; do
  found=
  for candidate in $(command -v $other || true) "$HOME"/.pyenv/versions/${other#python}*/bin/$other; do
    if "$candidate" --version > /dev/null 2>&1; then found=$candidate; fi
  done
  if [ -z "$found" ]; then say "no $other here"; continue; fi
  (cd "$unpacked" && "$found" -c "import pathlib
for path in [*pathlib.Path('pgl').rglob('*.py'), *pathlib.Path('pgl_ops').glob('*.py')]:
    compile(path.read_text('utf-8'), str(path), 'exec')" && "$found" -I -c "import sys; sys.path.insert(0, '.')
from pgl.cli import main; sys.exit(main(['--help']))" > /dev/null) || fail "$other does not read the sources"
  say "$("$found" --version): reads the sources, pgl --help works without torch"
done

# --- wheels out of it, with and without nvcc ---
if [ -n "${WHEELS:-}" ]; then
  cp -r "$WHEELS/cpu" "$folder/cpu"
  [ ! -d "$WHEELS/full" ] || cp -r "$WHEELS/full" "$folder/full"
  say "wheels of an earlier call: $WHEELS"
else
  PATH=$(without_nvcc) wheel "$builder" "$unpacked" "$folder/cpu"
  told=$(grep -c "building the CPU kernels only" "$folder/cpu.log" || true)
  [ "$told" = 1 ] || fail "the build without nvcc says $told times that it is for the CPU only, not once"
  say "$(ls "$folder/cpu"): $(grep "building the CPU kernels only" "$folder/cpu.log" | sed 's/^[- ]*//')"
fi
if [ -d "$folder/full" ]; then
  :
elif [ -z "${WHEELS:-}" ] && command -v nvcc > /dev/null && [ -z "${NO_NVCC:-}" ]; then
  wheel "$builder" "$unpacked" "$folder/full"
  say "$(ls "$folder/full"): with nvcc"
else
  cp -r "$folder/cpu" "$folder/full"
  say "no nvcc here (or NO_NVCC): one wheel only"
fi

# --- each environment ---
check() { # ENVIRONMENT WHEEL CUDA(yes|no): installed, used, uninstalled
  local python=$1/bin/python file=$2
  "$python" "$root/tests/installed.py" snapshot > "$1.before"
  "$python" -m pip install -q "$file"
  "$python" -m pip check
  (cd "$folder" && "$python" "$root/tests/installed.py" check --wheel "$file" --cuda "$3")
  "$python" -m pip uninstall -q -y pgl-ops
  "$python" "$root/tests/installed.py" snapshot > "$1.after"
  diff "$1.before" "$1.after" || fail "uninstalling leaves the above"
}
number=0
for environment in "$@"; do
  interpreter=${environment%%=*} versions=${environment#*=}
  torch=${versions%,*} vision=${versions#*,}
  number=$((number + 1))
  place=$folder/environment$number
  name="$("$interpreter" --version 2>&1 || true), torch $torch"
  if ! "$interpreter" -m venv "$place" 2> "$place.log"; then
    say "skipped: $interpreter: no such Python"; skipped=$((skipped + 1)); continue
  fi
  if ! install "$place" "torch==$torch" "torchvision==$vision" numpy > "$place.log" 2>&1; then
    say "skipped: $name: $(tail -1 "$place.log")"; skipped=$((skipped + 1)); rm -rf "$place"; continue
  fi
  # Compiled once, which uv leaves to the first import: else each of the many imports below would do it.
  env -u PYTHONDONTWRITEBYTECODE "$place/bin/python" -c "import torch"
  full=$(ls "$folder"/full/*.whl) cpu=$(ls "$folder"/cpu/*.whl)
  tag=$("$place/bin/python" -c "import sys; print('cp%d%d' % sys.version_info[:2])")
  if [[ $(basename "$full") != *-$tag-* ]]; then
    install "$place" "cmake>=3.24" ninja "pybind11>=2.13" "setuptools>=77" wheel
    PATH=$(without_nvcc) wheel "$place/bin/python" "$unpacked" "$place.wheel"
    full=$(ls "$place.wheel"/*.whl) cpu=$full
  fi
  [ "$cpu" = "$full" ] || check "$place" "$cpu" no
  check "$place" "$full" "$([ -d "$place.wheel" ] || cmp -s "$cpu" "$full" && echo no || echo yes)"
  if [ "$number" = 1 ]; then # the extra, once: it is the same everywhere
    install "$place" "torch==$torch" "torchvision==$vision" "pgl-ops[train] @ file://$full"
    "$place/bin/python" -m pip check
    (cd "$folder" && "$place/bin/pgl" phantom --output ct --cases 2 --spacing_mm 10,6,6 2> /dev/null \
      && "$place/bin/pgl" prepare ct/images --output cache --spacing_mm 10,6,6 --minimum_size 4,8,8 \
      && "$place/bin/pgl" pretrain --data cache --output run --config "$root/configs/smoke.yaml" \
        --train.steps 2 --optimizer.warmup_steps 1 --validation.pairs 2) > "$place.train.log" 2>&1 \
      || { tail "$place.train.log" >&2; fail "pgl does not work with the extra"; }
    say "$name: the extra pgl-ops[train] installs and pretrains"
  fi
  [ -n "${KEEP:-}" ] || rm -rf "$place"
  passed=$((passed + 1))
  say "$name: passed"
done
say "$passed environments passed, $skipped skipped"
[ "$passed" -gt 0 ]
