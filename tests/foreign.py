"""Models that nobody here wrote: their libraries, imported or skipped."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

_DEFINED = []


def _found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def library(name: str) -> ModuleType:
    """Import torchvision, timm, transformers or pytorch_lightning, or skip.

    Built for CUDA, torchvision cannot load its compiled operators beside a
    CPU-only torch, and then fails to say what shapes they give. No
    classifier needs them, so declaring them is enough. The others import it
    where it is installed.
    """
    if not _found(name):
        pytest.skip(f"{name} is not installed")
    if _found("torchvision"):
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            for part in list(sys.modules):
                if part.partition(".")[0] == "torchvision":
                    del sys.modules[part]
            declared = torch.library.Library("torchvision", "DEF")
            for op in "nms", "qnms":
                declared.define(
                    f"{op}(Tensor dets, Tensor scores, float iou) -> Tensor"
                )
            _DEFINED.append(declared)  # undeclared when it is collected
    return importlib.import_module(name)
