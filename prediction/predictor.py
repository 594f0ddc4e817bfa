"""Probabilities of windows: one or several models, averaged, on one device."""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.architectures import TTA_TRANSFORMS
from common.devices import allow_tf32, autocast, memory_ran_out
from common.errors import SegmentationError
from model_training import Checkpoint, class_probabilities, normalize

log = logging.getLogger("semanticseg4eo")


def fuse_batch_norm(model: nn.Module, in_channels: int) -> nn.Module:
    """Put the batch normalization that follows a convolution into its weights, for prediction.

    A forward pass shows which normalization follows which convolution, and the result is compared
    with that before: a network that cannot be fused stays as it was. Mapping with a PSPNet
    (mobilenetv3) takes 6 % less CPU time so, with a U-Net (resnet18) 4 %; loading takes 0.1 s longer.

    Returns:
        The model, changed in place, in evaluation mode; its logits agree to the last bits of float32.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(1, in_channels, 128, 128, generator=generator)
    example = example.to(next(model.parameters()).device)
    expected, pairs = watch_batch_norms(model, example)
    names = {module: name for name, module in model.named_modules()}
    for convolution, norm in pairs:
        transposed = isinstance(convolution, nn.ConvTranspose2d)
        fused = fuse_conv_bn_eval(convolution, norm, transpose=transposed)
        # timm's batch normalization holds the activation too
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        model.set_submodule(names[convolution], fused)
        model.set_submodule(names[norm], nn.Sequential(*rest))
    with torch.inference_mode():
        difference = (model(example) - expected).abs().max()
    if not difference <= 1e-4 * (1 + expected.abs().max()):  # it may be NaN
        for layer in itertools.chain(*pairs):
            model.set_submodule(names[layer], layer)
    return model


def watch_batch_norms(
    model: nn.Module, images: Tensor
) -> tuple[Tensor, list[tuple[nn.Module, nn.Module]]]:
    """The logits of images, and the pairs of a convolution and the batch norm that follows it."""
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs, hooks = [], []

    def remember(convolution, _, output):
        outputs[id(output)] = convolution, output

    def look_up(norm, inputs):
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], norm))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            hooks.append(module.register_forward_hook(remember))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(look_up))
    with torch.inference_mode():
        logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits, pairs


def route_pointwise_to_onednn(model: nn.Module) -> None:
    """Have oneDNN compute convolutions of 1 x 1 pixel on a single thread too, in place.

    There PyTorch has kernels of its own for them, which are slower in channels-last layout; it
    takes oneDNN's for a dilation, which changes nothing in a kernel of one pixel. Mapping with a
    PSPNet (mobilenetv3) takes 7 % less CPU time so, with a U-Net (resnet18) 1 %.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.dilation = (2, 2)


def entropy(probabilities: Tensor, dim: int = 0) -> Tensor:
    """Shannon entropy over the classes as a share of the largest possible, 0 to 1.

    Args:
        probabilities: K along ``dim``; K = 1 is the foreground alone.
    """
    if probabilities.shape[dim] == 1:
        probabilities = torch.cat([probabilities, 1 - probabilities], dim)
    most = math.log(probabilities.shape[dim])
    return torch.special.entr(probabilities).sum(dim) / most


