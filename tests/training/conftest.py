"""Datasets and trained runs that the tests of training share."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from helpers import (
    SENTINEL,
    pictures,
    train,
    write_dataset,
)
from training_helpers import KFOLD

from training import baseline


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def binary_data(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("binary"), 6, 3, 2, descriptions=SENTINEL
    )


@pytest.fixture(scope="session")
def multiclass_data(tmp_path_factory):
    """Three classes that are labelled, and a fourth that occurs nowhere."""
    return write_dataset(
        tmp_path_factory.mktemp("multiclass"),
        6,
        3,
        3,
        classes=3,
        nodata=0,
        invalid_rows=3,
        unlabelled_rows=4,
        tags={"CLASS_NAMES": json.dumps(["water", "forest", "town", "ice"])},
    )


@pytest.fixture(scope="session")
def binary_run(binary_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("binary_models") / "deep" / "folder"
    options = ("--epochs", 4, "--learning_rate", 0.01, "--seed", 3)
    with pictures(drawn=True):
        return train(binary_data, save_dir, *options)


@pytest.fixture(scope="session")
def multiclass_run(multiclass_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("multiclass_models")
    options = ("--mode", "multiclass", "--classes", 4, "--use_class_weights")
    more = ("--data_augmentation", "--epochs", 3)
    with pictures(drawn=True):
        return train(multiclass_data, save_dir, *options, *more)


@pytest.fixture(scope="session")
def binary_kfold(binary_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("binary_folds")
    return train(binary_data, save_dir, *KFOLD, "--epochs", 2)


@pytest.fixture(scope="session")
def multiclass_kfold(multiclass_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("multiclass_folds")
    options = ("--mode", "multiclass", "--classes", 4, "--epochs", 3)
    return train(multiclass_data, save_dir, *KFOLD, *options)


@pytest.fixture(params=["binary_run", "multiclass_run"])
def split_run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["binary_kfold", "multiclass_kfold"])
def kfold_run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("small"), 4, 2, 0, bands=4, unlabelled_rows=10
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), 8, 4, 0, bands=3)


@pytest.fixture
def small_forest(monkeypatch):
    """A forest of few trees beside the network, also where training takes seconds."""
    monkeypatch.setattr(baseline, "SIZES", (baseline.ForestSize(5, 2_000),))
    monkeypatch.setattr(baseline, "LEAST_SECONDS", 0)
    monkeypatch.setattr(baseline, "SHARE", 1e6)


@pytest.fixture
def one_of_one(monkeypatch):
    """The environment of a process that torchrun started alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
