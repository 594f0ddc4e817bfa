"""How near the prediction of a scene comes to the bare forward pass, and what memory it takes.

    python tests/benchmarks/prediction.py

makes a scene of 10 bands by repeating the demo's, trains two small models for a minute, and maps
the scene in several ways, each in a process of its own: the bound (the plain eager float32 forward
pass over as many windows, with nothing read or written; the better of batch 1 and 4), the toolkit
in each precision, and a loop that holds the whole scene in memory, as it is often written. What
counts are the ratios. ``--host`` measures what the host does beside a GPU, ``--memory`` maps a
Sentinel-2 tile and one twice as high instead. A GPU is used when there is one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import Predict_large_image
from common.architectures import ModelConfig
from common.console import settings_from, show_messages
from common.distributed import ProcessGroup
from common.ground import pixel_areas
from common.machine import tune_malloc
from common.rasters import Source, gdal_options
from model_training import (
    build_model,
    dataset_normalization,
    load_checkpoint,
    normalize,
    save_checkpoint,
)
from prediction.ensemble import load_models
from prediction.jobs import prepare_scene
from prediction.mapfiles import MapWriter, map_profile, open_outputs
from prediction.reader import GDAL_CACHE, READ_AT_A_TIME, SceneReader, read_row_blocks
from prediction.rowstore import RowStore
from prediction.scene import map_scene
from prediction.settings import PredictionConfig
from prediction.statistics import Statistics
from prediction.tasks import list_tasks
from prediction.tiling import Extent, batch_groups, lay_windows

PATCH, OVERLAP, BANDS, CLASSES = 512, 128, 10, 6
MODELS = {
    "unet": ("unet", "resnet34"),
    "fast": ("pspnet", "timm-mobilenetv3_small_minimal_100"),
}
TILE = 10_980  # pixels along a side of a Sentinel-2 tile


# --- data -----------------------------------------------------------------------------------


def make_scene(folder: Path, height: int, width: int) -> Path:
    """A scene of repeated demo tiles, in blocks of 512 pixels, DEFLATE."""
    import rasterio
    from rasterio.windows import Window

    from examples.demo import synthesize_scene

    target = folder / f"scene_{height}_{width}.tif"
    if target.exists():
        return target
    small = synthesize_scene(folder / "small", size=1400, seed=1)
    with rasterio.open(small.image) as file:
        tile, profile = file.read(), file.profile
    profile |= {
        "height": height, "width": width, "tiled": True, "blockxsize": 512, "blockysize": 512,
        "compress": "deflate", "zlevel": 1, "predictor": 2, "interleave": "pixel",
        "bigtiff": "yes", "num_threads": "all_cpus",
    }  # fmt: skip
    part = target.with_suffix(".part.tif")
    with rasterio.open(part, "w", **profile) as file:
        wide = np.tile(tile, (1, 1, -(-width // 1400)))[..., :width]
        for top in range(0, height, 512):
            rows = (top + np.arange(min(512, height - top))) % 1400
            file.write(wide[:, rows], window=Window(0, top, width, len(rows)))
    part.rename(target)
    return target


def make_model(folder: Path, kind: str, device: str, steps: int = 400) -> Path:
    """A checkpoint trained for a minute, so that its classes are not a toss-up."""
    import rasterio
    import torch

    from examples.demo import synthesize_scene

    target = folder / f"{kind}.pth"
    if target.exists():
        return target
    small = synthesize_scene(folder / "small", size=1400, seed=1)
    with rasterio.open(small.image) as image, rasterio.open(small.label) as label:
        pixels, valid, truth = image.read(), image.dataset_mask() > 0, label.read(1)
    truth = np.where(valid & (truth < CLASSES), truth, 255).astype(np.int64)
    normalization = dataset_normalization([pixels[:, valid].T[::50]])
    torch.manual_seed(0)
    name, encoder = MODELS[kind]
    config = ModelConfig(name, BANDS, CLASSES, encoder)
    model = build_model(config).to(device)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        corners = rng.integers(0, 1400 - 128, (4, 2))
        cut = [(slice(r, r + 128), slice(c, c + 128)) for r, c in corners]
        images = [
            normalize(pixels[:, r, c], valid[r, c], normalization) for r, c in cut
        ]
        targets = torch.from_numpy(np.stack([truth[r, c] for r, c in cut]))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(torch.stack(images).to(device))
        loss = torch.nn.functional.cross_entropy(
            logits.float(), targets.to(device), ignore_index=255
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(target, model, config, normalization, {})
    return target


# --- cases, each in a process of its own ----------------------------------------------------


def memory(key: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024


def bound(model: Path, windows: int, device) -> dict:
    """The plain eager forward pass over windows that lie in memory."""
    import torch

    network = load_checkpoint(model, device).model
    best = None
    for batch in (1, 4):
        images = torch.rand(batch, BANDS, PATCH, PATCH, device=device)
        with torch.inference_mode():
            network(images)
            clock, cpu = time.perf_counter(), time.process_time()
            for _ in range(-(-windows // batch)):
                result = network(images)
            float(result.sum())  # waits for a GPU
        scale = windows / (-(-windows // batch) * batch)
        wall = (time.perf_counter() - clock) * scale
        measured = {"wall": wall, "cpu": (time.process_time() - cpu) * scale}
        if best is None or wall < best["wall"]:
            best = measured | {"batch": batch}
    return best


def toolkit(model: Path, scene: Path, output: Path, device, options: list[str]) -> dict:
    """The whole prediction of a scene, without the loading of the libraries and the model."""
    import rasterio

    parser = Predict_large_image.build_parser()
    files = ["--model", model, "--input", scene, "--output", output]
    window = "--patch_size", str(PATCH), "--overlap", str(OVERLAP)
    words = [*map(str, files), "--device", device, *window, *options]
    arguments = parser.parse_args(words)
    config = settings_from(PredictionConfig, arguments)
    show_messages()
    tune_malloc()
    (task,) = list_tasks(config)
    with rasterio.Env(**gdal_options(GDAL_CACHE)):
        models = load_models(config)
        warm_up(models.first.model, device)
        before = memory("VmRSS")
        clock, cpu = time.perf_counter(), time.process_time()
        report = map_scene(task, config, models, ProcessGroup())
        result = {
            "wall": time.perf_counter() - clock,
            "cpu": time.process_time() - cpu,
            "precision": report["run"]["precision"],
            "before": before,
            "peak": memory("VmHWM"),
        }
        if device.startswith("cuda"):
            result["gpu busy"] = gpu_busy(
                lambda: map_scene(task, config, models, ProcessGroup()),
                count_batches(report["run"]),
            )
    return result


def warm_up(network, device: str) -> None:
    """What is loaded at its first use: a library, and the kernels of a forward pass."""
    import tifffile  # noqa: F401
    import torch

    with torch.inference_mode():
        network(torch.zeros(1, BANDS, 64, 64, device=device))


def count_batches(run: dict) -> int:
    down, across = (lay_windows(side, PATCH, OVERLAP) for side in run["scene"]["shape"])
    row = batch_groups(across, run["batch_size"], 0, across.length)
    return len(down.starts) * len(row)


def gpu_busy(work, batches: int) -> float:
    """The share of the time after the first ten batches in which a GPU computes."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.zeros(1, device="cuda")  # the end
        torch.cuda.synchronize()
    times = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA and "Memcpy" not in event.name
    )
    times = times[len(times) * 10 // batches :]
    busy, until = 0.0, times[0][0]
    for start, end in times:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - times[0][0])


