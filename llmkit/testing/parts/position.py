"""The properties of position encodings."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.sequence import Sequence
from llmkit.testing.attention.cases import PACKED, PADDED, documents
from llmkit.testing.numerics import gap, same
from llmkit.testing.parts.subject import HEADS, Subject, bias, checked, compare, first_properties, last_properties
from llmkit.testing.report import NotApplicable, Properties, Violation, raised
from llmkit.testing.usage import CONTEXT

OWN: Properties[Subject] = Properties()


def _at(name: str, y: Tensor, columns: list[int], row: int | None = None) -> Tensor:
    """Return some columns of an output, of one row or of all; of a bias their scores with each other."""
    if row is not None:
        y = y[row : row + 1] if len(y) > 1 else y
    if name == "bias":
        return y[:, :, columns][..., columns]
    return y[:, :, columns] if name == "rotate" else y[:, columns]


@OWN(
    "it uses the given positions, not the column numbers",
    "Generation differs from training: cached decoding feeds one column at a time.",
)
@torch.no_grad()
def given_positions(subject: Subject) -> None:
    module = subject.build()
    for start, end, length in ((1, 2, 2), (1, 3, 3), (4, 7, 9)):
        x, seq = subject.vectors(1, length), Sequence.dense(length)
        chunk = Sequence(seq.positions_BT[:, start:end])
        columns = list(range(start, end))
        whole = subject.outputs_of(module, x, seq)
        expected = {name: _at(name, y, columns) for name, y in whole.items()}
        message = f"columns {start} to {end - 1} of {length} differ by {{}} when given alone, with positions {columns}"
        compare(subject.outputs_of(module, x[:, start:end], chunk), expected, message)
        if "bias" in whole:
            rows = bias(module, chunk.positions_BT, seq.positions_BT, HEADS)
            message = f"bias: queries {columns} against keys 0 to {length - 1} differ by {{}} from the whole row"
            same(rows, whole["bias"][:, :, columns], message.format)


@OWN(
    "each document of a packed or padded row gives the same as alone",
    "With data.pack, or in a batch of texts of different lengths, positions are wrong.",
)
@torch.no_grad()
def documents_restart(subject: Subject) -> None:
    module = subject.build()
    for segments in PADDED + PACKED:
        x, seq = subject.vectors(len(segments), len(segments[0])), Sequence.from_segments(torch.tensor(segments))
        whole = subject.outputs_of(module, x, seq)
        for row, columns in documents(segments):
            alone = subject.outputs_of(module, x[row : row + 1, columns], Sequence.dense(len(columns)))
            found = {name: _at(name, y, columns, row) for name, y in whole.items()}
            where = f"segments {segments} (0 is padding), row {row}, columns {columns}"
            message = f"{where}: they differ by {{}} from the same document alone"
            compare(found, alone, message)


@OWN(
    "different positions give different values",
    "The network cannot learn word order from it.",
)
@torch.no_grad()
def distinguishes_positions(subject: Subject) -> None:
    module = subject.build()
    x = subject.vectors(1, 1).expand(1, CONTEXT, -1).clone()
    for name, y in subject.outputs_of(module, x).items():
        # Of a bias the last query's: a causal one need not tell apart what comes later.
        first = y[:, :, -1:, :1] if name == "bias" else _at(name, y, [0])
        others = y[:, :, -1:] if name == "bias" else y
        if gap(others, first.expand_as(others)) > 1e-9:
            return
    raise Violation(f"{', '.join(subject.methods)}: positions 0 to {CONTEXT - 1} with equal content give equal values")


@OWN(
    "whether scores depend on the distance alone",
    "For information only.",
)
@torch.no_grad()
def relative(subject: Subject) -> str:
    module = subject.build()
    x = subject.vectors(1, 2)
    scores = []
    for start in (0, 5):
        seq = Sequence.dense(6, start=start)
        found = subject.outputs_of(module, x[:, :1].expand(1, 6, -1), seq)
        keys = subject.outputs_of(module, x[:, 1:].expand(1, 6, -1), seq)
        score = torch.zeros(1, HEADS, 6, 6, dtype=torch.float64)
        for name, y in found.items():
            split = [t if name == "rotate" else t[:, None] for t in (y, keys[name])]
            score = score + (y if name == "bias" else split[0] @ split[1].transpose(-1, -2))
        scores.append(score)
    return "yes" if gap(*scores) < 1e-4 else "no"


@OWN(
    "it takes any number of heads and, if it rotates, any head width",
    "It works with some attention variants only, or fails without saying why.",
)
@torch.no_grad()
def numbers_of_heads(subject: Subject) -> None:
    module, seq = subject.build(), Sequence.dense(5)
    for heads in (1, 2, 3, 4, 8) if "bias" in subject.methods else ():
        bias(dataclasses.replace(subject, num_heads=heads).build(), seq.positions_BT, seq.positions_BT, heads)
    widths = (1, 2, 3, 4, 6, 8, 16, 64) if "rotate" in subject.methods else ()
    refused = []
    for width in widths:
        given = subject.x(2, 3, 5, width)
        try:
            checked("rotate", given, module.rotate(given, Sequence.dense(5)))
        except UserError:
            refused.append(width)
        except (RuntimeError, IndexError, ValueError) as error:
            raise Violation(
                f"rotate with heads {width} wide {raised(error)}. For a width that it does not support, raise a "
                "UserError that says so."
            ) from error
    if widths and len(refused) == len(widths):
        raise Violation(f"rotate refuses every width of a head: {', '.join(map(str, widths))}")


@OWN(
    "beyond max_length it continues, or raises a clear error",
    "A long text raises a bare IndexError or, on a GPU, kills the process.",
)
@torch.no_grad()
def beyond_the_context(subject: Subject) -> str:
    module = subject.build()
    for seq in (Sequence.dense(CONTEXT + 1), Sequence.dense(1, start=CONTEXT), Sequence.dense(3 * CONTEXT)):
        try:
            subject.outputs_of(module, subject.vectors(1, seq.positions_BT.shape[1]), seq)
        except UserError:
            return "it raises a UserError"
        except (RuntimeError, IndexError) as error:
            raise Violation(
                f"max_length {CONTEXT}, positions up to {int(seq.positions_BT.max())}: {raised(error)}; expected "
                "numbers, or a UserError"
            ) from error
    return "it continues"


@OWN(
    "values cached in seq.memo do not leak between callers",
    "Queries and keys of another width or dtype in the same pass get wrong values.",
)
@torch.no_grad()
def memo(subject: Subject) -> None:
    if "rotate" not in subject.methods:
        raise NotApplicable("only rotate receives seq.memo")
    module = subject.build()
    shared = Sequence.dense(5)
    for width, dtype in ((8, torch.float64), (4, torch.float64), (8, torch.float32), (8, torch.float64)):
        given = subject.x(1, 2, 5, width).to(dtype)
        try:
            expected = module.rotate(given, Sequence.dense(5))
        except UserError:
            continue
        message = f"rotate of heads {width} wide, {dtype}, differs by {{}} after other calls with the same seq"
        same(checked("rotate", given, module.rotate(given, shared)), expected, message.format, 1e-6)


POSITION: Properties[Subject] = Properties(first_properties(), OWN, last_properties())
