"""What a process does before it computes in bfloat16 on a CPU."""

import os
from functools import cache

import torch

from keel.terminal import print_line
from keel.world import is_main_process

PRODUCTS_KEPT = "32"
"""Number of compiled products that oneDNN keeps, and torch for it: one for each shape. Batches of responses have a new
shape in each step, and the default of 1,024 lets a run of a tiny model grow by a gigabyte (docs/performance.md)."""


@cache
def prepare_bfloat16() -> None:
    """Limit the memory of oneDNN, and report if bfloat16 takes many times as long as float32 on this processor."""
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # read before the first product
        os.environ.setdefault(variable, PRODUCTS_KEPT)
    # The operator is missing where torch is built without oneDNN.
    if torch.cuda.is_available() or not is_main_process() or not torch.backends.mkldnn.is_available():
        return
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print_line(
            "bfloat16 may take ten times as long as float32 or more: this processor has no instructions for it "
            "-> use float32"
        )
