#!/usr/bin/env bash
# Builds for 64-bit Arm and runs the tests in QEMU. To be called from inside a workspace.
#
#   run-tests.sh -p dashinfer-kernels                       cargo test, on an emulated CPU with everything
#   QEMU_CPU=neoverse-n1 run-tests.sh -p dashinfer-kernels  the same on a smaller one
#   run-tests.sh build --release --example quickstart       any other cargo command: build, check, run, bench, clippy
#
#   QEMU_CPU           the emulated CPU (default: max); README.md lists the useful ones
#   CARGO_TARGET_DIR   build outputs (default: target/arm in the workspace: the two compilers would otherwise
#                      throw away each other's build scripts)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
variables=$(bash "$here/setup.sh")
eval "$variables"

if [ -z "${CARGO_TARGET_DIR:-}" ]; then
  manifest=$(cargo locate-project --workspace --message-format plain)
  export CARGO_TARGET_DIR="${manifest%/*}/target/arm"
fi

case "${1:-}" in
  build | check | run | bench | test | doc | rustc) exec cargo "$@" ;;
  clippy) exec "$DASHINFER_ARM_CLIPPY" "$@" ;;
  *) exec cargo test "$@" ;;
esac
