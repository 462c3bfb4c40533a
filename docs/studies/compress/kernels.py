"""What one linear map costs in each form, next to torchao's where it is installed: CPU time, relative to float32.

OMP_NUM_THREADS=1 python docs/studies/compress/kernels.py 2048x512 2048x2048
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmkit_plugins.compression.dynamic_int8 import DynamicMatrix
from llmkit_plugins.compression.int4 import Int4Matrix
from llmkit_plugins.compression.int8 import Int8Matrix

Run = Callable[[Tensor], Tensor]
ROWS, ROUNDS, WORK = (1, 8, 128), 6, 1e8
HALF = torch.bfloat16


def packed(form: Any, weight: Tensor) -> Run:
    """Return the product with a packed matrix."""
    form.take(weight)
    return lambda x: form.linear(x.to(weight.dtype), None)


def theirs(plain: nn.Linear, dtype: torch.dtype, config: Any) -> Run:
    """Return the map as torchao makes it."""
    from torchao.quantization import quantize_

    model = nn.Sequential(copy.deepcopy(plain).to(dtype))
    quantize_(model, config)
    return lambda x: model(x.to(dtype))


def runs(outputs: int, inputs: int) -> dict[str, Run]:
    """Return each form by its name."""
    plain = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    weight = plain.weight.detach()
    half = copy.deepcopy(plain).to(HALF)
    found: dict[str, Run] = {
        "float32": plain,
        "bf16": lambda x: half(x.to(HALF)),
        "int8": packed(Int8Matrix(weight), weight),
        "int4": packed(Int4Matrix(weight, 32), weight),
        "dynamic_int8": packed(DynamicMatrix(weight), weight),
        "int8+bf16": packed(Int8Matrix(weight.to(HALF)), weight.to(HALF)),
        "int4+bf16": packed(Int4Matrix(weight.to(HALF), 32), weight.to(HALF)),
    }
    if find_spec("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        for dtype in (torch.float32, HALF):
            name = str(dtype).removeprefix("torch.")
            found[f"torchao int8, {name}"] = theirs(plain, dtype, Int8WeightOnlyConfig(version=2))
            found[f"torchao dynamic int8, {name}"] = theirs(
                plain, dtype, Int8DynamicActivationInt8WeightConfig(version=2)
            )
    return found


@torch.no_grad()
def main() -> None:
    """Print a table for each size: outputs x inputs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for size in sys.argv[1:]:
        outputs, inputs = map(int, size.split("x"))
        forms = runs(outputs, inputs)
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            repeats = max(3, min(200, round(WORK / x.numel() / outputs)))
            spent: dict[str, list[float]] = {name: [] for name in forms}
            for _ in range(ROUNDS):
                for name, run in forms.items():
                    run(x)
                    start = time.process_time()
                    for _ in range(repeats):
                        run(x)
                    spent[name].append((time.process_time() - start) / repeats)
            whole = np.median(spent["float32"])
            for name, times in spent.items():
                print(f"{size}; {rows} rows; {name}; {1e6 * np.median(times):.0f} us; {np.median(times) / whole:.2f}")


if __name__ == "__main__":
    main()