def whole_scene(model: Path, scene: Path, output: Path, device) -> dict:
    """Everything in memory, window by window, as it is often written."""
    import rasterio
    import torch

    checkpoint = load_checkpoint(model, device)
    low, high = (
        np.array(values, np.float32)[:, None, None]
        for values in (checkpoint.normalization.low, checkpoint.normalization.high)
    )
    before = memory("VmRSS")
    clock, cpu = time.perf_counter(), time.process_time()
    with rasterio.open(scene) as file:
        image, profile = file.read().astype(np.float32), file.profile
    image = np.clip((image - low) / (high - low), 0, 1)
    _, height, width = image.shape
    sums = np.zeros((CLASSES, height, width), np.float32)
    weights = np.zeros((height, width), np.float32)
    ramp = np.hanning(PATCH + 2)[1:-1].astype(np.float32)
    weight = np.outer(ramp, ramp)
    stride = PATCH - OVERLAP
    rows, columns = (
        [*range(0, side - PATCH, stride), side - PATCH] for side in (height, width)
    )
    for row in rows:
        for column in columns:
            part = (slice(row, row + PATCH), slice(column, column + PATCH))
            batch = (
                torch.from_numpy(image[(slice(None), *part)]).unsqueeze(0).to(device)
            )
            with torch.no_grad():
                result = torch.softmax(checkpoint.model(batch), dim=1)[0].cpu().numpy()
            sums[(slice(None), *part)] += result * weight
            weights[part] += weight
    classes = (sums / weights).argmax(axis=0).astype(np.uint8)
    profile.update(count=1, dtype="uint8", nodata=255, interleave="band")
    with rasterio.open(output, "w", **profile) as file:
        file.write(classes, 1)
    return {
        "wall": time.perf_counter() - clock,
        "cpu": time.process_time() - cpu,
        "before": before,
        "peak": memory("VmHWM"),
    }


