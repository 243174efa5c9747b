#!/usr/bin/env bash
# Puts NVIDIA's run-time compiler into a private folder, to check kernels on a machine without a GPU, a driver or a toolkit,
# and prints the variable that makes it found. The compilers are the Python wheels that NVIDIA publishes. Safe to run again:
# it does nothing when all is there.
#
#   eval "$(bash .ci/cuda/setup.sh)"            NVRTC 13 and 12.9 (160 MB to fetch, 0.5 GB on disk); the older one for sm_70
#   eval "$(bash .ci/cuda/setup.sh --inspect)"  and cuobjdump, nvdisasm on the PATH, to read machine code
#
#   DASHINFER_CUDA_DIR   where to install (default: $HOME/.cache/dashinfer-cuda)
set -euo pipefail

dir=${DASHINFER_CUDA_DIR:-$HOME/.cache/dashinfer-cuda}
wheels=(nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-nvrtc-cu12==12.9.86)
case ${1:-} in
  '') ;;
  --inspect) wheels+=(nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86) ;;
  *) echo "usage: setup.sh [--inspect]" >&2 && exit 2 ;;
esac
say() { echo "cuda setup: $*" >&2; }
die() { say "$*"; exit 1; }

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
# One set-up at a time: a second waits for the first.
exec 9>"$dir/.lock"
flock 9

missing=()
for wheel in "${wheels[@]}"; do
  [ -e "$dir/has/$wheel" ] || missing+=("$wheel")
done
if [ ${#missing[@]} -gt 0 ]; then
  command -v python3 >/dev/null || die "there is no python3, whose package installer fetches the compilers"
  if ! "$dir/venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$dir/venv" "$dir/has"
    if ! python3 -m venv "$dir/venv" >"$dir/venv.log" 2>&1; then
      rm -rf "$dir/venv"
      # Debian's python3 comes without the module that makes environments.
      [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "python3 cannot make an environment: install python3-venv"
      say "installing python3-venv"
      export DEBIAN_FRONTEND=noninteractive
      apt-get install -y -qq --no-install-recommends python3-venv >&2 ||
        { apt-get update -qq >&2 && apt-get install -y -qq --no-install-recommends python3-venv >&2; }
      python3 -m venv "$dir/venv" >&2
    fi
  fi
  say "installing ${missing[*]}"
  # Without their dependencies, which are parts of a toolkit that kernels do without.
  "$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "${missing[@]}" >&2
  mkdir -p "$dir/has"
  for wheel in "${missing[@]}"; do touch "$dir/has/$wheel"; done
fi

site=$("$dir/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
new=$site/nvidia/cu13/lib old=$site/nvidia/cuda_nvrtc/lib
[ -e "$new/libnvrtc.so.13" ] && [ -e "$old/libnvrtc.so.12" ] || die "the wheels are not as expected: look into $site/nvidia"
echo "export DASHINFER_CUDA_LIBRARIES=\"$new:$old\""
if [ "${1:-}" = --inspect ]; then echo "export PATH=\"$site/nvidia/cu13/bin:\$PATH\""; fi
