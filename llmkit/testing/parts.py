"""What positions, feedforward networks and norms owe their users, whatever they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.overrides import TorchFunctionMode

from llmkit import registry
from llmkit.contracts import Feedforward, Norm, Position
from llmkit.errors import UserError
from llmkit.sequence import Sequence
from llmkit.testing.attention.cases import PACKED, PADDED, documents, gap, same
from llmkit.testing.report import NotApplicable, Properties, Violation

WIDTHS = (16, 32, 24, 48, 64, 128)
CONTEXT = 40  # the max_length that position encodings are built with
HEADS = 2
KINDS: dict[type[nn.Module], tuple[str, ...]] = {
    Position: ("add", "rotate", "bias"),
    Feedforward: ("forward",),
    Norm: ("forward",),
}
"""The methods of each contract that compute something."""


@dataclass(frozen=True)
class Subject:
    """A position encoding, feedforward network or norm under examination.

    Attributes:
        factory: builds it from (dim), a position encoding from (dim, max_length).
        dim: the width it is built with.
        seed: of weights and inputs.
    """

    factory: functools.partial[Any]
    dim: int
    seed: int = 0

    @property
    def contract(self) -> type[nn.Module]:
        """The contract that it derives from."""
        return next(kind for kind in KINDS if issubclass(registry.target_of(self.factory), kind))

    @property
    def methods(self) -> list[str]:
        """The methods that it defines. Raises NotApplicable for a position encoding without any."""
        own, kind = registry.target_of(self.factory), self.contract
        found = [name for name in KINDS[kind] if getattr(own, name) is not getattr(kind, name)]
        if not found:
            raise NotApplicable("it has none of add, rotate and bias")
        return found

    def raw(self, context: int = CONTEXT) -> Any:
        """Return a module as the framework builds it."""
        return self.factory(self.dim, context) if self.contract is Position else self.factory(self.dim)

    def build(self, dtype: torch.dtype = torch.float64, context: int = CONTEXT, seed: int = 0) -> Any:
        """Return a module in eval mode whose weights hide nothing."""
        with seeded(self.seed + seed):
            module = self.raw(context)
            disturb(module)
        return module.to(dtype).eval()

    def x(self, *shape: int, number: int = 0) -> Tensor:
        """Return inputs of this shape in double precision; another ``number`` gives others."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def inputs(self, batch: int, length: int, number: int = 0) -> Tensor:
        """Return inputs (batch, length, dim)."""
        return self.x(batch, length, self.dim, number=number)

    def heads(self, x_BTD: Tensor) -> Tensor:
        """Return the same numbers as heads of an even width, (B, H, T, E)."""
        width = max(2 * HEADS, self.dim - self.dim % (2 * HEADS))
        even_BTD = torch.cat([x_BTD] * 4, -1)[..., :width]
        return even_BTD.reshape(*x_BTD.shape[:2], HEADS, -1).transpose(1, 2)

    def outputs(self, module: Any, x_BTD: Tensor, seq: Sequence | None = None) -> dict[str, Tensor]:
        """Return what each method makes of an input. Raises Violation where it has not the shape that it owes."""
        seq = Sequence.dense(x_BTD.shape[1], x_BTD.device) if seq is None else seq
        found = {}
        for name in self.methods:
            if name == "bias":
                found[name] = bias(module, seq.positions_BT, seq.positions_BT, HEADS)
                continue
            given = self.heads(x_BTD) if name == "rotate" else x_BTD
            extra = {"add": (seq.positions_BT,), "rotate": (seq,), "forward": ()}[name]
            found[name] = _checked(name, given, getattr(module, name)(given, *extra))
        return found


def subject(factory: functools.partial[Any], *, dim: int | None = None, seed: int = 0) -> Subject:
    """Return what is examined; without ``dim`` it has the first usual width that the plugin can be built with."""
    for width in WIDTHS if dim is None else ():
        try:
            Subject(factory, width, seed).raw()
        except Exception:  # what is wrong is told by the first property
            continue
        return Subject(factory, width, seed)
    return Subject(factory, dim or WIDTHS[0], seed)


