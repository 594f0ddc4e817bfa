"""The labels of a run's patches, looked at by its models: ``model_patches.gpkg`` and its picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from common.distributed import ProcessGroup
from common.vectors import has_vector_library
from evaluation.audit import (
    PatchRow,
    draw_doubtful,
    in_order,
    write_contradictions,
    write_patches,
)
from evaluation.doubt import DoubtCollector
from training.folds import Fold
from training.loop import evaluate
from training.run import TrainingRun
from training.samples import SampleIndex

log = logging.getLogger("semanticseg4eo")

LEFT_OUT = "no model_patches.gpkg is written"


def audit_split(run: TrainingRun, test: SampleIndex | None) -> None:
    """Write the patches of a run with a split; validation and test were not trained on."""
    if not has_vector_library(LEFT_OUT):
        return
    rows, unseen = [], []
    for split, index in (
        ("train", run.train),
        ("validation", run.validation),
        ("test", test),
    ):
        if index is None:
            continue
        collector = collect(run, index)
        trained_on = split == "train"
        unseen += [] if trained_on else [collector]
        rows += [
            PatchRow(pair, split, record, None if trained_on else record)
            for pair, record in zip(index.pairs, collector.records)
        ]
    write_audit(run, rows, unseen)


def audit_folds(
    run: TrainingRun,
    folds: Sequence[Fold],
    held_out: Sequence[DoubtCollector],
    test: SampleIndex | None,
) -> None:
    """Write the patches of a cross-validation; a fold's model did not train on what it holds out.

    Args:
        run: The final model, which trained on all of the folds' patches.
        folds: Of the same patches.
        held_out: What the model of each fold finds in the patches that it holds out.
        test: Patches of the test split.
    """
    if not has_vector_library(LEFT_OUT):
        return
    by_number = {}
    for number, (fold, collector) in enumerate(zip(folds, held_out), start=1):
        found = zip(fold.held_out.tolist(), collector.records)
        by_number |= {index: (number, record) for index, record in found}
    finals = collect(run, run.train).records
    rows = [
        PatchRow(pair, pair.image.parent.parent.name, record, unseen, fold)
        for i, (pair, record) in enumerate(zip(run.train.pairs, finals))
        for fold, unseen in [by_number[i]]
    ]
    collectors = list(held_out)
    if test:
        collectors.append(collect(run, test))
        found = zip(test.pairs, collectors[-1].records)
        rows += [PatchRow(pair, "test", record, record) for pair, record in found]
    write_audit(run, rows, collectors)
    if run.config.label_audit:
        found = [one for collector in held_out for one in collector.found]
        target = run.save_dir / "model_label_audit.gpkg"
        write_contradictions(target, found, run.names, run.colours)
        log.info("%s: %d areas that contradict their label", target, len(found))


def collect(run: TrainingRun, index: SampleIndex) -> DoubtCollector:
    """What a run's model finds in some patches; by this process alone."""
    classes = run.model_config.label_classes
    collector = DoubtCollector(index.pairs, classes, run.temperature or 1.0)
    loader = run.loader(index, group=ProcessGroup())
    evaluate(run.model, loader, run.loss, run.device, classes, collector)
    return collector


def write_audit(
    run: TrainingRun, rows: Sequence[PatchRow], unseen: Sequence[DoubtCollector]
) -> None:
    """Write ``model_patches.gpkg`` and its picture."""
    target = run.save_dir / "model_patches.gpkg"
    write_patches(target, rows, run.names, run.config.mode == "binary")
    ignored = run.config.ignore_index
    picture = run.save_dir / "model_patches.png"
    draw_doubtful(picture, unseen, run.names, run.colours, ignored)
    first = in_order(rows)[0]
    if first.doubt is not None:
        log.info("%s: labels to look at first, as %s", target, first.pair.name)