class Predictor:
    """Probabilities of windows: one or several models, averaged, on one device.

    Several models are averaged with equal weight, and so are the views of test-time augmentation.
    When memory runs out, the batch is halved, and stays so.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        device: torch.device,
        precision: str = "fp32",
        tta: str = "none",
        expected_entropy: bool = False,
        compile_batch: int = 0,
    ):
        """Make ready.

        Args:
            checkpoints: Models of the same bands and classes.
            device: Where they are.
            precision: fp32, tf32, bf16 or fp16 (autocast).
            tta: A key of ``TTA_TRANSFORMS``.
            expected_entropy: Give one more channel, the mean of the models' own entropies.
            compile_batch: Compile the networks for batches of this size; 0 is not to.
        """
        self.device = device
        self.precision = precision
        self.views = TTA_TRANSFORMS[tta]
        self.expected_entropy = expected_entropy
        self.compile_batch = compile_batch
        self.largest = sys.maxsize  # windows that fit into memory at once
        self.members = []
        for checkpoint in checkpoints:
            network = checkpoint.model.to(memory_format=torch.channels_last)
            if compile_batch:
                options = {"freezing": True}
                network = torch.compile(network, dynamic=False, options=options)
            member = network, checkpoint.normalization, checkpoint.temperature
            self.members.append(member)
        self.classes = checkpoints[0].config.num_classes
        self.channels = self.classes + expected_entropy

    def __call__(self, images: Tensor, valid: Tensor | None) -> Tensor:
        """Predict windows.

        Args:
            images: (N, C, h, w) in the scene's values, on the device.
            valid: (N, h, w) bool; None: all are.

        Returns:
            (N, K, h, w) float32 probabilities, with one channel more for ``expected_entropy``.

        Raises:
            SegmentationError: The memory does not hold a single window, or no compiler.
        """
        results, start = [], 0
        if self.device.type == "cuda":
            allow_tf32(self.precision)
        while start < len(images):
            part = slice(start, min(start + self.largest, len(images)))
            try:
                masks = None if valid is None else valid[part]
                results.append(self._predict(images[part], masks))
            except (RuntimeError, MemoryError) as error:
                self._require_scarcity(error)
            else:
                start = part.stop
                continue
            # outside of the handler, which holds what the failed pass had allocated
            self._halve(part.stop - part.start, images.shape[-2:])
        return results[0] if len(results) == 1 else torch.cat(results)

    def _require_scarcity(self, error: Exception) -> None:
        """Raise what is not a lack of memory."""
        if type(error).__module__.startswith("torch._") and self.compile_batch:
            raise SegmentationError(
                f"--compile: the model could not be compiled ({str(error).splitlines()[0][:200]}); "
                "is there a C++ compiler? leave --compile out"
            ) from error
        if not memory_ran_out(error):
            raise error

    def _halve(self, failed: int, shape: tuple[int, int]) -> None:
        """Predict half as many windows at a time as the batch that has failed."""
        if failed == 1:
            raise SegmentationError(
                f"The memory of {self.device} does not hold a window of {shape[0]} x {shape[1]} "
                "pixels; lower --patch_size"
            )
        self.largest = failed // 2
        self.compile_batch = min(self.compile_batch, self.largest)
        log.info("memory ran out: batches of %d from here on", self.largest)
        if self.device.type == "cuda":  # pragma: no cover - GPU
            torch.cuda.empty_cache()

    def _predict(self, images: Tensor, valid: Tensor | None) -> Tensor:
        count, number = len(images), len(self.members)
        missing = self.compile_batch - count
        if missing > 0:  # compiled for one shape
            images = torch.cat([images, images[-1:].repeat(missing, 1, 1, 1)])
            if valid is not None:
                valid = torch.cat([valid, valid[-1:].repeat(missing, 1, 1)])
        mean = own_entropy = 0.0
        scaled, rule = None, None
        with torch.inference_mode():
            for network, normalization, temperature in self.members:
                if normalization != rule:
                    rule = normalization
                    scaled = normalize(images, valid, rule)
                    scaled = scaled.contiguous(memory_format=torch.channels_last)
                probabilities = self._average_views(network, scaled, temperature)
                if self.expected_entropy:
                    own_entropy = own_entropy + entropy(probabilities, 1)
                mean = mean + probabilities if number > 1 else probabilities
            mean = mean / number if number > 1 else mean
            if self.expected_entropy:
                mean = torch.cat([mean, (own_entropy / number)[:, None]], dim=1)
        return mean[:count]

    def _average_views(self, network, scaled: Tensor, temperature: float) -> Tensor:
        """Mean probabilities (N, K, h, w) of the views of normalized images (N, C, h, w)."""
        total = None
        for turns, mirrored in self.views:
            view = scaled.flip(-1) if mirrored else scaled
            view = view.rot90(turns, (-2, -1)) if turns else view
            view = view.contiguous(memory_format=torch.channels_last)
            with autocast(self.device, self.precision):
                logits = network(view)
            logits = logits.float()
            one = class_probabilities(
                logits if temperature == 1 else logits / temperature
            )
            one = one.rot90(-turns, (-2, -1)) if turns else one
            one = one.flip(-1) if mirrored else one
            total = one if total is None else total + one
        return total / len(self.views) if len(self.views) > 1 else total
