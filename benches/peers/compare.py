#!/usr/bin/env python3
"""Times llama.cpp and dashinfer in turn, on equal shapes with weights of equal size, and prints a table in Markdown.

Each round runs llama.cpp, then dashinfer, and gives one ratio. Beside each is said how much of the machine other processes
used meanwhile (on Linux): with more than a few percent the ratio means nothing, since the engines wait for their threads in
different ways and do not suffer alike. See README.md for how to get llama.cpp. Needs nothing but Python 3.8.
"""

import argparse
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time

CONTEXT = 128  # tokens of the prompts before a decode
DECODED = 128  # tokens that are timed of each sequence

BUSY = 0.05  # of the machine, used by others: from here on a ratio is not to be trusted


class Failure(Exception):
    """What kept an engine from being timed."""


def log(message):
    print(message, file=sys.stderr, flush=True)


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
        # Where the counters stand still, they do not count.
        if busy is None or busy_before is None or busy == busy_before:
            return None
        used = (busy - busy_before) - (own - own_before)
        return max(0.0, used / ((wall - wall_before) * os.cpu_count()))

    @staticmethod
    def _now():
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.monotonic(), busy_seconds(), sum(each.ru_utime + each.ru_stime for each in usage)


def wait_for_quiet(seconds):
    """Waits until others leave the machine alone, but no longer than that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        others = Others()
        time.sleep(2)
        if (others.share() or 0) <= BUSY:
            return


def run(command):
    """The output of a command, and what it logged."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise Failure(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise Failure(f"exit status {done.returncode} of {shlex.join(command)}\n{done.stderr[-2000:]}")
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


class Case:
    """A shape, the GGUF of it, and the options of `throughput` that make weights as large."""

    def __init__(self, shape, gguf, options):
        self.shape, self.gguf, self.options = shape, gguf, options

    @classmethod
    def parse(cls, text):
        shape, gguf, *options = shlex.split(text)
        return cls(shape, gguf, options)

    def scheme(self):
        """How the weights of ours are called."""

        def value(option, usual=None):
            return self.options[self.options.index(option) + 1] if option in self.options else usual

        scheme = value("--quantize") or value("--weights", "bf16")
        vocabulary = value("--quantize-vocabulary")
        return f"{scheme}, vocabulary {vocabulary}" if vocabulary else scheme


class Times:
    """What one engine did in one round."""

    def __init__(self):
        self.rates = {}  # tokens per second by measurement, the best of the repeats
        self.bytes = self.parameters = None  # of the weights
        self.type = None  # of the weights
        self.notes = []  # what the engine says of its kernels
        self.settings = {}  # by measurement, what made it the best

    def add(self, what, rate, setting=None):
        if rate > self.rates.get(what, 0):
            self.rates[what] = rate
            self.settings[what] = setting


def llama_cpp(args, case):
    times = Times()
    common = ["-m", case.gguf, "-t", str(args.threads)]
    for attention in args.flash_attention:
        flash = [] if attention == "auto" else ["-fa", attention]
        if args.prefill:
            lengths = ",".join(map(str, args.prefill))
            command = [args.llama_bench, *common, *flash, "-p", lengths, "-n", "0", "-r", str(args.repeat)]
            out, errors = run([*command, "-o", "jsonl"])
            for test in json_lines(out):
                times.type = test["model_type"].split()[-1].lower()
                times.bytes, times.parameters = test["model_size"], test["model_n_params"]
                rate = max(test.get("samples_ts") or [test["avg_ts"]])
                times.add(f"prefill {test['n_prompt']}", rate, attention)
            times.notes += [line.strip() for line in errors.splitlines() if "AMX" in line]
        if args.decode:
            batches = ",".join(str(batch) for batch in args.decode for _ in range(args.repeat))
            room = max(args.decode) * (CONTEXT + DECODED) + 256
            command = [args.batched_bench, *common, *flash, "-c", str(room), "-npp", str(CONTEXT), "-ntg", str(DECODED)]
            out, errors = run([*command, "-npl", batches, "--output-format", "jsonl", "-lv", "4"])
            for test in json_lines(out):
                times.add(f"decode b{test['pl']}", test["speed_tg"], attention)
            # `AMX` and `CPU_REPACK` are weights laid out for kernels of their own.
            times.notes += re.findall(r"load_tensors: +(\S+ model buffer size = +\S+ \S+)", out + errors)
    return times


def dashinfer(args, case):
    times = Times()
    command = [args.throughput, "--shape", case.shape, "--threads", str(args.threads), *case.options]
    if args.prefill:
        command += ["--prefill", ",".join(f"1x{length}" for length in args.prefill)]
    if args.decode:
        command += ["--decode", ",".join(map(str, args.decode))]
    out, _ = run([*command, "--repeat", str(args.repeat), "--json"])
    for line in json_lines(out):
        what = f"prefill {line['length']}" if line["what"] == "prefill" else f"decode b{line['batch']}"
        times.add(what, line["tokens_per_second"])
        times.bytes = line["weight_bytes"]
        times.notes = [f"kernels: {line.get('isa')}"]
    times.type = case.scheme()
    return times


ENGINES = {"llama.cpp": llama_cpp, "dashinfer": dashinfer}


def measure(args, case, notes):
    """The rounds of a case: of each, what each engine did, and whether others used the machine meanwhile."""
    rounds = []
    for number in range(args.rounds):
        found, busy = {}, False
        for name, engine in ENGINES.items():
            if name == "dashinfer" and not args.throughput:
                continue
            wait_for_quiet(args.wait)
            others = Others()
            times = found[name] = engine(args, case)
            share = others.share()
            busy |= share is not None and share > BUSY
            for what in args.measurements:
                if what not in times.rates:
                    raise Failure(f"{name} gave no `{what}`")
            shown = ", ".join(f"{what} {times.rates[what]:.1f}" for what in args.measurements)
            beside = "" if share is None else f" (others used {100 * share:.0f} % of the machine)"
            log(f"{case.shape} {times.type} round {number + 1} {name}: {shown}{beside}")
            for note in times.notes:
                notes.setdefault(f"{case.shape}, {times.type}, {name}: {note}")
        rounds.append((found, busy))
    return rounds