POSITION: Properties[Subject] = Properties()
FEEDFORWARD: Properties[Subject] = Properties()
NORM: Properties[Subject] = Properties()

Run = Callable[[Subject], str | None]


def _of(*families: Properties[Subject]) -> Callable[..., Callable[[Run], Run]]:
    """Return what makes a function a property of several families."""

    def properties(claim: str, meaning: str, essential: bool = False) -> Callable[[Run], Run]:
        def decorate(function: Run) -> Run:
            for family in families:
                family(claim, meaning, essential)(function)
            return function

        return decorate

    return properties


ALL, PER_POSITION = _of(POSITION, FEEDFORWARD, NORM), _of(FEEDFORWARD, NORM)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the seed, without gradients, and put the caller's random state back afterwards."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        yield


def disturb(module: nn.Module) -> None:
    """Move weights that are all equal: zeros and ones hide what they do. What is positive stays positive."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.numel() and (parameter == parameter.flatten()[0]).all():
            noise = (0.3 * torch.randn(parameter.shape)).clamp(-0.9, 0.9).to(parameter)
            parameter.copy_(noise if not parameter.any() else parameter * (1 + noise))


class MarkedMemory(TorchFunctionMode):
    """Fills memory that nobody has written to (``torch.empty``) with NaN."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; new memory is marked."""
        found = func(*args, **(kwargs or {}))
        if func in _EMPTY and found.is_floating_point():
            found.fill_(torch.nan)
        return found


_EMPTY = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)


