"""Probabilities of windows: one or several models, averaged, on one device."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.architectures import TTA_TRANSFORMS
from common.errors import SegmentationError
from model_training import Checkpoint, class_probabilities, normalize

log = logging.getLogger("semanticseg4eo")


def fuse_batch_norm(model: nn.Module, in_channels: int) -> nn.Module:
    """Put the batch normalization that follows a convolution into its weights, for prediction.

    What follows what is watched in a forward pass, and the outcome is checked against the model:
    one where this is not the same network comes back as it was.

    Returns:
        A copy in evaluation mode; its logits agree to the last bits of float32.
    """
    import copy

    folded = copy.deepcopy(model).eval()
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs = []

    def remember(convolution, _, output):
        outputs[id(output)] = convolution, output

    def look_up(norm, inputs):
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], norm))

    hooks = []
    for module in folded.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            hooks.append(module.register_forward_hook(remember))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(look_up))
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    example = torch.rand(1, in_channels, 128, 128, generator=generator).to(device)
    with torch.inference_mode():
        expected = folded(example)
    for hook in hooks:
        hook.remove()
    outputs.clear()
    names = {module: name for name, module in folded.named_modules()}
    for convolution, norm in pairs:
        transposed = isinstance(convolution, nn.ConvTranspose2d)
        fused = fuse_conv_bn_eval(convolution, norm, transpose=transposed)
        # timm's batch normalization holds the activation too
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        folded.set_submodule(names[convolution], fused)
        folded.set_submodule(names[norm], nn.Sequential(*rest))
    with torch.inference_mode():
        difference = (folded(example) - expected).abs().max()
    same = difference <= 1e-4 * (1 + expected.abs().max())
    return folded if same else model


def route_pointwise_to_onednn(model: nn.Module) -> None:
    """Have PyTorch compute convolutions of 1 x 1 pixel by oneDNN on a single thread too, in place.

    There it takes kernels of its own for them, which are slower where the bands of a pixel lie
    together. It does not for a dilation, which means nothing to a kernel of one pixel.
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
            precision: fp32, bf16 or fp16 (autocast).
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
        if precision == "fp32" and device.type == "cuda":
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # not TF32
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
        results = []
        while sum(map(len, results)) < len(images):
            start = sum(map(len, results))
            part = slice(start, start + self.largest)
            masks = None if valid is None else valid[part]
            try:
                results.append(self._predict(images[part], masks))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                self._explain(error)
                failed = len(images[part])
            else:
                continue
            # outside of the handler, which holds what the failed pass had allocated
            self._halve(failed, images)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _explain(self, error: Exception) -> None:
        """Raise what is not a lack of memory."""
        if type(error).__module__.startswith("torch._") and self.compile_batch:
            raise SegmentationError(
                f"--compile: the model could not be compiled ({str(error).splitlines()[0][:200]}); "
                "is there a C++ compiler? leave --compile out"
            ) from error
        scarce = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        # on the CPU lack of memory is a RuntimeError
        if not scarce and "allocate memory" not in str(error):
            raise error

    def _halve(self, failed: int, images: Tensor) -> None:
        if failed == 1:
            raise SegmentationError(
                f"The memory of {self.device} does not hold a window of {images.shape[-2]} x "
                f"{images.shape[-1]} pixels; lower --patch_size"
            )
        self.largest = failed // 2
        self.compile_batch = min(self.compile_batch, self.largest)
        log.info("memory ran out: batches of %d from here on", self.largest)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _predict(self, images: Tensor, valid: Tensor | None) -> Tensor:
        count = len(images)
        if count < self.compile_batch:  # compiled for one shape
            missing = self.compile_batch - count
            images = torch.cat([images, images[-1:].repeat(missing, 1, 1, 1)])
            if valid is not None:
                valid = torch.cat([valid, valid[-1:].repeat(missing, 1, 1)])
        with torch.inference_mode():
            mean = own_entropy = 0.0
            scaled, rule = None, None
            for network, normalization, temperature in self.members:
                if normalization != rule:
                    scaled, rule = (
                        normalize(images, valid, normalization),
                        normalization,
                    )
                    scaled = scaled.contiguous(memory_format=torch.channels_last)
                probabilities = self._average_views(network, scaled, temperature)
                if self.expected_entropy:
                    own_entropy = own_entropy + entropy(probabilities, 1)
                mean = mean + probabilities if len(self.members) > 1 else probabilities
            number = len(self.members)
            mean = mean / number if number > 1 else mean
            if self.expected_entropy:
                mean = torch.cat([mean, (own_entropy / number)[:, None]], dim=1)
        return mean[:count]

    def _average_views(self, network, scaled: Tensor, temperature: float) -> Tensor:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        total = None
        for turns, mirrored in self.views:
            view = scaled.flip(-1) if mirrored else scaled
            view = view.rot90(turns, (-2, -1)) if turns else view
            view = view.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits = network(view)
            logits = (
                logits.float() if temperature == 1 else logits.float() / temperature
            )
            probabilities = class_probabilities(logits)
            probabilities = (
                probabilities.rot90(-turns, (-2, -1)) if turns else probabilities
            )
            probabilities = probabilities.flip(-1) if mirrored else probabilities
            total = probabilities if total is None else total + probabilities
        return total / len(self.views) if len(self.views) > 1 else total
