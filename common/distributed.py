"""The processes that torchrun started, as one process group."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import SegmentationError

LOST_PROCESS = (
    "Another process of this run has ended; the same command with --resume goes on"
)


@dataclass(frozen=True)
class Team:
    """The processes that torchrun started, or this one alone."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and tells for all."""
        return self.rank == 0

    def share(self, make: Callable, *arguments):
        """What ``make`` gives in the first process, in all of them."""
        if self.size == 1:
            return make(*arguments)
        box = [make(*arguments) if self.leads else None]
        self._together(dist.broadcast_object_list, box)
        return box[0]

    def sum(self, *tensors: Tensor) -> None:
        """Add up tensors over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                self._together(dist.all_reduce, tensor)

    def join(self, tensor: Tensor) -> Tensor:
        """The parts (N, ...) of all processes, one after the other; gradients find their way."""
        return tensor if self.size == 1 else _collectives().join(tensor, self)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            self._together(dist.barrier)

    def _together(self, action: Callable, *arguments) -> None:
        try:
            action(*arguments)
        except RuntimeError as error:
            raise SegmentationError(LOST_PROCESS) from error


@functools.cache
def _collectives() -> SimpleNamespace:
    """``sum`` over processes, and ``connected_groups`` of their parts, as functions with a gradient.

    The gradient is that of the sum of what all processes compute, as PyTorch's own synchronized
    layers have it; ``DistributedDataParallel`` makes it a mean.
    """

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            total = tensor.clone()
            dist.all_reduce(total)
            return total

        @staticmethod
        def backward(ctx, gradient):
            total = gradient.clone()
            dist.all_reduce(total)
            return total

    class Join(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor, team):
            ctx.own = slice(team.rank * len(tensor), (team.rank + 1) * len(tensor))
            tensor = tensor.contiguous()
            parts = [torch.empty_like(tensor) for _ in range(team.size)]
            dist.all_gather(parts, tensor)
            return torch.cat(parts)

        @staticmethod
        def backward(ctx, gradient):
            total = gradient.contiguous()
            dist.all_reduce(total)
            return total[ctx.own], None

    return SimpleNamespace(sum=Sum.apply, join=Join.apply)


@contextlib.contextmanager
def join_team(backend: str = "gloo") -> Iterator[Team]:
    """Meet the other processes that torchrun started, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    import datetime

    # one process can work for hours while the others wait; one that dies is noticed at once
    dist.init_process_group(backend, timeout=datetime.timedelta(days=30))
    team = Team(dist.get_rank(), size)
    yield team
    # a thread of gloo that still holds a tensor of Python's while the interpreter ends aborts the
    # process; after a meeting, which has none, all have let go
    team.wait()
    dist.destroy_process_group()


def distribute(model: nn.Module, device: torch.device, team: Team, in_channels: int):
    """A model whose gradients are averaged over the processes of a team; alone, the model itself.

    Parameters that no logit depends on (some decoders leave encoder layers unused) are taken out
    of the training first, since PyTorch would wait for their gradients.
    """
    if team.size == 1:
        return model
    model.eval()
    logits = model(torch.zeros(1, in_channels, 64, 64, device=device))
    used, seen, found = set(), set(), [logits.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        used.add(id(getattr(node, "variable", None)))
        found += [before for before, _ in node.next_functions]
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
    gpu = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=gpu)


def share_normalization(model: nn.Module, device: torch.device, team: Team) -> None:
    """Have batch normalization count the parts of all processes, in place.

    PyTorch's own layers do that on GPUs only; on the CPU ours take their place.
    """
    if team.size == 1:
        return
    if device.type != "cpu":
        from timm.layers import convert_sync_batchnorm

        model.network = convert_sync_batchnorm(model.network)
        return
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(module, name, _shared_batch_norm(layer, team))


def _shared_batch_norm(layer: nn.BatchNorm2d, team: Team) -> nn.Module:
    """A layer with the parameters and buffers of one of torch's or timm's."""
    all_reduce = _collectives().sum

    class SharedBatchNorm(nn.BatchNorm2d):
        def forward(self, images: Tensor) -> Tensor:
            return self.after(
                super().forward(images)
                if not self.training
                else self.normalized(images)
            )

        def normalized(self, images: Tensor) -> Tensor:
            count = images.numel() // images.shape[1] * team.size
            mean = all_reduce(images.sum((0, 2, 3))) / count
            apart = images - mean[:, None, None]
            variance = all_reduce((apart * apart).sum((0, 2, 3))) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = self.weight * torch.rsqrt(variance + self.eps)
            return apart * scale[:, None, None] + self.bias[:, None, None]

    shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum)
    shared.load_state_dict(layer.state_dict())
    # timm's layers drop and activate too
    tail = [getattr(layer, name, None) for name in ("drop", "act")]
    shared.after = nn.Sequential(*[part for part in tail if part is not None])
    return shared
