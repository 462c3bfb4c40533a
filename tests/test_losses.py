"""The chunked loss against torch's own cross-entropy on whole scores: the plain way, and Triton's kernel.

Where there is no GPU, the kernel runs in Triton's interpreter, and is compiled for a card that is not there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkit.commands.inspect import Virtual
from llmkit.contracts import IGNORE, Loss
from llmkit.ops import losses
from llmkit.ops.backend import backend, runs_triton

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (there is none but for Linux)")
WAYS = ["plain", "padded", pytest.param("triton", marks=needs_triton)]
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows: int, dim: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, dim, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator)
    return hidden, weight, targets


@contextlib.contextmanager
def taking(way: str, chunk: int = 2**22) -> Iterator[str]:
    """Compute losses in a way, with at most about ``chunk`` scores at once; gives the device to do it on.

    ``padded`` is the plain way with the columns of the scores padded, as on a GPU without Triton.
    """
    with contextlib.ExitStack() as stack:
        for name, value in {"CHUNK_ELEMENTS": chunk, "CHUNK_ELSEWHERE": chunk, "CHUNK_BYTES": 8 * chunk}.items():
            stack.enter_context(mock.patch.object(losses, name, value))
        if way != "plain":
            stack.enter_context(mock.patch.object(losses, "MULTIPLE", {}))
        if way == "triton":
            stack.enter_context(mock.patch.object(losses, "backend", lambda *_, **__: "triton"))
            kernels = importlib.import_module("llmkit.ops.kernels")
            stack.enter_context(mock.patch.object(kernels, "BLOCK", 64))  # rows of several blocks
        yield KERNEL_DEVICE if way == "triton" else "cpu"


def outcome(function: Any, way: str, chunk: int, values: tuple[Tensor, ...], smoothing: float) -> tuple[Loss, Any]:
    """A loss computed in a way, and the gradients of three times its sum, on the CPU."""
    with taking(way, chunk) as device:
        hidden, weight, targets = (value.detach().to(device) for value in values)
        hidden.requires_grad_(), weight.requires_grad_()
        loss = function(hidden, weight, targets, smoothing)
        (loss.total * 3).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype
    return Loss(loss.total.cpu(), loss.count.cpu()), (hidden.grad.cpu(), weight.grad.cpu())


@pytest.mark.parametrize("way", WAYS)
def test_a_bias_is_added_to_the_scores(way: str) -> None:
    (hidden, weight, targets), bias = inputs(23, 6, 11, torch.float32), torch.randn(11, requires_grad=True)
    targets[:5] = IGNORE
    (losses.plain_linear_cross_entropy(hidden, weight, targets, 0.1, bias).total * 3).backward()
    with taking(way, 40) as device:
        values = [value.detach().to(device).requires_grad_() for value in (hidden, weight, bias)]
        loss = losses.linear_cross_entropy(values[0], values[1], targets.to(device), 0.1, values[2])
        (loss.total * 3).backward()
    for value, expected in zip(values, (hidden, weight, bias), strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad.cpu(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 40, 10**6])
@pytest.mark.parametrize("ignored", [0, 5])
def test_equals_torch_value_and_gradient(smoothing: float, chunk: int, ignored: int) -> None:
    hidden, weight, targets = inputs(23, 6, 11)
    targets[:ignored] = IGNORE
    expected = F.cross_entropy(
        hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    (expected * 3).backward()
    for way in ("plain", "padded"):
        loss, grads = outcome(losses.linear_cross_entropy, way, chunk, (hidden, weight, targets), smoothing)
        assert int(loss.count) == 23 - ignored
        torch.testing.assert_close(loss.total, expected)
        torch.testing.assert_close(grads, (hidden.grad, weight.grad))


class Products(TorchDispatchMode):
    """Records the shapes of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            self.shapes.add(tuple(x.shape for x in args))
        return func(*args, **(kwargs or {}))


def test_products_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of targets: oneDNN keeps kernels for each shape, and memory would grow with every batch."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 11 * 150)
    with Products() as products:
        for ignored in range(1, 150, 7):
            hidden, weight, targets = inputs(300, 6, 11)
            targets[:ignored] = IGNORE
            losses.linear_cross_entropy(hidden, weight, targets).total.backward()
    rows = {n for shapes in products.shapes for shape in shapes for n in shape} - {6, 11}
    assert rows == {64, 128}


@pytest.mark.parametrize("way", WAYS)
def test_all_ignored_is_zero(way: str) -> None:
    hidden, weight, targets = inputs(4, 3, 5, torch.float32)
    nothing = torch.full_like(targets, IGNORE)
    loss, grads = outcome(losses.linear_cross_entropy, way, 5, (hidden, weight, nothing), 0.1)
    assert loss.total == 0 and loss.count == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_autocast_is_close_to_fp32(way: str) -> None:
    hidden, weight, targets = inputs(16, 32, 100, torch.float32)
    exact = losses.linear_cross_entropy(hidden, weight, targets).total
    with taking(way) as device:
        hidden, weight, targets = hidden.detach().to(device), weight.detach().to(device), targets.to(device)
        weight.requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            low = losses.linear_cross_entropy(hidden, weight, targets).total
        low.backward()
    assert low.dtype == torch.float32 and weight.grad is not None and weight.grad.dtype == torch.float32
    torch.testing.assert_close(low.cpu(), exact, rtol=2e-2, atol=0)


