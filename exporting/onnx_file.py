"""One ONNX file of a module, compared with it.

``onnx``, ``onnxscript`` and ``onnxruntime`` are installed only where somebody exports; they are imported
within the functions that need them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from common.devices import memory_ran_out
from common.errors import SegmentationError

if TYPE_CHECKING:
    import onnx

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "image", "probabilities"
IR_VERSION = 8  # the newest that onnxruntime 1.12 reads
OPSET, OLDER_OPSET = 18, 17  # the exporter's; what onnxruntime 1.12 reads
LARGEST = (
    2**31 - 2**20
)  # bytes of one file of protocol buffers, some of them for the graph
ACCURACY = 1e-4  # of a probability
BATCH = 3  # images that a file is tried on


def require_libraries() -> None:
    """Raise SegmentationError unless the libraries of an export are installed."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise SegmentationError(
            f"An export needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )


def write_onnx(
    target: Path, graph: nn.Module, shape: tuple[int, int, int], images: Tensor,
    metadata: dict[str, str],
) -> None:  # fmt: skip
    """Write a module from images to probabilities as one ONNX file.

    Args:
        target: The file, under the name that it has until it is found good.
        graph: From (N, C, S, S) float32 to (N, K, S, S).
        shape: (C, S, S) of an image.
        images: (N, C, S, S) that the file is tried on.
        metadata: Texts by key, for its ``metadata_props``.

    Raises:
        SegmentationError: The network has no form in ONNX, is too large for one file, or the file
            gives other probabilities than the module.
    """
    weights = sum(p.numel() * p.element_size() for p in graph.state_dict().values())
    if weights > LARGEST:
        raise SegmentationError(
            f"{target}: the weights take {weights / 1e9:.1f} GB, and one ONNX file holds 2 GB; export "
            "fewer models"
        )
    with _scarce_memory(target):
        model = make_model(graph, shape)
        model.metadata_props.extend(_entries(metadata))
        target.write_bytes(model.SerializeToString())
        difference = largest_difference(target, graph, images)
    if not difference <= ACCURACY:  # it may be NaN
        raise SegmentationError(
            f"{target}: onnxruntime's probabilities differ from PyTorch's by {difference:.2g}; this "
            "network cannot be exported"
        )


def _entries(metadata: dict[str, str]) -> list:
    from onnx import StringStringEntryProto

    return [StringStringEntryProto(key=k, value=v) for k, v in metadata.items()]


@contextlib.contextmanager
def _scarce_memory(target: Path) -> Iterator[None]:
    """Say which option takes the memory where it runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory_ran_out(error):
            raise
        raise SegmentationError(
            f"{target}: the memory is too small for images of this size; lower --patch_size"
        ) from error


def make_model(graph: nn.Module, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """A module as a checked model in ONNX, of any batch size, with its weights inside.

    Raises:
        SegmentationError: The network has no form in ONNX.
    """
    import onnx

    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        with quiet(), torch.inference_mode(False):
            program = torch.onnx.export(
                graph,
                (torch.zeros(2, *shape),),  # of one image the size would be fixed
                dynamo=True,
                external_data=False,
                dynamic_shapes=(batch,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise SegmentationError(
            f"This network cannot be written as ONNX: {_first_line(error.__cause__ or error)}"
        ) from error
    model = program.model_proto
    strip_notes(model)
    model.ir_version = IR_VERSION
    model = to_older_opset(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter prints, logs and warns of, which is for those who write networks."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def strip_notes(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes at nodes and values: paths of this machine, names of modules.

    The versions of ONNX that we write have no place for it either.
    """
    graph = model.graph
    for part in (
        model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info,
        *graph.initializer, *model.functions,
    ):  # fmt: skip
        for field in ("metadata_props", "doc_string"):
            part.ClearField(field)


def to_older_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the operator set that older runtimes read, where it can be written in it."""
    import onnx
    from onnx import version_converter

    older = onnx.ModelProto.FromString(model.SerializeToString())
    for node in older.graph.node:
        # the converter leaves it in place, and the older reductions do not have it
        kept = [
            a for a in node.attribute if a.name != "noop_with_empty_axes" or a.i != 0
        ]
        del node.attribute[:]
        node.attribute.extend(kept)
    try:
        older = version_converter.convert_version(older, OLDER_OPSET)
        onnx.checker.check_model(older, full_check=True)
    except (
        RuntimeError, version_converter.ConvertError, onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ):  # fmt: skip
        return model  # an operator or attribute that is new in the set of the exporter
    return older


def largest_difference(file: Path, graph: nn.Module, images: Tensor) -> float:
    """How far the probabilities of a file are from those of its module, on the CPU."""
    try:
        (found,) = open_session(file).run([OUTPUT], {INPUT: images.numpy()})
    except Exception as error:  # those of onnxruntime have no class of their own
        if memory_ran_out(error):
            raise MemoryError(str(error)) from error
        raise SegmentationError(
            f"{file}: onnxruntime cannot run this network: {_first_line(error)}"
        ) from error
    with torch.inference_mode():
        expected = graph(images).numpy()
    return float(np.abs(found - expected).max())


def open_session(file: Path):
    """A file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"]
    )
