"""Fakes of published weights, made once; tests copy what they change."""
from __future__ import annotations

import pytest
from published_weights import PIXEL_STD, random_resnet


@pytest.fixture(scope="session")
def torchvision50():
    return random_resnet("resnet50", seed=1, tracked=True)


@pytest.fixture(scope="session")
def caffe50():
    return random_resnet("resnet50", seed=2, pixel_std=PIXEL_STD)


@pytest.fixture(scope="session")
def resnet18():
    return random_resnet("resnet18", seed=3)
