"""What compare.py and export.py share: running a program and watching its memory,
the machine's limits, and tables in documents. Needs no package.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ROOT / "build" / "bench"
GIB = 1 << 30


class Failed(RuntimeError):
    """A program that did not do its work; the last thing it said."""


class Killed(Failed):
    """A program that the system killed, which it does when memory runs out."""


class Run:
    """A program that has run: its output, its time, and its peak memory in bytes.

    resident counts mapped pages of files too; anonymous counts what is the
    process's own, and can't be dropped and read again.
    """

    def __init__(self, command, environment=None):
        self.resident = self.anonymous = 0
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=os.environ | (environment or {}),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        watch = threading.Thread(target=self._watch, args=(process.pid,))
        watch.start()
        try:
            self.output, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
        self.seconds = time.perf_counter() - start
        watch.join()
        if process.returncode == -signal.SIGKILL:
            raise Killed(f"{Path(command[0]).name} was killed: was there enough memory?")
        if process.returncode:
            said = errors.strip().splitlines() or ["it said nothing"]
            raise Failed(f"exit status {process.returncode}: {said[-1][:300]}")

    def _watch(self, pid):
        """Samples until the process has gone: its memory is no longer listed then."""
        fields = {"VmHWM": "resident", "RssAnon": "anonymous"}
        while True:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                return
            found = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.M))
            if not found and "\nState:\tZ" in status:
                return
            for field, name in fields.items():
                if field in found:
                    setattr(self, name, max(getattr(self, name), int(found[field]) << 10))
            time.sleep(0.005)

    def lines(self):
        """What it printed as lines of JSON."""
        try:
            lines = [json.loads(line) for line in self.output.splitlines() if line.startswith("{")]
        except json.JSONDecodeError as error:
            raise Failed(f"what it printed is no JSON: {error}") from error
        if not lines:
            raise Failed("it printed nothing")
        return lines


def end_cleanly():
    """A request to stop raises, so that temporary files go and no program stays."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def build(package):
    """Builds a command of this module into the scratch directory."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    target = SCRATCH / Path(package).name
    Run(["go", "build", "-o", target, package])
    return target


def checkpoint(layers):
    """The generated checkpoint of gpt-oss-20b's width, made if it is missing."""
    return Run([build("./tools/gptoss"), "synthesize", "--layers", layers, "--if-missing"]).output.split()[0]


def fastest(work, repeats, patience=6.0):
    """The shortest time of some repetitions; what takes seconds is not repeated as often."""
    times = []
    while len(times) < repeats and sum(times) < patience:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


class Machine:
    """The processor and its limits, measured in a process of their own, so that the
    buffers count in nobody's memory. Measured again after every engine, they show
    whether the machine was idle; the highest count."""

    def __init__(self, threads):
        self.threads, self.bench = threads, build("./tools/bench")
        self.read = self.operations = 0.0  # bytes, operations per second
        self.seen, self.second = [], ""
        self.measure()

    def measure(self):
        lines = Run([self.bench, "--limits"], {"GOMAXPROCS": str(self.threads)}).lines()
        read, operations = (line["rate"] for line in lines)
        self.how = re.search(r"\((.*)\)", lines[1]["work"])[1]
        self.read, self.operations = max(self.read, read), max(self.operations, operations)
        self.seen.append((read, operations))

    def second_opinion(self):
        """torch's own sum and matrix product, where torch is installed."""
        try:
            lines = Run([sys.executable, __file__, self.threads], {"OMP_NUM_THREADS": str(self.threads)}).lines()
        except Failed:
            return
        read, operations = (line["rate"] for line in lines)
        self.second = f" (torch.sum: {read / 1e9:.0f} GB/s; torch's sgemm, 4096³: {operations / 1e9:.0f} GFLOP/s)"

    def __str__(self):
        limits = f"{self.read / 1e9:.0f} GB/s read and {self.operations / 1e9:.0f} GFLOP/s float32 ({self.how})"
        return f"{processor()}, {os.cpu_count()} cores, {self.threads} threads: {limits}{self.second}"

    def disturbed(self):
        """A warning if the limits were not always the same."""
        reads, operations = zip(*self.seen)
        if min(reads) > 0.9 * max(reads) and min(operations) > 0.9 * max(operations):
            return ""
        spans = (f"{min(seen) / 1e9:.0f} to {max(seen) / 1e9:.0f} {unit}" for seen, unit in ((reads, "GB/s"), (operations, "GFLOP/s")))
        return f"The machine was not idle: its limits were measured {len(reads)} times, as {' and '.join(spans)}."


def processor():
    try:
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def torch_limits(threads):
    import torch

    torch.set_num_threads(threads)
    x = torch.ones(1 << 28)
    print(json.dumps({"rate": x.nbytes / fastest(x.sum, 8)}))
    n = 4096
    a, b = torch.ones(n, n), torch.ones(n, n)
    print(json.dumps({"rate": 2 * n**3 / fastest(lambda: a @ b, 8)}))


def gibibytes(size):
    return f"{size / GIB:.2f}"


def seconds(value):
    """Three digits, never 1e+03."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def table(head, rows):
    """Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write(document, name, text):
    """Puts text between the markers of that name, or at the document's end. The file
    is replaced as a whole."""
    path = Path(document)
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    old = path.read_text()
    if begin in old and end in old:
        new = old[: old.index(begin)] + section + old[old.index(end) + len(end) :]
    else:
        new = old.rstrip() + "\n\n" + section + "\n"
    temporary = path.with_name("." + path.name + ".new")
    temporary.write_text(new)
    temporary.replace(path)


if __name__ == "__main__":
    torch_limits(int(sys.argv[1]))