def rows(args, case, rounds):
    """The rows of the table."""

    def bits(times, parameters):
        """Of a weight; ours are divided by the same number of parameters."""
        return f"{times.type} ({8 * times.bytes / parameters:.2f})" if times.bytes and parameters else times.type

    first = rounds[0][0]
    kinds = {name: bits(times, first["llama.cpp"].parameters) for name, times in first.items()}
    for what in args.measurements:
        theirs = [found["llama.cpp"].rates[what] for found, _ in rounds]
        setting = rounds[-1][0]["llama.cpp"].settings[what]
        setting = f" (-fa {setting})" if len(args.flash_attention) > 1 else ""
        cells = [case.shape, what, f"{kinds['llama.cpp']}{setting}", f"{statistics.median(theirs):.1f}"]
        if "dashinfer" in first:
            ours = [found["dashinfer"].rates[what] for found, _ in rounds]
            ratios = [b / a for a, b in zip(theirs, ours)]
            marked = [f"{ratio:.2f}{'?' if busy else ''}" for ratio, (_, busy) in zip(ratios, rounds)]
            cells += [kinds["dashinfer"], f"{statistics.median(ours):.1f}"]
            cells += [f"{statistics.median(ratios):.2f} ×", " ".join(marked)]
        else:
            cells += ["", "", "", " ".join(f"{rate:.1f}{'?' if busy else ''}" for rate, (_, busy) in zip(theirs, rounds))]
        yield "| " + " | ".join(cells) + " |"


def parse():
    def numbers(text):
        return [int(number) for number in text.split(",") if number]

    def words(text):
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--llama-bench", required=True, metavar="PATH")
    add("--batched-bench", required=True, metavar="PATH", help="llama-batched-bench")
    add("--throughput", metavar="PATH", help="target/release/throughput (without: llama.cpp alone)")
    add("--case", action="append", default=[], metavar="'SHAPE GGUF [OPTION ..]'", help="what is compared, and options of "
        "throughput for it, such as 'qwen2.5-0.5b 0.5b-q8_0.gguf --quantize a8w8'; may be given several times")
    add("--shape", help="of one case, such as qwen2.5-0.5b")
    add("--gguf", metavar="PATH", help="of one case; see random_gguf.py")
    add("--weights", metavar="TYPE", help="of one case, ours: f32, f16 or bf16 (default), of as many bits as the GGUF's")
    add("--quantize", metavar="SCHEME", help="of one case, ours: as in throughput --quantize")
    add("--kv-cache", choices=("f32", "f16", "bf16"), help="ours (default: the engine's); theirs is f16")
    add("--isa", help="ours: kernels of this instruction set at most, beside a build of theirs that is held to it")
    add("--flash-attention", type=words, default=["auto"], metavar="auto|on|off[,..]",
        help="theirs: what they do by default (auto), or the best of several")
    add("--prefill", type=numbers, default=[256], metavar="L,..", help="lengths of prompts (default: 256; '' for none)")
    add("--decode", type=numbers, default=[1, 8], metavar="B,..", help="batches (default: 1,8; '' for none)")
    add("--threads", type=int, required=True)
    add("--rounds", type=int, default=3)
    add("--wait", type=float, default=0, metavar="SECONDS", help="before each run, for a quiet machine, at most (default: 0)")
    add("--repeat", type=int, default=1, help="best of so many within a round, of both (default: 1)")
    args = parser.parse_args()
    if min(args.rounds, args.threads, args.repeat) < 1:
        parser.error("--rounds, --threads and --repeat are at least 1")
    if set(args.flash_attention) - {"auto", "on", "off"}:
        parser.error("--flash-attention is of auto, on and off")
    try:
        cases = [Case.parse(text) for text in args.case]
    except ValueError:
        parser.error("a --case is 'SHAPE GGUF [OPTION ..]'")
    if (args.shape is None) != (args.gguf is None) or not (args.shape or cases):
        parser.error("wanted are --case, or --shape with --gguf")
    if args.shape:
        weights, quantize = args.weights, args.quantize
        options = (["--weights", weights] if weights else []) + (["--quantize", quantize] if quantize else [])
        cases.insert(0, Case(args.shape, args.gguf, options))
    for case in cases:
        case.options += ["--kv-cache", args.kv_cache] if args.kv_cache else []
        case.options += ["--isa", args.isa] if args.isa else []
    args.measurements = [f"prefill {length}" for length in args.prefill] + [f"decode b{batch}" for batch in args.decode]
    return args, cases


def main():
    args, cases = parse()
    print(f"Tokens/s with {args.threads} threads, medians of {args.rounds} rounds, in brackets the bits of a weight:\n")
    print("| shape | measured | llama.cpp | tokens/s | dashinfer | tokens/s | ratio | by round |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    notes, failures, disturbed = {}, [], False
    for case in cases:
        try:
            rounds = measure(args, case, notes)
        except Failure as failure:
            log(f"compare.py: {case.shape} {case.gguf}: {failure}")
            failures.append(case)
            continue
        disturbed |= any(busy for _, busy in rounds)
        for row in rows(args, case, rounds):
            print(row, flush=True)
    print()
    for note in notes:
        print(note)
    if disturbed:
        print(f"NOT TO BE TRUSTED: rounds with a `?`, in which others used more than {100 * BUSY:.0f} % of the machine")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
