"""Calls in processes of their own, for ``gpu.py``: neither memory nor failures of one touch another.

A process that has loaded the libraries, and has never asked for a GPU, splits off another one for
every call: a start takes a moment instead of ten seconds. A call is an object of JSON:

    {"function": "main.main", "arguments": [["--epochs", "2"]], "prepare": [["forbid_fork"]],
     "folder": "/tmp/x", "threads": 4}

Its output goes to ``stdout`` and ``stderr`` in the folder. Under torchrun this file performs the
call that it gets as its argument.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "main",
    "Predict_large_image",
    "matplotlib.pyplot",
    "prediction.scene",
    "scipy.ndimage",
    "segmentation_models_pytorch",
    "sklearn.model_selection",
    "timm",
    "torchvision.models.segmentation",
    "training.experiment",
)


@dataclass(frozen=True)
class Outcome:
    """What a call left: exit status and what it said."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """Of stderr."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit status {self.status}"

    @property
    def result(self):
        """What a measuring function returned."""
        return json.loads(self.out.splitlines()[-1])


class CallServer:
    """A process that splits off another one for every call, one after the other."""

    def __init__(self, threads: int):
        self.threads = threads
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # libraries may ask for a GPU while they are loaded; this way it is not initialized
            env=os.environ
            | {"OMP_NUM_THREADS": str(threads), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )

    def call(self, function: str, arguments, prepare, folder: Path, limit: float):
        """The outcome of a call, which is killed after ``limit`` seconds."""
        call = describe_call(function, arguments, prepare, self.threads)
        line = json.dumps(call | {"folder": str(folder)})
        print(line, file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        killed = threading.Event()
        late = threading.Timer(limit, end_process, [child, killed])
        late.start()
        status = int(self.process.stdout.readline())
        late.cancel()
        out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
        if killed.is_set():
            err += f"\nnot finished after {limit:.0f} s"
        return Outcome(status, out, err)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def describe_call(function: str, arguments, prepare=(), threads: int = 1) -> dict:
    return {
        "function": function,
        "arguments": arguments,
        "prepare": list(prepare),
        "threads": threads,
    }


def end_process(process: int, killed: threading.Event) -> None:
    killed.set()
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, signal.SIGKILL)


# --- within the processes ---------------------------------------------------------------------


def serve() -> None:
    """Split off a process for every line of stdin; print its number, then its exit status."""
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of threads, which wait
            child = os.fork()
        if not child:
            call = json.loads(line)
            redirect_output(Path(call["folder"]))
            sys.exit(perform(call))
        print(child, flush=True)
        ended = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(ended), flush=True)


def redirect_output(folder: Path) -> None:
    """Give this process files as its stdout and stderr."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)


def perform(call: dict) -> int:
    """Perform a call in this process; its exit status."""
    import torch

    torch.set_num_threads(call["threads"])
    for name, *arguments in call["prepare"]:
        PREPARATIONS[name](*arguments)
    module, _, function = call["function"].rpartition(".")
    result = getattr(importlib.import_module(module), function)(*call["arguments"])
    if isinstance(result, int):
        return result
    print(json.dumps(result))
    return 0


# --- preparations -----------------------------------------------------------------------------


def imitate_card(size: float) -> None:
    """Have the GPU as much memory as a smaller one, of ``size`` bytes."""
    import torch

    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole))

    def mem_get_info(device=None) -> tuple[int, int]:
        return int(size) - torch.cuda.memory_reserved(device), int(size)

    torch.cuda.mem_get_info = mem_get_info


def leave_memory(size: float) -> None:
    """Take the memory of the GPU but for ``size`` bytes: it really runs out."""
    import torch

    torch.zeros(1, device="cuda")  # what the libraries need first
    free = torch.cuda.mem_get_info()[0]
    taken = torch.empty(int(max(0, free - size)), dtype=torch.uint8, device="cuda")
    leave_memory.taken = taken


def stop_after(epochs: int) -> None:
    """Have the training interrupted when it has finished some epochs."""
    from training.resume import ResumeState

    plain = ResumeState.save

    def save(state: ResumeState) -> None:
        plain(state)
        if len(state.run.history.rows) == epochs:
            raise KeyboardInterrupt

    ResumeState.save = save


def forbid_fork() -> None:
    """Have a fork of this process fail: one that uses NCCL must not be forked."""

    def fork():
        raise AssertionError("a process that uses a GPU was forked")

    os.fork = fork


PREPARATIONS = {
    function.__name__: function
    for function in (imitate_card, leave_memory, stop_after, forbid_fork)
}


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if len(sys.argv) > 1:
        sys.exit(perform(json.loads(sys.argv[1])))
    serve()