@settings(deadline=None)
@given(
    way=st.sampled_from(["plain", "padded", *["triton"] * HAS_TRITON]),
    rows=st.integers(1, 9),
    dim=st.integers(1, 9),
    vocab=st.integers(2, 80),
    ignored=st.integers(0, 9),
    chunk=st.integers(1, 1000),
    smoothing=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_agrees_with_its_plain_definition(
    way: str, rows: int, dim: int, vocab: int, ignored: int, chunk: int, smoothing: float, dtype: torch.dtype
) -> None:
    hidden, weight, targets = inputs(rows, dim, vocab, dtype)
    targets[:ignored] = IGNORE
    loss, grads = outcome(losses.linear_cross_entropy, way, chunk, (hidden, weight, targets), smoothing)
    exact = (hidden.float(), weight.float(), targets)
    expected, exact_grads = outcome(losses.plain_linear_cross_entropy, "plain", chunk, exact, smoothing)
    assert loss.count == expected.count == max(0, rows - ignored)
    assert loss.total.dtype == torch.float32
    # In half precision scores and gradients are rounded.
    rtol, atol = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (4e-2, 0.3), torch.float16: (5e-3, 4e-2)}[dtype]
    torch.testing.assert_close(loss.total, expected.total, rtol=rtol, atol=atol)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.float(), exact_grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_scaled_after_the_fact_and_overflow_shows(way: str) -> None:
    """The factor of a gradient scaler comes with the backward pass; scores beyond fp16 make loss and gradient NaN."""
    with taking(way) as device:
        hidden, weight, targets = (value.detach().to(device) for value in inputs(6, 4, 9, torch.float32))
        results = []
        for scale, size in ((1.0, 1.0), (1024.0, 1.0), (1.0, 1e5)):
            h, w = (hidden * size).requires_grad_(), weight.clone().requires_grad_()
            with torch.autocast(device, dtype=torch.float16):
                total = losses.linear_cross_entropy(h, w, targets).total
            (total * scale).backward()
            assert h.grad is not None and w.grad is not None
            results.append((total, h.grad / scale, w.grad / scale))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert not any(bool(value.isfinite().all()) for value in results[2])


@pytest.mark.parametrize("way", WAYS)
def test_without_a_gradient(way: str) -> None:
    values = inputs(9, 4, 70, torch.float32)
    exact = losses.plain_linear_cross_entropy(*values).total
    with taking(way, 200) as device, torch.no_grad():
        hidden, weight, targets = (value.to(device) for value in values)
        total = losses.linear_cross_entropy(hidden, weight, targets).total
    torch.testing.assert_close(total.cpu(), exact)


@needs_triton
def test_the_kernel_makes_an_impossible_target_nan() -> None:
    kernels = importlib.import_module("llmkit.ops.kernels")
    scores, targets = torch.zeros(4, 64), torch.tensor([0, 11, -1, IGNORE])
    found = kernels.cross_entropy_(scores.to(KERNEL_DEVICE), targets.to(KERNEL_DEVICE), 11, 0.0, gradient=True)
    assert found.isnan().tolist() == [False, True, True, False]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from llmkit.ops.kernels import _cross_entropy
types = dict(scores="*bf16", targets="*i64", losses="*fp32", vocab="i32", width="i32", smoothing="fp32")
constants = dict(IGNORED=-100, SMOOTH=True, GRADIENT=True, BLOCK=4096)
by_16 = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 2, 4)}
source = ASTSource(_cross_entropy, types | dict.fromkeys(constants, "constexpr"), constants, by_16)
code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
assert "ld.global.v4" in code and "st.global.v4" in code, code
"""


@needs_triton
def test_the_kernel_compiles_for_a_card_that_is_not_here(tmp_path: Any) -> None:
    """The interpreter accepts what the compiler refuses. Reads and writes are of 16 bytes at any vocabulary."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    with mock.patch.dict("os.environ", environment):
        done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_triton_a_gpu_takes_the_plain_way_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu = mock.Mock(spec=Tensor, device=torch.device("cuda:7"), dtype=torch.bfloat16)
    with mock.patch.dict(sys.modules, {"triton": None, "llmkit.ops.kernels": None}):
        assert backend(on_gpu, triton=True) == backend(on_gpu, triton=True) == backend(on_gpu) == "plain"
    runs_triton.cache_clear()
    assert capsys.readouterr().err.count("note: Triton does not run on cuda:7") == 1


class Passes(TorchDispatchMode):
    """Counts reads and writes of tensors with at least ``size`` elements; views and empty ones cost none."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.count += sum(tensor.numel() >= self.size for tensor in tensors)
        return result


def test_passes_over_the_scores() -> None:
    """The products write the scores once and read their gradient twice; the kernel between them, two reads and a write.

    The plain step between them makes 12 in bfloat16.
    """
    hidden, weight, targets = inputs(32, 4, 64, torch.bfloat16)
    counts = []
    for step in (losses.plain_cross_entropy_, lambda scores, *_: scores[:, 0].float()):
        with mock.patch.object(losses, "plain_cross_entropy_", step), Passes(32 * 64) as passes:
            losses.linear_cross_entropy(hidden, weight, targets).total.backward()
        counts.append(passes.count)
    assert counts == [3 + 12, 3]


@pytest.mark.parametrize("vocab", [50304, 50257])
def test_memory_at_the_size_of_gpt2(vocab: int) -> None:
    """Counted without a GPU, for 16,384 rows in bfloat16 and weights in float32: 0.62 GiB, inputs not included."""
    hidden = torch.empty(16384, 768, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(vocab, 768, device="meta", requires_grad=True)
    targets = torch.empty(16384, dtype=torch.long, device="meta")
    kernel = mock.patch.object(losses, "cross_entropy_", lambda scores, *_: scores[:, 0].float())
    with mock.patch.object(losses, "backend", lambda *_, **__: "triton"), kernel, Virtual() as counter:
        inputs = [counter.virtual(tensor) for tensor in (hidden, weight, targets)]
        losses.linear_cross_entropy(*inputs).total.backward()
    assert 0.5 * 2**30 < counter.peak < 0.65 * 2**30
