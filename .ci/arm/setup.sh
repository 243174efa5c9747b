#!/usr/bin/env bash
# Prepares an x86_64 Debian machine to build the workspace for 64-bit Arm and to run its tests in QEMU, with no Arm
# machine and no rustup download. The compiler is the distribution's `rustc-web`, unpacked into a private folder: the
# machine's own Rust, and its list of architectures, stay as they are. Safe to run again: it does nothing when all
# is there.
#
#   eval "$(bash .ci/arm/setup.sh)"   install what is missing, and set the variables for cargo in this shell
#
#   DASHINFER_ARM_DIR      where to install (default: $HOME/.cache/dashinfer-arm)
#   DASHINFER_ARM_QEMU     another qemu-aarch64 than the distribution's
#   DASHINFER_ARM_VERSION  a version of rustc-web (default: the newest that both architectures have)
set -euo pipefail

dir=${DASHINFER_ARM_DIR:-$HOME/.cache/dashinfer-arm}
oldest=1.95 # the workspace's rust-version
target=aarch64-unknown-linux-gnu
say() { echo "arm setup: $*" >&2; }
die() { say "$*"; exit 1; }

[ "$(uname -m)" = x86_64 ] || die "this is for x86_64; on an Arm machine plain cargo will do"
command -v apt-get >/dev/null || die "no apt-get here: this needs Debian or a relative of it"
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
# One set-up at a time: a second waits for the first.
exec 9>"$dir/.lock"
flock 9

# --- the distribution's cross linker and emulator, as ordinary packages ---------------------------------------------

install_packages() {
  [ "$(id -u)" = 0 ] || die "not root, so install these first: apt-get install --no-install-recommends $*"
  say "installing $*"
  export DEBIAN_FRONTEND=noninteractive
  # No recommended packages: qemu-user's would register the emulator with the kernel for the whole machine.
  apt-get install -y -qq --no-install-recommends --no-upgrade "$@" >&2 && return
  apt-get update -qq >&2
  apt-get install -y -qq --no-install-recommends --no-upgrade "$@" >&2
}

