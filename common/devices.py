"""The device of a run: choice, precision, memory."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from common import machine
from common.errors import OptionError, SegmentationError, require

log = logging.getLogger("semanticseg4eo")

DEVICES = "cpu, cuda, cuda:N or mps"
# files of the driver on Linux, under WSL and on Windows
NVIDIA_DRIVER = (
    "/proc/driver/nvidia/version",
    "/dev/dxg",
    r"C:\Windows\System32\nvcuda.dll",
)
MPS_LACKS = torch.float64, torch.uint16, torch.uint32, torch.uint64
NO_ALGORITHM = " does not have a deterministic implementation"  # in PyTorch's warning


def pick_device(name: str | None) -> torch.device:
    """The device of a ``--device`` text; without one, the GPU where there is one.

    Raises:
        SegmentationError: A GPU is asked for and there is none.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            log.info("no GPU found: running on the CPU%s", build_without_gpu())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: expected {DEVICES}") from error
    gpus = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda", "mps"):
        raise OptionError(f"--device {name}: expected {DEVICES}")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise SegmentationError(
            f"--device {name}: this machine has {gpus} GPUs{build_without_gpu()}; use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SegmentationError(
            f"--device {name}: this machine has no GPU of Apple; use --device cpu"
        )
    # with its number: PyTorch cannot make a GPU without one the present one
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def build_without_gpu() -> str:
    """What to add to a message where there is an NVIDIA GPU that this build of PyTorch ignores."""
    if torch.version.cuda or not any(map(os.path.exists, NVIDIA_DRIVER)):
        return ""
    return (
        ", though it has an NVIDIA GPU: this PyTorch is built for the CPU alone (docs/install.md says "
        "how to install the other build)"
    )


def local_device(name: str | None) -> torch.device:
    """``pick_device`` for one of the processes of torchrun, each with a GPU of its own: its present
    one from here on.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    fine = not (several and (name or "").startswith("cuda:"))
    require(fine, "--device", name, "cuda, since each process takes a GPU of its own")
    fine = not ("WORLD_SIZE" in os.environ and (name or "").startswith("mps"))
    require(
        fine, "--device", name, "cuda or cpu, since torchrun knows no other devices"
    )
    if several and (name == "cuda" or name is None and torch.cuda.is_available()):
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a GPU copies it beside other work where it is pinned.

    For GPUs of Apple numbers of the types that they lack become float32.
    """
    if device.type == "mps" and tensor.dtype in MPS_LACKS:
        tensor = tensor.float()
    # elsewhere the memory can be used again before it is copied
    return tensor.to(device, non_blocking=device.type == "cuda")


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most, of a GPU or else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # keeps what it has taken
    return machine.peak_memory()


def free_memory(device) -> int:
    """Bytes that this process can still take on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # PyTorch uses it again
    if device.type == "mps":
        most = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(most, machine.free_memory())  # one memory for both
    return machine.free_memory()


def release_memory(device: torch.device) -> None:
    """Give a GPU the memory back that PyTorch keeps, and forget how much it has held at most."""
    gc.collect()  # an error that was caught can hold tensors in circles
    if device.type == "cuda":  # pragma: no cover - GPU
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_ran_out(error: Exception) -> bool:
    """Whether an error says that the memory of a device, or main memory, ran out.

    PyTorch has a class of its own for its allocator alone. CUDA, cuBLAS and cuDNN, which take memory
    for themselves, say it in their words; cuDNN has no algorithm left for which the memory suffices.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    named = "memory" in text and ("out of" in text or "allocate" in text)
    return named or "ALLOC_FAILED" in text or "unable to find an engine" in text


def native_precisions(device: torch.device) -> list[str]:
    """The precisions below float32 that the hardware computes in itself, to be tried in this order.

    bf16 holds numbers as large as float32 does; fp16 is as fast and finer; tf32 is slower than both
    and as fine as fp16, with numbers as large as float32's. GPUs of Apple get float32.
    """
    if device.type == "mps":
        return []
    if device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 and later
        names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
        return ["bf16"] if any(known.get(name) for name in names) else []
    known = {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "fp16": torch.cuda.get_device_capability(device) >= (7, 0),
        "tf32": torch.cuda.get_device_capability(device) >= (8, 0),
    }
    return [name for name, there in known.items() if there]


def native_precision(device: torch.device) -> str:
    """The first of ``native_precisions``, or fp32."""
    return next(iter(native_precisions(device)), "fp32")


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Compute on a GPU by deterministic algorithms where PyTorch has them, and log where it has none.

    The CPU's are. What the GPU multiplies matrices with needs ``CUBLAS_WORKSPACE_CONFIG`` from the
    first time on: see ``require_deterministic_cublas``.
    """
    if device.type == "cpu":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # what is read is written
    )
    try:
        with warnings.catch_warnings(record=True) as found:
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling
    for warning in found:
        operation, known, _ = str(warning.message).partition(NO_ALGORITHM)
        if known:
            report_not_deterministic(operation.split()[-1])
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


@cache
def report_not_deterministic(operation: str) -> None:
    """Log, once, that a GPU has no deterministic algorithm for an operation."""
    text = "the same seed can give other numbers: on a GPU %s is not deterministic"
    log.warning(text, operation)


def require_deterministic_cublas() -> None:
    """Have a GPU multiply matrices in the same order always, from its first use in this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def autocast(device: torch.device, precision: str):
    """A context in which a model computes in a precision; tf32 needs ``allow_tf32`` as well."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def allow_tf32(precision: str) -> None:
    """Have GPUs multiply in TF32 from here on if that is the ``precision``, else in float32.

    By PyTorch's older switches, which can still be read after it: its export to ONNX reads them, and
    ends with an error where the newer ones were set to "ieee" (seen with 2.15).
    """
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


@cache
def own_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """A queue of a GPU for what goes on beside the forward passes.

    There is one for each purpose, since PyTorch keeps freed memory for the queue that had it.
    """
    return torch.cuda.Stream(device)


@contextmanager
def beside_passes(
    device: torch.device, after: torch.cuda.Event | None
) -> Iterator[None]:
    """Compute and copy back beside the forward passes of a GPU, after an event among them."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)  # a new thread has the first one
    stream = own_stream(device, "download")
    after.wait(stream)
    with torch.cuda.stream(stream):
        yield


@contextmanager
def shared_threads(workers: int) -> Iterator[None]:
    """Share torch's threads among workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