def host_work(model: Path, scene: Path, output: Path) -> dict:
    """CPU milliseconds per megapixel of what the host does for a GPU: reading and writing.

    Bare: rows of blocks by one dataset, with GDAL's threads; the map by windows of whole blocks.
    Toolkit: the rows as they go to a GPU, finished rows stored, read again and written.
    """
    import rasterio
    import torch
    from rasterio.windows import Window

    config = PredictionConfig(
        model=[str(model)], input=[str(scene)], output=str(output), patch_size=PATCH
    )
    (task,) = list_tasks(config)
    cpu, found = time.process_time, {}
    tune_malloc()
    with rasterio.Env(**gdal_options(GDAL_CACHE)), rasterio.open(scene) as file:
        started, megapixels = cpu(), file.height * file.width / 1e6
        step, bands = file.block_shapes[0][0], list(range(1, BANDS + 1))
        pixels = np.empty((BANDS, step, file.width), file.dtypes[0])
        tops = range(0, file.height, step)
        for top in tops:
            part = Window(0, top, file.width, min(step, file.height - top))
            file.read(bands, window=part, out=pixels[:, : part.height])
        found["bare read"] = cpu() - started
        classes = np.random.default_rng(0).integers(
            0, CLASSES, (file.height // 8, file.width // 8)
        )
        classes = classes.astype(np.uint8).repeat(8, 0).repeat(8, 1)
        classes = np.pad(classes, [(0, file.height % 8), (0, file.width % 8)])
        job = prepare_scene(task, config, load_models(config), [file])
        job = replace(job, run={"precision": "fp32"})
        profile = map_profile(job, job.layers["classes"])
        started = cpu()
        with rasterio.open(output, "w", **profile) as target:
            for top in tops:
                part = classes[None, top : top + step]
                target.write(part, window=Window(0, top, file.width, part.shape[1]))
        found["bare write"] = cpu() - started
        started = cpu()
        reader = SceneReader(Source(file, bands), READ_AT_A_TIME["cuda"])
        with reader.opened:
            whole = Extent(0, file.height, 0, file.width)
            for _ in read_row_blocks(reader, torch.device("cpu"), whole):
                pass
        found["toolkit read"] = cpu() - started
        started, folder = cpu(), task.partial
        RowStore.begin(folder, {}, job.layers, file.shape)
        rows = RowStore(folder, job.layers, file.shape)
        statistics = Statistics(job.names, pixel_areas(file), classes.size)
        with rows.opened, open_outputs(job, folder) as outputs:
            maps = MapWriter(rows, outputs, statistics)
            for top in range(0, file.height, PATCH - OVERLAP):
                part = classes[None, top : top + PATCH - OVERLAP]
                counts = np.zeros(statistics.counts.shape, np.int64)
                place = Extent(top, top + part.shape[1], 0, file.width)
                rows.write(place, {"classes": part}, counts)
                maps.advance()
        RowStore.remove(folder)
        found["toolkit write"] = cpu() - started
    return {name: 1000 * seconds / megapixels for name, seconds in found.items()}


def compare_host(folder: Path, size: int, rounds: int = 5) -> None:
    scene = run_case(kind="data", output=str(folder), size=[size, size])
    model = run_case(kind="model", output=str(folder), name="fast", device="cpu")
    case = {
        "kind": "host",
        "model": model,
        "scene": scene,
        "output": str(folder / "map.tif"),
    }
    found = [run_case(**case) for _ in range(rounds)]
    middle = {name: float(np.median([row[name] for row in found])) for name in found[0]}
    for name, value in middle.items():
        print(f"{name:16}{value:8.1f} ms of CPU per megapixel")
    ratio = sum(middle[f"toolkit {what}"] for what in ("read", "write"))
    ratio /= sum(middle[f"bare {what}"] for what in ("read", "write"))
    print(f"{'toolkit / bare':16}{ratio:8.2f}")


# --- command line ---------------------------------------------------------------------------


def count_windows(height: int, width: int) -> int:
    down, across = (lay_windows(side, PATCH, OVERLAP) for side in (height, width))
    return len(down.starts) * len(across.starts)


def run_case(**case) -> dict:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def do_case(case: dict) -> None:
    paths = {
        key: Path(case[key]) for key in ("model", "scene", "output") if key in case
    }
    kind = case["kind"]
    if kind == "data":
        result = str(make_scene(paths["output"], *case["size"]))
    elif kind == "model":
        result = str(make_model(paths["output"], case["name"], case["device"]))
    elif kind == "bound":
        result = bound(paths["model"], case["windows"], case["device"])
    elif kind == "toolkit":
        result = toolkit(**paths, device=case["device"], options=case["options"])
    elif kind == "host":
        result = host_work(**paths)
    else:
        result = whole_scene(**paths, device=case["device"])
    print(json.dumps(result))


def print_row(size: int, limit: dict, title: str, row: dict) -> None:
    """A line of the table: seconds, and how many times those of the bound."""
    text = f"{title:34}"
    for key in ("wall", "cpu"):
        text += f"{row[key]:8.1f}{row[key] / limit[key]:9.2f}"
    text += f"{size * size / row['wall'] / 1e6:8.2f}"
    if "peak" in row:
        text += f"  peak {row['peak'] - row['before']:.0f} MB more"
    if "gpu busy" in row:
        text += f"  GPU busy {row['gpu busy']:.0%}"
    print(text, flush=True)


def compare_speed(folder: Path, size: int, device: str, kinds, compiled: bool) -> None:
    scene = run_case(kind="data", output=str(folder), size=[size, size])
    windows = count_windows(size, size)
    print(
        f"{size} x {size} pixels, {BANDS} bands, {windows} windows of {PATCH}, {device}"
    )
    for name in kinds:
        model = run_case(kind="model", output=str(folder), name=name, device=device)
        limit = run_case(kind="bound", model=model, windows=windows, device=device)
        print(f"\n{' with '.join(MODELS[name])}")
        print(
            f"{'':34}{'wall s':>8}{'x bound':>9}{'CPU s':>8}{'x bound':>9}{'Mpx/s':>8}"
        )

        print_row(size, limit, f"bound, batch {limit['batch']}", limit)
        common = {"model": model, "scene": scene, "device": device}
        common["output"] = str(folder / "map.tif")
        for precision in ("fp32", "auto"):
            options = ["--precision", precision]
            row = run_case(kind="toolkit", **common, options=options)
            print_row(size, limit, f"toolkit, {precision} ({row['precision']})", row)
            if compiled:
                options.append("--compile")
                row = run_case(kind="toolkit", **common, options=options)
                print_row(size, limit, f"toolkit, {precision}, compiled", row)
        print_row(
            size, limit, "whole scene in memory", run_case(kind="whole", **common)
        )


def compare_memory(folder: Path, device: str, kinds) -> None:
    print(f"{'':30}{'loaded MB':>11}{'peak MB':>9}{'more':>7}{'wall s':>8}")
    for name in kinds:
        model = run_case(kind="model", output=str(folder), name=name, device=device)
        for height in (TILE, 2 * TILE):
            scene = run_case(kind="data", output=str(folder), size=[height, TILE])
            for precision in ("fp32", "auto"):
                row = run_case(
                    kind="toolkit", model=model, scene=scene, device=device,
                    output=str(folder / "map.tif"),
                    options=["--precision", precision, "--save_confidence"],
                )  # fmt: skip
                title = f"{name} {height} x {TILE} {row['precision']}"
                more = row["peak"] - row["before"]
                print(
                    f"{title:30}{row['before']:11.0f}{row['peak']:9.0f}{more:7.0f}"
                    f"{row['wall']:8.0f}",
                    flush=True,
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmark_data"))
    parser.add_argument(
        "--size", type=int, help="side of the scene (default: 4096; with a GPU 10980)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--memory", action="store_true", help="two tiles, peak memory")
    parser.add_argument(
        "--host", action="store_true", help="what the host does for a GPU, CPU time"
    )
    parser.add_argument("--compile", action="store_true", help="compiled models too")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        do_case(json.loads(arguments.case))
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    device = arguments.device
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.host:
        compare_host(arguments.folder, arguments.size or 5490)
    elif arguments.memory:
        compare_memory(arguments.folder, device, arguments.models)
    else:
        compare_speed(
            arguments.folder,
            arguments.size or (TILE if device.startswith("cuda") else 4096),
            device,
            arguments.models,
            arguments.compile,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
