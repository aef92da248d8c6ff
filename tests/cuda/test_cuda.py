"""The matrix on a GPU, and its agreement with the CPU. Skipped, visibly, where torch sees none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import small
import torch
from conftest import TOY
from helpers import TinyNet, make_context, make_images
from safetensors.torch import load_file
from torch.nn import functional as F

from backdoorbench_mcl import evaluate, kit, runner
from backdoorbench_mcl.api import Context, Recipe
from backdoorbench_mcl.describe import construct
from backdoorbench_mcl.engines.local import Finished, Local
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.plan import Node, build
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device here: nothing of tests/cuda was run", allow_module_level=True)

assert TOY.is_dir()
