#!/usr/bin/env python3
"""Times llama.cpp and dashinfer in turn, on the same shape with equal weights, and prints medians and ratios.

Each round runs llama.cpp, then dashinfer. Beside each is said how much of the machine other processes used meanwhile (on
Linux): with more than a few percent the ratios mean nothing, since the engines wait for their threads in different ways
and do not suffer alike. See README.md for how to get llama.cpp. Needs nothing but Python 3.8.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

PREFILL = 256  # tokens of the prompt that is timed
CONTEXT = 128  # tokens of the prompts before a decode
DECODED = 128  # tokens that are timed of each sequence
BATCHES = (1, 8)

MEASUREMENTS = [f"prefill 1x{PREFILL}"] + [f"decode b{batch}" for batch in BATCHES]


BUSY = 0.05  # of the machine, used by others: from here on a ratio is not to be trusted


def fail(message):
    print(f"compare.py: {message}", file=sys.stderr)
    sys.exit(1)


def busy_seconds():
    """CPU seconds of all processes since the system started; None where /proc does not tell."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Others:
    """The share of the machine that is used by others than this program and what it runs."""

    def __init__(self):
        self.start = self._now()

    def share(self):
        (wall, busy, own), (wall_before, busy_before, own_before) = self._now(), self.start
        if busy is None or busy_before is None:
            return None
        used = (busy - busy_before) - (own - own_before)
        return max(0.0, used / ((wall - wall_before) * os.cpu_count()))

    @staticmethod
    def _now():
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.monotonic(), busy_seconds(), sum(each.ru_utime + each.ru_stime for each in usage)


def run(command):
    """The output of a command, or the end of this program."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        fail(f"cannot run {command[0]}: {error}")
    if done.returncode != 0:
        fail(f"exit status {done.returncode} of {' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout, done.stderr


def json_lines(text):
    """The JSON objects among the lines of a text."""
    found = []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                pass  # a line of a log
    return found


def llama_cpp(args):
    """Tokens per second of llama.cpp by measurement, and what it says of the CPU features it was built with."""
    common = ["-m", args.gguf, "-t", str(args.threads)]
    out, _ = run([args.llama_bench, *common, "-p", str(PREFILL), "-n", "0", "-r", "1", "-o", "jsonl"])
    prefill = [test["avg_ts"] for test in json_lines(out) if test.get("n_prompt") == PREFILL]
    if len(prefill) != 1:
        fail(f"no prefill of {PREFILL} tokens in the output of llama-bench:\n{out[-2000:]}")
    rates = {f"prefill 1x{PREFILL}": prefill[0]}

    sequences = ",".join(map(str, BATCHES))
    room = max(BATCHES) * (CONTEXT + DECODED) + 256
    command = [args.batched_bench, *common, "-c", str(room), "-npp", str(CONTEXT), "-ntg", str(DECODED)]
    out, log = run([*command, "-npl", sequences, "--output-format", "jsonl"])
    for test in json_lines(out):
        if "speed_tg" in test:
            rates[f"decode b{test['pl']}"] = test["speed_tg"]
    features = next((line.strip() for line in (out + log).splitlines() if "system_info" in line), None)
    return rates, features


def dashinfer(args):
    """The same of dashinfer."""
    command = [args.throughput, "--shape", args.shape, "--weights", args.weights, "--threads", str(args.threads)]
    command += ["--prefill", f"1x{PREFILL}", "--decode", ",".join(map(str, BATCHES))]
    command += ["--repeat", "1", "--json"]
    if args.isa:
        command += ["--isa", args.isa]
    if args.kv_cache:
        command += ["--kv-cache", args.kv_cache]
    out, _ = run(command)
    rates, features = {}, None
    for line in json_lines(out):
        batch = line["batch"]
        name = f"prefill {batch}x{line['length']}" if line["what"] == "prefill" else f"decode b{batch}"
        rates[name] = line["tokens_per_second"]
        features = f"isa {line.get('isa')}, {100 * line['fraction_of_limit']:.0f} % of the limit in {name}"
    return rates, features


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--llama-bench", required=True, metavar="PATH")
    parser.add_argument("--batched-bench", required=True, metavar="PATH", help="llama-batched-bench")
    parser.add_argument("--gguf", required=True, metavar="PATH", help="of the same shape; see random_gguf.py")
    parser.add_argument("--throughput", required=True, metavar="PATH", help="target/release/throughput")
    parser.add_argument("--shape", required=True, help="such as qwen2.5-0.5b")
    parser.add_argument("--weights", default="bf16", help="ours: f32, f16 or bf16, of as many bits as the GGUF's")
    parser.add_argument("--kv-cache", choices=("f32", "f16", "bf16", "int8", "uint4"), help="ours (default: the engine's); theirs is f16")
    parser.add_argument("--isa", help="ours: kernels of this instruction set at most, beside a build of theirs that is held to it")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads are at least 1")

    engines = (("llama.cpp", llama_cpp), ("dashinfer", dashinfer))
    rates = {name: {what: [] for what in MEASUREMENTS} for name, _ in engines}
    disturbed = False
    for number in range(args.rounds):
        for name, measure in engines:
            others = Others()
            found, features = measure(args)
            share = others.share()
            disturbed |= share is not None and share > BUSY
            for what in MEASUREMENTS:
                if what not in found:
                    fail(f"{name} gave no `{what}`")
                rates[name][what].append(found[what])
            shown = ", ".join(f"{what} {found[what]:.1f}" for what in MEASUREMENTS)
            beside = "" if share is None else f" (others used {100 * share:.0f} % of the machine)"
            print(f"round {number + 1} {name}: {shown}{beside}", flush=True)
            if number == 0 and features:
                print(f"  {features}", flush=True)

    print(f"\n{args.shape} {args.weights}, {args.threads} threads, tokens/s, median of {args.rounds}")
    print(f"{'':<16} {'llama.cpp':>10} {'dashinfer':>10} {'ratio':>7}  ratios by round")
    for what in MEASUREMENTS:
        theirs, ours = rates["llama.cpp"][what], rates["dashinfer"][what]
        ratios = [b / a for a, b in zip(theirs, ours)]
        columns = f"{statistics.median(theirs):>10.1f} {statistics.median(ours):>10.1f} {statistics.median(ratios):>6.2f}x"
        print(f"{what:<16} {columns}  {' '.join(f'{ratio:.2f}' for ratio in ratios)}")
    if disturbed:
        print(f"NOT TO BE TRUSTED: in some round others used more than {100 * BUSY:.0f} % of the machine")


if __name__ == "__main__":
    main()
