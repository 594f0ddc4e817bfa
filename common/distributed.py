"""The processes that torchrun started, as one process group of PyTorch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from common.devices import memory_ran_out
from common.errors import SegmentationError
from common.interruption import (
    end_when_stuck,
    stop_if_requested,
    stop_requested,
)

LOST_PROCESS = (
    "Another process of this run has ended; the same command with --resume continues it"
)
PATIENCE = (
    10  # seconds for a process to end by itself, of the 30 that torchrun gives it
)
TIMEOUT = timedelta(hours=2)  # of a collective; what takes longer is waited for outside
POLL_SECONDS = 0.05  # between two looks at whether the main process has finished


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, or this one alone (``store`` is None)."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None
    control: dist.ProcessGroup | None = None  # on the CPU; None is PyTorch's own

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files and reports for all."""
        return self.rank == 0

    def broadcast(self, make: Callable, *arguments):
        """Call ``make`` in the main process and give its result to all of them.

        It may take hours: the others wait outside of any collective until it is done.
        """
        if self.store is None:
            return make(*arguments)
        box = [make(*arguments) if self.is_main_process else None]
        self._wait_for([0])
        self._collective(dist.broadcast_object_list, box)
        return box[0]

    def all_reduce(self, *tensors: Tensor) -> None:
        """Add up tensors over all processes, in place."""
        if self.store is not None:
            for tensor in tensors:
                self._collective(dist.all_reduce, tensor)

    def least(self, value: int) -> int:
        """The least of the values that the processes give."""
        if self.store is None:
            return value
        values = torch.tensor([value])
        self._collective(dist.all_reduce, values, dist.ReduceOp.MIN, self.control)
        return int(values)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the main one, as batch statistics on the CPU."""
        if self.store is not None:
            for buffer in model.buffers():
                self._collective(dist.broadcast, buffer, 0)

    def heed_stop(self) -> None:
        """Raise KeyboardInterrupt in all processes at this point, where one was asked to stop."""
        asked = stop_requested()
        if self.store is not None:
            votes = torch.tensor([int(asked)])
            self._collective(dist.all_reduce, votes, dist.ReduceOp.MAX, self.control)
            asked = bool(votes)
        if asked:
            raise KeyboardInterrupt

    def barrier(self) -> None:
        """Continue when all processes are here."""
        if self.store is not None:
            self._wait_for(range(self.size))
            self._collective(dist.barrier)

    def _wait_for(self, ranks: Iterable[int]) -> None:
        """Continue when some processes have come as far as this one."""
        number = self.store.add(f"arrived-{self.rank}", 1)
        for rank in ranks:
            while self.store.add(f"arrived-{rank}", 0) < number:
                stop_if_requested()
                time.sleep(POLL_SECONDS)

    def _collective(self, action: Callable, *arguments) -> None:
        try:
            action(*arguments)
        except RuntimeError as error:
            stop_if_requested()  # the others have heeded it
            raise SegmentationError(LOST_PROCESS) from error


@contextmanager
def torch_errors(device: torch.device, scarce: str) -> Iterator[None]:
    """Raise what torch reports in its own way as SegmentationError, which says what to do.

    Args:
        device: The one in use.
        scarce: The options to lower where memory runs out, as "--batch_size or --num_workers".
    """
    try:
        yield
    except (RuntimeError, SegmentationError) as error:
        message = translate_torch_error(error, device, scarce)
        if message is None:
            raise
        if LOST_PROCESS in message or reader_died(error):
            stop_if_requested()  # the signal has reached them too
        raise SegmentationError(message) from error


def translate_torch_error(
    error: Exception, device: torch.device, scarce: str
) -> str | None:
    """One line for an error of torch; None for what is not known. See ``torch_errors``."""
    text = str(error)
    if isinstance(error, SegmentationError):
        # one that a process of a DataLoader raised ends in its traceback
        in_worker = "Original Traceback" in text
        return text.splitlines()[-1].partition(": ")[2] if in_worker else None
    # PyTorch's own words for a full /dev/shm are many
    if "shared memory" in text or "torch_" in text and "No space left" in text:
        return (
            "The shared memory (/dev/shm) is too small for the batches; lower --num_workers or "
            "--batch_size, or give a container more (docker run --shm-size 2g)"
        )
    if memory_ran_out(error):
        return f"The memory of {device} is too small; lower {scarce}"
    if reader_died(error):
        return (
            f"A process that reads patches was killed (out of memory?); lower {scarce}"
        )
    if isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text:
        return LOST_PROCESS
    if device.type == "mps" and "MPS" in text:
        return f"{device} cannot compute this model ({text.splitlines()[0]}); use --device cpu"
    return None


def reader_died(error: Exception) -> bool:
    """Whether a process of a DataLoader ended by itself, which its pinning thread may see first."""
    text = str(error)
    return "DataLoader worker" in text or "Pin memory thread exited" in text


@contextmanager
def init_distributed(gpu: torch.device | None = None) -> Iterator[ProcessGroup]:
    """The process group of the processes that torchrun started; without torchrun, this one alone.

    Its collectives take tensors of the ``gpu`` of this process (NCCL), else those of the CPU (gloo).
    """
    if "WORLD_SIZE" not in os.environ:
        yield ProcessGroup()
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    main = dist.PrefixStore("semanticseg4eo", store)
    pytorch = dist.PrefixStore("process_group", store)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=pytorch,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=gpu,  # else NCCL guesses it for a barrier, and warns
    )
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if gpu else None
    group = ProcessGroup(rank, size, main, control)
    with stuck_process_ended(group) if gpu else nullcontext():
        yield group
    # a thread of gloo that still holds a tensor of Python's while the interpreter ends aborts the
    # process; after a barrier, which has none, all have let go
    group.barrier()
    dist.destroy_process_group()


def stuck_process_ended(group: ProcessGroup) -> AbstractContextManager:
    """Have a process that waits in NCCL for a lost one end with its line when torchrun ends it."""
    words = f"error: {LOST_PROCESS}" if group.is_main_process else None
    return end_when_stuck(words, PATIENCE)


def distribute(
    model: nn.Module, device: torch.device, group: ProcessGroup, in_channels: int
) -> nn.Module:
    """A model whose gradients are averaged over the processes; alone, the model itself."""
    if group.store is None:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=has_unused_parameters(model, device, in_channels),
    )


def has_unused_parameters(
    model: nn.Module, device: torch.device, in_channels: int
) -> bool:
    """Whether no logit depends on some parameters: several decoders leave encoder layers unused."""
    training = model.training
    model.eval()
    model(torch.zeros(1, in_channels, 64, 64, device=device)).sum().backward()
    unused = any(p.requires_grad and p.grad is None for p in model.parameters())
    model.zero_grad(set_to_none=True)
    model.train(training)
    return unused


def synchronize_batch_norm(
    model: nn.Module, device: torch.device, group: ProcessGroup
) -> None:
    """Have batch normalization on GPUs count the parts of all processes, in place.

    On the CPU, for which PyTorch has no such layer, each process normalizes its own part. By timm's
    converter, since PyTorch's loses the activation that timm's layers hold.
    """
    if group.size > 1 and device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        model.network = convert_sync_batchnorm(model.network)