packages=()
command -v cc >/dev/null || packages+=(gcc libc6-dev) # links build scripts and procedural macros
command -v aarch64-linux-gnu-gcc >/dev/null || packages+=(gcc-aarch64-linux-gnu)
[ -e /usr/aarch64-linux-gnu/include/stdio.h ] || packages+=(libc6-dev-arm64-cross)
[ -n "${DASHINFER_ARM_QEMU:-}" ] || command -v qemu-aarch64 >/dev/null || packages+=(qemu-user)
[ ${#packages[@]} -eq 0 ] || install_packages "${packages[@]}"

# --- the compiler, and the standard library of both architectures, in a private folder ------------------------------

# apt with the machine's sources and keys, and with state of its own: it sees arm64 without `dpkg --add-architecture`.
private_apt() {
  local tool=$1
  shift
  "$tool" -c "$dir/apt.conf" "$@"
}

# The names of a package's dependencies, one a line. The package may carry `:arch` and `=version`.
depends() {
  private_apt apt-cache show "$1" | sed -n 's/^\(Pre-\)\?Depends: //p' | tr ',' '\n' |
    sed 's/|.*//; s/(.*//; s/:any//; s/ //g' | grep .
}

versions_of() { private_apt apt-cache madison "$1" | awk -F'|' '{ gsub(/ /, "", $2); print $2 }'; }

newest_common_version() {
  local best='' v
  for v in $(comm -12 <(versions_of rustc-web:amd64 | sort -u) <(versions_of libstd-rust-web-dev:arm64 | sort -u)); do
    if [ -z "$best" ] || dpkg --compare-versions "$v" gt "$best"; then best=$v; fi
  done
  echo "$best"
}

download_and_unpack() {
  local work=$dir/work root=$dir/root.new version std llvm
  rm -rf "$work" "$root"
  mkdir -p "$work"/{lists/partial,cache/archives/partial,debs} "$root"
  : >"$work/status"
  cat >"$dir/apt.conf" <<CONF
Dir::State "$work";
Dir::State::lists "$work/lists";
Dir::State::status "$work/status";
Dir::Cache "$work/cache";
APT::Architecture "amd64";
APT::Architectures { "amd64"; "arm64"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
CONF
  say "reading the package lists of amd64 and arm64"
  private_apt apt-get update -q >"$work/update.log" 2>&1 || say "$(tail -3 "$work/update.log")"

  version=${DASHINFER_ARM_VERSION:-$(newest_common_version)}
  [ -n "$version" ] || die "no rustc-web for amd64 with libstd-rust-web-dev for arm64 (are the security updates among the sources, and not limited to one architecture?)"
  dpkg --compare-versions "$version" ge "$oldest" || die "rustc-web is $version here; the workspace needs $oldest"
  std=$(depends "libstd-rust-web-dev:amd64=$version" | grep '^libstd-rust-web-[0-9]')
  llvm=$(depends "$std:amd64=$version" | grep '^libllvm')

  say "fetching rustc-web $version"
  (cd "$work/debs" && private_apt apt-get download -q "rustc-web:amd64=$version" "rust-web-clippy:amd64=$version" \
    "$std:amd64=$version" "libstd-rust-web-dev:amd64=$version" "libstd-rust-web-dev:arm64=$version" "$llvm:amd64" >&2)
  for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
  depends "$llvm:amd64" >"$dir/needs"

  rm -rf "${dir:?}/root" "${dir:?}/bin"
  mv "$root" "$dir/root"
  mkdir "$dir/bin"
  local name
  for name in rustc rustdoc clippy-driver cargo-clippy; do
    cat >"$dir/bin/$name" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")/root
LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$root/usr/bin/${0##*/}" "$@"
WRAPPER
    chmod +x "$dir/bin/$name"
  done
  rm -rf "$work" "$dir/apt.conf"
  echo "$version" >"$dir/version"
}

have=$(cat "$dir/version" 2>/dev/null || true)
if [ -z "$have" ] || [ "${DASHINFER_ARM_VERSION:-$have}" != "$have" ]; then
  rm -f "$dir/version"
  download_and_unpack
fi

# --- proof, once per installation: a program built here says what the emulated CPU has ------------------------------

if [ ! -e "$dir/proved" ] || [ "$dir/version" -nt "$dir/proved" ]; then
  # LLVM's own libraries (libedit, libz3, libxml2, ...): most machines have them.
  libraries=$dir/root/usr/lib/x86_64-linux-gnu
  linked=$(LD_LIBRARY_PATH=$libraries ldd "$libraries"/librustc_driver-*.so)
  if [[ $linked == *"not found"* ]]; then
    mapfile -t needs <"$dir/needs"
    install_packages "${needs[@]}"
  fi
  cat >"$dir/proof.rs" <<'PROOF'
use std::arch::is_aarch64_feature_detected as has;
fn main() {
    for (name, there) in [("dotprod", has!("dotprod")), ("i8mm", has!("i8mm")), ("bf16", has!("bf16")), ("sve2", has!("sve2"))] {
        assert!(there, "the emulated CPU lacks {name}");
    }
}
PROOF
  "$dir/bin/rustc" --edition 2024 --target $target -C linker=aarch64-linux-gnu-gcc -o "$dir/proof" "$dir/proof.rs"
  QEMU_CPU=max QEMU_LD_PREFIX=/usr/aarch64-linux-gnu "${DASHINFER_ARM_QEMU:-qemu-aarch64}" "$dir/proof" ||
    die "the emulator is too old for ARMv9 (QEMU 7.2 will do; DASHINFER_ARM_QEMU names another one)"
  rm -f "$dir/proof" "$dir/proof.rs"
  touch "$dir/proved"
  say "ready: $("$dir/bin/rustc" --version), $("${DASHINFER_ARM_QEMU:-qemu-aarch64}" --version | sed -n 1p)"
fi

cat <<OUT
export RUSTC="$dir/bin/rustc"
export RUSTDOC="$dir/bin/rustdoc"
export DASHINFER_ARM_CLIPPY="$dir/bin/cargo-clippy"
export CARGO_BUILD_TARGET=$target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="${DASHINFER_ARM_QEMU:-qemu-aarch64}"
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
export AR_aarch64_unknown_linux_gnu=aarch64-linux-gnu-ar
export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
export QEMU_CPU="\${QEMU_CPU:-max}"
export DASHINFER_EMULATED=1
OUT
