#!/usr/bin/env bash
# Runs the tests in bin/ on a machine with a GPU. Made by `cargo xtask gpu-tests`.
#
#   ./run.sh                       every test of every program
#   ./run.sh cuda                  the tests whose path contains "cuda"; several words: those with any of them
#   ./run.sh --only kernels cuda   in the programs whose name contains "kernels"; may be repeated
#   ./run.sh --sanitize cuda       the kernels' tests under compute-sanitizer: memcheck, racecheck, synccheck, initcheck
#   ./run.sh --sanitize=racecheck  with these tools (commas between them)
#   ./run.sh --data FOLDER         what the tests read is in this checkout (default: data/ beside this script)
#   ./run.sh --allow-skips         a test that finds no GPU is no failure, and the SDK's tests run on the CPU
#
# Prints a line for each test and the whole output of a program that fails; the last line counts the programs, and the exit
# status is 1 if any failed. The SDK's tests run on $DASHINFER_TEST_DEVICE (default: cuda) in $DASHINFER_TEST_COMPUTE.
# RUST_TEST_THREADS, DASHINFER_CUDA_LIBRARIES and the rest mean what they mean elsewhere.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly built_in=@WORKSPACE@ # paths in the programs begin with this

only=() filters=() tools=() data=$here/data allow_skips=
while [ $# -gt 0 ]; do
  case $1 in
    --only) only+=("${2:?--only needs a name}") && shift ;;
    --data) data=$(cd "${2:?--data needs a folder}" && pwd) && shift ;;
    --allow-skips) allow_skips=yes ;;
    --sanitize) tools=(memcheck racecheck synccheck initcheck) ;;
    --sanitize=*) IFS=, read -ra tools <<<"${1#*=}" ;;
    -h | --help) sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p' && exit ;;
    -*) echo "run.sh: what is $1?" >&2 && exit 2 ;;
    *) filters+=("$1") ;;
  esac
  shift
done

[ -n "$allow_skips" ] || export DASHINFER_TEST_DEVICE=${DASHINFER_TEST_DEVICE:-cuda}

log=$(mktemp)
link=
cleanup() {
  rm -f "$log"
  [ -z "$link" ] || rm -f "$link"
}
trap cleanup EXIT

# The programs look for their data where they were built.
if [ ! -e "$built_in" ]; then
  mkdir -p "$(dirname "$built_in")"
  ln -s "$data" "$built_in"
  link=$built_in
fi

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "nvidia-smi tells nothing"

is_selected() {
  [ ${#only[@]} -gt 0 ] || return 0
  local part
  for part in "${only[@]}"; do
    [[ $1 != *"$part"* ]] || return 0
  done
  return 1
}

num_passed=0 num_failed=0

# check NAME COMMAND...: runs a test program and prints its tests.
check() {
  local name=$1 start=$SECONDS status=0 skips
  shift
  printf '\n=== %s\n' "$name"
  # --show-output: what a passing test says is how one that was skipped is told.
  "$@" "${filters[@]}" --show-output >"$log" 2>&1 || status=$?
  skips=$(grep -c 'skipped: no CUDA device' "$log" || true)
  if [ $status -ne 0 ]; then
    cat "$log"
  else
    grep -E '^test ' "$log" || true
    grep -E '^=========|^not listed in units.rs' "$log" || true
  fi
  if [ $status -eq 0 ] && [ "$skips" -gt 0 ] && [ -z "$allow_skips" ]; then
    echo "$skips tests found no GPU: $(grep -m 1 'skipped: no CUDA device' "$log")"
    status=skipped
  fi
  if [ "$status" = 0 ]; then
    num_passed=$((num_passed + 1)) && printf '=== %s: passed, %d s\n' "$name" $((SECONDS - start))
  else
    num_failed=$((num_failed + 1)) && printf '=== %s: FAILED (%s), %d s\n' "$name" "$status" $((SECONDS - start))
  fi
}

find_sanitizer() {
  local path
  for path in "$(command -v compute-sanitizer || true)" "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer \
    /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer; do
    [ ! -x "$path" ] || { echo "$path" && return; }
  done
  echo "run.sh: there is no compute-sanitizer on this machine" >&2
  return 1
}

if [ ${#tools[@]} -gt 0 ]; then
  sanitizer=$(find_sanitizer)
  export RUST_TEST_THREADS=1 # an error is then of the test that was named last
  for tool in "${tools[@]}"; do
    check "kernels under $tool" "$sanitizer" --tool "$tool" --error-exitcode 99 --print-limit 20 "$here/bin/kernels"
  done
else
  for program in "$here"/bin/*; do
    if is_selected "$(basename "$program")"; then check "$(basename "$program")" "$program"; fi
  done
fi

printf '\n%d passed, %d failed\n' $num_passed $num_failed
[ $num_failed -eq 0 ]
