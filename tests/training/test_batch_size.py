"""``--batch_size auto``: tried on a CPU that is taken for a GPU, whose memory is imitated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import (
    QUICK,
    Outcome,
    interrupt,
    patch_everywhere,
    run_main,
    same_weights,
    settings,
    train,
    write_dataset,
)

from common.distributed import ProcessGroup, init_distributed
from common.errors import OptionError, SegmentationError
from common.patches import list_pairs
from training import batch_size as batch_size_module
from training.batch_size import (
    former_batch_size,
    largest_batch,
    settle_batch_size,
    train_and_evaluate,
)
from training.run import TrainingRun, build
from training.samples import index_samples
from training.weights import build_initial_model

CPU, ALONE = torch.device("cpu"), ProcessGroup()
AUTO = ("--batch_size", "auto")
LINKNET = {"model": QUICK[1], "encoder_name": QUICK[3]}
KFOLD = ("--val_strategy", "kfold", "--n_splits", 2)


@pytest.fixture
def gpu_for(monkeypatch):
    """Take the CPU for a GPU with memory for so many patches; the sizes that were tried."""

    def imitate(patches: int) -> list[int]:
        tried: list[int] = []

        def limited(*arguments):
            model = build_initial_model(*arguments)

            def look(_, inputs):
                size = len(inputs[0])
                if size not in tried:
                    tried.append(size)
                if size > patches:
                    raise torch.OutOfMemoryError(
                        "CUDA out of memory. Tried to allocate"
                    )

            model.register_forward_pre_hook(look)
            return model

        patch_everywhere(monkeypatch, "training.batch_size.TRIED", ("cpu",))
        patch_everywhere(monkeypatch, "training.weights.build_initial_model", limited)
        return tried

    return imitate


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = write_dataset(tmp_path_factory.mktemp("tiny"), 8, 1, 0, bands=3, size=8)
    return index_samples(list_pairs(root, "train"), 2, 255)


def small(**changes):
    """Settings whose model is quick to build, and trains on single patches."""
    given = {"model": "pixel", "batch_size": "auto"}
    return settings(**given | changes)


def settled(index, group=ALONE, fewest=None, **changes) -> int | str:
    fewest = len(index.pairs) if fewest is None else fewest
    return settle_batch_size(
        small(**changes), index, fewest, CPU, group
    ).batch_size  # fmt: skip


# --- the size that is found -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "most", "found", "tried"),
    [
        (40, 64, 32, [2, 4, 8, 16, 32, 64]),
        (10**9, 64, 64, [2, 4, 8, 16, 32, 64]),
        (10**9, 26, 16, [2, 4, 8, 16]),
        (1, 64, 1, [2, 1]),
        (0, 64, 0, [2, 1]),
        (10**9, 1, 1, [1]),
        (0, 1, 0, [1]),
    ],
)
def test_a_batch_is_doubled_as_long_as_it_fits(memory, most, found, tried):
    asked = []
    assert largest_batch(lambda n: asked.append(n) or n <= memory, most) == found
    assert asked == tried


@pytest.mark.parametrize(
    ("memory", "fewest", "processes", "found"),
    [(5, 8, 1, 4), (99, 8, 1, 8), (99, 7, 1, 4), (99, 8, 4, 2), (1, 8, 1, 1)],
    ids=["memory", "patches", "patches of a fold", "patches of processes", "one patch"],
)
def test_the_largest_batch_that_the_memory_and_the_patches_allow_is_taken(
    index, gpu_for, memory, fewest, processes, found
):
    gpu_for(memory)
    group = ProcessGroup(0, processes)
    assert settled(index, group, fewest) == found


@pytest.mark.slow
def test_a_model_that_cannot_train_on_one_patch_needs_memory_for_two(index, gpu_for):
    gpu_for(1)
    with pytest.raises(SegmentationError, match="too small for any batch"):
        settled(index, **LINKNET)
    gpu_for(2)
    assert settled(index, **LINKNET) == 2
    with pytest.raises(SegmentationError, match="at least 2 training patches"):
        settled(index.subset([0]), **LINKNET)


def test_errors_that_are_not_of_memory_are_not_taken_for_it(index, monkeypatch):
    patch_everywhere(monkeypatch, "training.batch_size.TRIED", ("cpu",))
    broken = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    interrupt(monkeypatch, "training.loop.train_one_epoch", 3, broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        settled(index)


def test_a_model_too_large_for_the_memory_is_told(index, gpu_for, monkeypatch):
    gpu_for(99)
    full = torch.OutOfMemoryError("CUDA out of memory")
    interrupt(monkeypatch, "training.weights.build_initial_model", 1, full)
    with pytest.raises(SegmentationError, match="smaller --model or --encoder_name"):
        settled(index)


@pytest.mark.parametrize("patches", [3, 8])
def test_without_a_gpu_batches_of_four_are_taken_and_none_is_tried(
    index, monkeypatch, caplog, patches
):
    refused = interrupt(monkeypatch, "training.run.build", 1)
    with caplog.at_level("INFO", "semanticseg4eo"):
        assert settled(index.subset(range(patches))) == 4
    assert not refused
    assert caplog.messages == [
        "--batch_size auto: 4 patches, larger batches are tried on cuda alone"
    ]


def test_a_number_is_taken_as_it_is(index, gpu_for):
    tried = gpu_for(1)
    assert settled(index, batch_size=64) == 64 and not tried


@pytest.mark.parametrize("wrong", ["", "all", "8", 2.0, None])
def test_batches_of_no_number_are_refused(wrong):
    with pytest.raises(OptionError, match="--batch_size .*: expected a whole number"):
        settings(batch_size=wrong)


def test_processes_take_the_least_size_of_all(index, gpu_for, monkeypatch):
    gpu_for(99)
    monkeypatch.setattr(ProcessGroup, "least", lambda self, value: min(value, 2))
    assert settled(index) == 2


def test_the_least_of_one_process_is_its_own(one_of_one):
    assert ALONE.least(8) == 8
    with init_distributed() as group:
        assert group.store and group.least(8) == 8


# --- what the trial does and leaves ---------------------------------------------------------


def test_a_size_is_tried_by_steps_forwards_backwards_and_an_evaluation(
    index, monkeypatch
):
    config = small(batch_size=8, accumulate=3)
    run = TrainingRun(config, index, None, None, [], 1, CPU)
    build(run)
    seen = []
    run.model.register_forward_pre_hook(
        lambda model, inputs: seen.append((len(inputs[0]), model.training))
    )
    stepped = interrupt(monkeypatch, "training.loop.Stepper.step", -1)
    before = [p.detach().clone() for p in run.model.parameters()]
    train_and_evaluate(run, 4, spare=10)
    assert seen == [(4, True)] * 4 + [(4, False)]
    assert len(stepped) == 2  # the second has the optimizer's state from the start
    after = list(run.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after))


def test_a_trial_leaves_the_random_numbers_as_they_were(index, gpu_for):
    gpu_for(5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert settled(index, seed=5) == 4
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_a_run_with_auto_is_the_run_with_the_number_that_it_finds(
    data, tmp_path, gpu_for
):
    """To the last bit, and so do its files say: they make it again."""
    tried = gpu_for(3)
    options = ("--scheduler", "onecycle", "--epochs", 2, "--data_augmentation")
    found = train(data, tmp_path / "auto", *options, *AUTO)
    assert tried == [2, 4]
    told = train(data, tmp_path / "two", *options, "--batch_size", 2)
    for name in ("last", "best_loss", "final_model"):
        assert same_weights(found.checkpoint(name), told.checkpoint(name))
        assert found.metadata(name)["training_params"]["batch_size"] == 2
    assert found.report["settings"]["batch_size"] == 2
    assert "--batch_size=2 " in found.report["command"] + " "
    assert (
        found.report["history"][0]["train_loss"]
        == (told.report["history"][0]["train_loss"])
    )
    assert "--batch_size auto: 2 patches, the memory does not hold 4" in found.err


@pytest.mark.slow
def test_a_check_tells_the_size_and_leaves_nothing(data, tmp_path, gpu_for):
    gpu_for(5)
    words = ("--dataset_root", data, "--save_dir", tmp_path / "out", *QUICK, *AUTO)
    status, told, err = run_main(*words, "--check")
    assert status == 0, err
    assert "a batch       4 patches" in told.splitlines()
    assert not (tmp_path / "out").exists()
    gpu_for(0)
    status, told, err = run_main(*words, "--check")
    assert status == 1 and told == ""
    assert err.splitlines()[-1].startswith("error: The memory of cpu is too small for")


# --- runs that continue ---------------------------------------------------------------------


def refuse_trials(monkeypatch) -> list:
    return interrupt(monkeypatch, "training.batch_size.try_batches", 1, AssertionError)


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_size_and_tries_none(
    data, tmp_path, gpu_for, monkeypatch
):
    tried = gpu_for(3)
    options = ("--epochs", 3, "--scheduler", "none", *AUTO)
    whole = train(data, tmp_path / "whole", *options, "--resume")
    assert "no run to resume" in whole.err and tried == [2, 4]
    train(data, tmp_path / "parts", *options, "--epochs", 2)
    tried = refuse_trials(monkeypatch)
    done = train(data, tmp_path / "parts", *options, "--resume")
    assert not tried and "--batch_size auto: 2 patches, as before" in done.err
    assert "resuming after epoch 2 of 3" in done.err
    assert same_weights(done.checkpoint("last"), whole.checkpoint("last"))
    assert done.report["settings"]["batch_size"] == 2


@pytest.mark.slow
def test_folds_have_one_size_found_once(data, tmp_path, gpu_for, monkeypatch):
    """12 patches in two folds, whose models train on fewer than eight."""
    gpu_for(99)
    trials, plain = [], batch_size_module.try_batches

    def noted(*arguments):
        trials.append(plain(*arguments))
        return trials[-1]

    patch_everywhere(monkeypatch, "training.batch_size.try_batches", noted)
    done = train(data, tmp_path, *KFOLD, *AUTO)
    size = done.report["settings"]["batch_size"]
    assert trials == [size] == [4]
    for place in ("fold_1", "fold_2", "."):
        fold = Outcome(0, tmp_path / place, "", "")
        assert fold.metadata()["training_params"]["batch_size"] == size
    # the first fold alone tells it
    (tmp_path / "model_last.pth").unlink()
    again = train(data, tmp_path, *KFOLD, *AUTO, "--resume")
    assert len(trials) == 1 and same_weights(again.checkpoint(), done.checkpoint())


@pytest.mark.slow
def test_folds_trained_alone_take_the_size_of_the_first(
    data, tmp_path, gpu_for, monkeypatch
):
    options = ("--dataset_root", data, "--save_dir", tmp_path, *QUICK, *KFOLD, *AUTO)
    options += ("--scheduler", "none")  # so that a run may end at other epochs
    gpu_for(3)
    assert run_main(*options, "--only_fold", 2)[0] == 0
    gpu_for(99)
    config = small(
        **LINKNET, dataset_root=str(data), save_dir=str(tmp_path),
        val_strategy="kfold", n_splits=2, epochs=1, only_fold=1, scheduler="none",
        encoder_depth=5,
    )  # fmt: skip
    assert former_batch_size(config) == 2
    # of another run
    assert former_batch_size(replace(config, learning_rate=0.5)) is None
    tried = refuse_trials(monkeypatch)
    status, _, err = run_main(*options, "--only_fold", 1)
    assert status == 0 and "--batch_size auto: 2 patches, as before" in err
    # the fold itself again, by its fellow
    assert former_batch_size(replace(config, only_fold=2, overwrite=True)) == 2
    status, told, err = run_main(*options, "--check")
    assert status == 0 and "a batch       2 patches" in told
    status, _, err = run_main(*options)
    assert status == 0 and "gathering what --only_fold has trained" in err
    report = json.loads((tmp_path / "model_metrics.json").read_text())
    assert not tried and report["settings"]["batch_size"] == 2
    assert report["settings"]["resume"] is False