def check_weights_are_set(module: nn.Module) -> None:
    """Raise Violation when a module built in ``MarkedMemory`` has a weight or buffer that nobody has set."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and tensor.isnan().any():
            share = tensor.isnan().double().mean()
            raise Violation(f"'{name}' {tuple(tensor.shape)}: {share:.0%} is not set (torch.empty without nn.init?)")


def zero_gradients(module: nn.Module, total: Tensor) -> list[str]:
    """Return the parameters whose gradient is zero. Raises Violation for one that has none."""
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        if grad is None:
            raise Violation(f"parameter '{name}' {tuple(parameter.shape)} is not used: it gets no gradient")
    return [name for name, grad in zip(parameters, grads, strict=True) if grad is not None and not grad.any()]


def bias(module: Position, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor:
    """Return a position bias. Raises Violation when it has not the shape (B or 1, H, T, S), or is not finite."""
    found = module.bias(query_BT, key_BS, num_heads)
    batch = max(len(query_BT), len(key_BS))
    shape = (num_heads, query_BT.shape[1], key_BS.shape[1])
    if found is None:
        return torch.zeros(1, *shape)
    told = f"bias of {shape[1]} queries, {shape[2]} keys, {num_heads} heads, batch {batch}"
    if not isinstance(found, Tensor):
        raise Violation(f"{told}: got {type(found).__name__}, expected a tensor")
    if found.dim() != 4 or found.shape[0] not in (1, batch) or found.shape[1:] != shape:
        raise Violation(f"{told}: got the shape {tuple(found.shape)}, expected (1 or {batch}, {str(shape)[1:]}")
    if not found.is_meta and not torch.isfinite(found).all():
        raise Violation(f"{told}: it is not finite")
    return found


def _checked(name: str, given: Tensor, y: Any) -> Tensor:
    told = f"{name} of {tuple(given.shape)}, {given.dtype}"
    if not isinstance(y, Tensor):
        raise Violation(f"{told}: got {type(y).__name__}, expected a tensor of that shape")
    if y.shape != given.shape:
        raise Violation(f"{told}: got the shape {tuple(y.shape)}")
    if not y.is_meta and not torch.isfinite(y).all():
        raise Violation(f"{told}: the output is not finite")
    return y


def _compare(actual: dict[str, Tensor], expected: dict[str, Tensor], told: str, tolerance: float = 1e-9) -> None:
    for name, y in actual.items():
        same(y, expected[name], f"{name}: {told}".format, tolerance)


def _at(name: str, y: Tensor, columns: list[int], row: int | None = None) -> Tensor:
    """Return some columns of an output, of one row or of all; of a bias their scores with each other."""
    if row is not None:
        y = y[row : row + 1] if len(y) > 1 else y
    if name == "bias":
        return y[:, :, columns][..., columns]
    return y[:, :, columns] if name == "rotate" else y[:, columns]


@ALL(
    "it can be built",
    "A config that names it stops before training.",
    essential=True,
)
def builds(subject: Subject) -> str:
    module = subject.raw()
    if getattr(module, "dim", None) != subject.dim:
        raise Violation(f"built with dim {subject.dim}, its attribute dim is {getattr(module, 'dim', None)}")
    weights = sum(parameter.numel() for parameter in module.parameters())
    return f"{subject.dim} wide, {weights:,} weights"


@ALL(
    "every weight is set when it is built",
    "The first loss is NaN, on some machines and some days only.",
    essential=True,
)
def weights_are_set(subject: Subject) -> None:
    with MarkedMemory():
        module = subject.raw()
    check_weights_are_set(module)


@ALL(
    "the output has the shape that it owes, and is finite, at any length and batch size",
    "The addition behind it fails or, worse, broadcasts.",
    essential=True,
)
@torch.no_grad()
def shape(subject: Subject) -> None:
    module = subject.build()
    for batch, length in ((1, 1), (1, 2), (2, 1), (1, 3), (3, 5), (2, CONTEXT)):
        try:
            subject.outputs(module, subject.inputs(batch, length))
        except (RuntimeError, IndexError) as error:
            text = " ".join(str(error).split())[:200]
            raise Violation(f"input {(batch, length, subject.dim)} raised {type(error).__name__}: {text}") from error
    single = subject.build(torch.float32)
    for name, y in subject.outputs(single, subject.inputs(1, 3).float()).items():
        if y.dtype != torch.float32:
            raise Violation(f"{name}: a float32 input gave {y.dtype}")


@ALL(
    "in eval mode the same input gives the same output, whatever came before",
    "Two measurements of one checkpoint differ; one text changes the answer to the next.",
    essential=True,
)
@torch.no_grad()
def deterministic(subject: Subject) -> None:
    module, x = subject.build(), subject.inputs(1, 5)
    first = subject.outputs(module, x)
    _compare(subject.outputs(module, x), first, "a second call differs by {}; dropout left on in eval mode?")
    subject.outputs(module, subject.inputs(2, 9, 5))
    _compare(subject.outputs(module, x), first, "after a call with another shape the same input differs by {}")


@ALL(
    "any memory layout will do, and inputs stay as they were",
    "It fails behind a transpose, or spoils the residual stream of the layer around it.",
    essential=True,
)
@torch.no_grad()
def layout_of_inputs(subject: Subject) -> None:
    module, x = subject.build(), subject.inputs(2, 5)
    before, seq = x.clone(), Sequence.dense(5)
    expected = {name: y.clone() for name, y in subject.outputs(module, x, seq).items()}
    if not torch.equal(before, x) or not torch.equal(seq.positions_BT, Sequence.dense(5).positions_BT):
        raise Violation(f"{', '.join(subject.methods)}: an input is changed in place")
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    try:
        found = subject.outputs(module, strided)
    except RuntimeError as error:
        raise Violation(f"an input that is not contiguous raised: {' '.join(str(error).split())[:200]}") from error
    _compare(found, expected, "with a transposed layout of the same input it differs by {}")


@PER_POSITION(
    "an output depends on its own position only",
    "In a language model the positions see what they have to predict: a wonderful loss, and rubbish is generated.",
)
def position_by_position(subject: Subject) -> None:
    _undisturbed(subject, [(1, 2), (1, 3), (2, 5)], rows=False)


@PER_POSITION(
    "an output depends on its own row only",
    "Results depend on the batch that a text happens to be in, and padding leaks into texts.",
)
def row_by_row(subject: Subject) -> None:
    _undisturbed(subject, [(2, 1), (3, 2)], rows=True)


def _undisturbed(subject: Subject, shapes: list[tuple[int, int]], rows: bool) -> None:
    """Change one position (or row) and see that the others give what they gave, in eval and in training mode."""
    what = "row" if rows else "position"
    for training in (False, True):
        module = subject.build().train(training)
        for batch, length in shapes:
            for changed in range(batch if rows else length):
                x = subject.inputs(batch, length)
                other = x.clone()
                index = (changed,) if rows else (slice(None), changed)
                other[index] = subject.inputs(batch, length, 1)[index]
                with seeded(subject.seed):
                    before = module(x)
                with seeded(subject.seed):  # dropout draws the same again
                    after = module(other)
                difference = (after - before).abs().amax(-1).double()
                difference[index] = 0
                if difference.max() > 1e-9 * before.abs().max():
                    at = difference.argmax() // length if rows else difference.argmax() % length
                    raise Violation(
                        f"{'training' if training else 'eval'} mode, {(batch, length, subject.dim)}: a change of "
                        f"{what} {changed} changes the output of {what} {int(at)} by {difference.max():.2g}; a mean, "
                        f"softmax or norm over another dimension than the last?"
                    )


@POSITION(
    "it uses the positions that are given, not the column numbers",
    "Generated text differs from what was trained: cached decoding feeds one column at a time.",
)
@torch.no_grad()
def given_positions(subject: Subject) -> None:
    module = subject.build()
    for start, end, length in ((1, 2, 2), (1, 3, 3), (4, 7, 9)):
        x, seq = subject.inputs(1, length), Sequence.dense(length)
        chunk = Sequence(seq.positions_BT[:, start:end])
        columns = list(range(start, end))
        whole = subject.outputs(module, x, seq)
        expected = {name: _at(name, y, columns) for name, y in whole.items()}
        told = f"columns {start} to {end - 1} of {length} differ by {{}} when given alone with positions {columns}"
        _compare(subject.outputs(module, x[:, start:end], chunk), expected, told)
        if "bias" in whole:
            rows = bias(module, chunk.positions_BT, seq.positions_BT, HEADS)
            told = f"bias: queries {columns} against keys 0 to {length - 1} differ by {{}} from those of the whole"
            same(rows, whole["bias"][:, :, columns], told.format)


@POSITION(
    "each document of a packed or padded row is as it would be alone",
    "With data.pack, or in a batch of texts of unequal lengths, positions are wrong.",
)
@torch.no_grad()
def documents_start_anew(subject: Subject) -> None:
    module = subject.build()
    for segments in PADDED + PACKED:
        x, seq = subject.inputs(len(segments), len(segments[0])), Sequence.from_segments(torch.tensor(segments))
        whole = subject.outputs(module, x, seq)
        for row, columns in documents(segments):
            alone = subject.outputs(module, x[row : row + 1, columns], Sequence.dense(len(columns)))
            found = {name: _at(name, y, columns, row) for name, y in whole.items()}
            told = f"segments {segments} (0 is padding): columns {columns} of row {row} differ by {{}} from alone"
            _compare(found, alone, told)


@POSITION(
    "positions are told apart",
    "The network does not learn the order of words from it.",
)
@torch.no_grad()
def tells_positions_apart(subject: Subject) -> None:
    module = subject.build()
    x = subject.inputs(1, 1).expand(1, CONTEXT, -1).clone()
    for name, y in subject.outputs(module, x).items():
        first = y[:, :, :1, :1] if name == "bias" else _at(name, y, [0])
        others = y[:, :, :1] if name == "bias" else y
        if gap(others, first.expand_as(others)) > 1e-9:
            return
    raise Violation(f"{', '.join(subject.methods)}: positions 0 to {CONTEXT - 1} of equal content get equal values")


@POSITION(
    "whether scores depend on distance alone",
    "A figure, no demand.",
)
@torch.no_grad()
def relative(subject: Subject) -> str:
    module = subject.build()
    x = subject.inputs(1, 2)
    scores = []
    for start in (0, 5):
        seq = Sequence.dense(6, start=start)
        found = subject.outputs(module, x[:, :1].expand(1, 6, -1), seq)
        keys = subject.outputs(module, x[:, 1:].expand(1, 6, -1), seq)
        score = torch.zeros(1, HEADS, 6, 6, dtype=torch.float64)
        for name, y in found.items():
            split = [t if name == "rotate" else t[:, None] for t in (y, keys[name])]
            score = score + (y if name == "bias" else split[0] @ split[1].transpose(-1, -2))
        scores.append(score)
    return "yes" if gap(*scores) < 1e-4 else "no"


@POSITION(
    "any number of heads and, where it turns, any width of a head",
    "It goes with some attention variants only, or gives an error that does not say why.",
)
@torch.no_grad()
def numbers_of_heads(subject: Subject) -> None:
    module, seq = subject.build(), Sequence.dense(5)
    for heads in (1, 2, 3, 4, 8) if "bias" in subject.methods else ():
        bias(module, seq.positions_BT, seq.positions_BT, heads)
    widths = (1, 2, 3, 4, 6, 8, 16, 64) if "rotate" in subject.methods else ()
    refused = []
    for width in widths:
        given = subject.x(2, 3, 5, width)
        try:
            _checked("rotate", given, module.rotate(given, Sequence.dense(5)))
        except UserError:
            refused.append(width)
        except (RuntimeError, IndexError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise Violation(
                f"rotate with heads {width} wide raised {type(error).__name__}: {text}. What it cannot do should be a "
                "UserError that says so."
            ) from error
    if widths and len(refused) == len(widths):
        raise Violation(f"rotate refuses every width of a head: {', '.join(map(str, widths))}")


@POSITION(
    "beyond max_length it goes on, or says clearly that it ends",
    "A long text ends in a bare IndexError or, on a GPU, kills the process.",
)
@torch.no_grad()
def beyond_the_context(subject: Subject) -> str:
    module = subject.build()
    for seq in (Sequence.dense(CONTEXT + 1), Sequence.dense(1, start=CONTEXT), Sequence.dense(3 * CONTEXT)):
        try:
            subject.outputs(module, subject.inputs(1, seq.positions_BT.shape[1]), seq)
        except UserError:
            return "it ends there"
        except (RuntimeError, IndexError) as error:
            raise Violation(
                f"max_length {CONTEXT}, positions up to {int(seq.positions_BT.max())}: raised {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}; expected numbers, or a UserError"
            ) from error
    return "it goes on"


@POSITION(
    "what it keeps in seq.memo does not mix up callers",
    "Queries and keys of another width or precision in the same pass get wrong values.",
)
@torch.no_grad()
def memo(subject: Subject) -> None:
    if "rotate" not in subject.methods:
        raise NotApplicable("only rotate is given seq.memo")
    module = subject.build()
    shared = Sequence.dense(5)
    for width, dtype in ((8, torch.float64), (4, torch.float64), (8, torch.float32), (8, torch.float64)):
        given = subject.x(1, 2, 5, width).to(dtype)
        try:
            expected = module.rotate(given, Sequence.dense(5))
        except UserError:
            continue
        told = f"rotate of heads {width} wide, {dtype}, differs by {{}} when others used the same seq before"
        same(_checked("rotate", given, module.rotate(given, shared)), expected, told.format, 1e-6)


@NORM(
    "the output does not grow with the input",
    "It does not normalise: activations grow from layer to layer until training diverges.",
)
@torch.no_grad()
def normalises(subject: Subject) -> str:
    module, x = subject.build(), subject.inputs(2, 3)
    small, large = (float(module(scale * x).square().mean().sqrt()) for scale in (1, 1000))
    if large > 100 * max(small, 1e-6):
        raise Violation(f"inputs of size 1 gave outputs of size {small:.3g}, of size 1000: {large:.3g}")
    return f"of size {small:.2g}"


@NORM(
    "zeros, equal values, tiny and large ones give finite values and gradients",
    "Training stops with NaN as soon as a row is padding, or a unit dies.",
)
def degenerate_inputs(subject: Subject) -> None:
    module = subject.build(torch.float32)
    for value in (0.0, 1.0, -3.0, 1e-20, 1e4):
        x = torch.full((1, 1, subject.dim), value, requires_grad=True)
        y = module(x)
        (grad,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        for name, found in (("output", y), ("gradient", grad)):
            if found is not None and not torch.isfinite(found).all():
                raise Violation(
                    f"float32, every input {value:g}: the {name} is {found.flatten()[0].item()}. A division by a "
                    "length or deviation of zero? Add an eps under the root."
                )


@ALL(
    "gradients are right, in double precision",
    "Training goes in a wrong direction.",
)
def gradients(subject: Subject) -> None:
    module = subject.build()
    x = subject.inputs(1, 3).requires_grad_()

    def out(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for y in subject.outputs(module, x).values() if y.requires_grad)

    if not out(x):
        raise NotApplicable("nothing in it has a gradient")
    try:
        torch.autograd.gradcheck(out, (x, *module.parameters()), fast_mode=True, atol=1e-5)
    except GradcheckError as error:
        text = " ".join(str(error).split())[:200]
        raise Violation(f"input {tuple(x.shape)}: autograd and finite differences: {text}") from error


@ALL(
    "every parameter gets a gradient",
    "A part of the weights never learns; DDP stops with unused parameters.",
)
def every_parameter_learns(subject: Subject) -> None:
    module = subject.build()
    x = subject.inputs(2, CONTEXT)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise NotApplicable("it has no parameters")

    found = subject.outputs(module, x).values()
    zero = zero_gradients(module, torch.stack([(y * subject.x(*y.shape, number=3)).sum() for y in found]).sum())
    if zero:
        raise Violation(f"the gradient of {', '.join(zero)} is 0 for any output")


@ALL(
    "bfloat16, pure and by autocast, agrees with double precision",
    "Mixed precision, the usual way to train, gives an error or noise.",
)
@torch.no_grad()
def bfloat16(subject: Subject) -> str:
    # Far positions, because bfloat16 has 8 bits only: angles and distances must not be computed in it.
    length = 1000 if subject.contract is Position else 8
    x, worst = subject.inputs(1, length).bfloat16(), 0.0
    expected = subject.outputs(subject.build(context=length), x.double())
    for weights, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        module = subject.build(weights, context=length)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = subject.outputs(module, x)
        how = "by autocast" if autocast else "with bfloat16 weights"
        for name, y in found.items():
            if not autocast and name != "bias" and y.dtype != torch.bfloat16:
                raise Violation(f"{name}: {how} a bfloat16 input gave {y.dtype}")
            # Not the worst: rounding may turn a hard choice (of an expert) at a few positions.
            right = expected[name]
            error = ((y.double() - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-6)).flatten().quantile(0.75)
            worst = max(worst, float(error))
            if not error < 0.05:
                cause = ""
                if subject.contract is Position:
                    cause = ". Angles or distances in bfloat16? Buffers are cast along with the module"
                raise Violation(
                    f"{name}, {how}, {length} positions: a quarter is off by {float(error):.2g} or more{cause}"
                )
    return f"off by {worst:.1%}"


@ALL(
    "a state_dict brings all of it back",
    "A loaded checkpoint is another model than the one that was saved.",
)
@torch.no_grad()
def state_dict(subject: Subject) -> None:
    module, fresh, x = subject.build(), subject.build(seed=1), subject.inputs(1, 5)
    fresh.load_state_dict(module.state_dict())
    told = "loaded into a new instance it differs by {}; a random tensor that is neither parameter nor buffer?"
    _compare(subject.outputs(fresh, x), subject.outputs(module, x), told)


@ALL(
    "it can be built and run without memory (meta device)",
    "llmkit cannot try out the network or count its parameters before training.",
)
def meta_device(subject: Subject) -> None:
    with torch.device("meta"):
        module = subject.raw()
    seq = Sequence.dense(5, "meta")
    x = torch.empty(2, 5, subject.dim, device="meta")
    try:
        found = subject.outputs(module, x, seq)
    except NotImplementedError as error:  # the framework goes without the trial then
        raise NotApplicable(f"it cannot run there: {' '.join(str(error).split())[:100]}") from error
    for name, y in found.items():
        if not y.is_meta:
            raise Violation(f"{name}: on the meta device it returns a tensor on {y.device}")
