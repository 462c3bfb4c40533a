"""Properties of a full forward pass of attention: order, padding, documents, rows, memory."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.contracts import Attention, Role
from llmkit.sequence import Memory, Sequence
from llmkit.testing.attention.cases import LONG, PACKED, PADDED, POSITIONS, Segments, documents, run, sequence
from llmkit.testing.attention.subject import HEADS, Subject, dense_memory, memory_of, need, own
from llmkit.testing.numerics import TOLERANCE, same
from llmkit.testing.report import NotApplicable, Properties, Violation

PROPERTIES: Properties[Subject] = Properties()


@PROPERTIES(
    "an output depends on other positions, not only on its own",
    f"Each position is processed alone: the network sees no context. {HEADS}",
)
def mixes_positions(subject: Subject) -> None:
    for role in own(subject):
        length = 6
        reads_TS = _reads(subject, role, length)
        if not reads_TS.tril(-1).any():
            raise Violation(f"role {role}, length {length}: no output depends on an earlier position")
        if role == "bidirectional" and not reads_TS.triu(1).any():
            raise Violation(f"role {role}, length {length}: no output depends on a later position")
    if not own(subject):
        raise NotApplicable("cross-attention only")


def _reads(subject: Subject, role: Role, length: int) -> Tensor:
    """Return whether each output of a row depends on each of its inputs, by gradient, (T, S)."""
    module, x = subject.build(role), subject.x(1, length).requires_grad_()
    y = run(module, x, Sequence.dense(length)) * subject.x(1, length, 3)
    sizes_TS = torch.stack([_gradient(y[:, t], x).abs().amax(-1)[0] for t in range(length)])
    return sizes_TS > TOLERANCE * sizes_TS.amax()


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a sum; zeros where nothing depends on x."""
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True)
    return grad


@PROPERTIES(
    "no output depends on a later input, by gradient",
    "The model sees the token it has to predict: the training loss looks wonderful, the generated text is rubbish.",
)
def causal_by_gradient(subject: Subject) -> None:
    need(subject, "causal")
    module = subject.build("causal")
    for length in (2, 3, 7):
        for position in POSITIONS:
            x = subject.x(1, length).requires_grad_()
            y = run(module, x, sequence(None, position, length, subject.dim)) * subject.x(1, length, 3)
            for t in range(length):
                size_S = _gradient(y[:, t], x)[0].abs().amax(-1)
                later = (size_S[t + 1 :] > TOLERANCE * size_S.amax().clamp(min=1e-3)).nonzero()
                if len(later):
                    raise Violation(
                        f"length {length}, {position}: output {t} has a gradient of "
                        f"{float(size_S[t + 1 + later[0]]):.2g} to input {t + 1 + int(later[0])}"
                    )


@PROPERTIES(
    "later inputs change nothing, and a prefix alone gives the same",
    "The model sees what comes later: its training loss is too low, and generation differs from training.",
)
def causal_by_value(subject: Subject) -> None:
    need(subject, "causal")
    module = subject.build("causal")
    with torch.no_grad():
        for length in (2, 3, 7, LONG):
            x = subject.x(1, length)
            whole = run(module, x, Sequence.dense(length))
            for t in range(1, length) if length < LONG else (1, 63, 64, 100, LONG - 1):
                changed = torch.cat([x[:, :t], 3 * subject.x(1, length - t, 5)], 1)
                found = run(module, changed, Sequence.dense(length))[:, :t]
                message = f"length {length}: outputs before {t} differ by {{}} when the inputs from {t} on change"
                same(found, whole[:, :t], message.format)
                found = run(module, x[:, :t], Sequence.dense(t))
                message = f"length {length}: outputs before {t} differ by {{}} from those of the first {t} inputs alone"
                same(found, whole[:, :t], message.format)


@PROPERTIES(
    "padding changes no real position, wherever it stands",
    "The loss and the answers depend on what else is in the batch.",
)
def padding(subject: Subject) -> None:
    for role in own(subject):
        module = subject.build(role)
        for position in POSITIONS:
            for segments in PADDED:
                _alone(subject, module, segments, position, "padding")
    if not own(subject):
        raise NotApplicable("cross-attention only")


@PROPERTIES(
    "packed documents do not see each other",
    "Text of one document leaks into another: results on packed data hold nowhere else.",
)
def packed_documents(subject: Subject) -> None:
    longest = [[1] * (LONG // 2) + [2] * (LONG // 2 - 1) + [0]]
    for role in own(subject):
        module = subject.build(role)
        for position in POSITIONS:
            for segments in [*PACKED, longest]:
                _alone(subject, module, segments, position, "other documents")
    if not own(subject):
        raise NotApplicable("cross-attention only")


@torch.no_grad()
def _alone(subject: Subject, module: Attention, segments: Segments, position: str, what: str) -> None:
    """Compare each document of a batch with the same document alone."""
    x = subject.x(len(segments), len(segments[0]))
    y = run(module, x, sequence(segments, position, dim=subject.dim))
    for row, columns in documents(segments):
        alone = run(module, x[row : row + 1, columns], sequence(None, position, len(columns), subject.dim))

        def message(size: str, row: int = row, columns: list[int] = columns) -> str:
            others = x.clone()
            others[row, columns] = 0
            others = 2 * x - others  # doubled, except for the columns in question
            moved = run(module, others, sequence(segments, position, dim=subject.dim))
            reads = float((moved - y)[row, columns].abs().amax()) > TOLERANCE
            shown = str(segments) if len(segments[0]) < LONG // 2 else f"two documents in {len(segments[0])} columns"
            return (
                f"role {module.role}, {position}, segments {shown} (0 is padding): row {row}, columns "
                f"{columns if len(columns) < 9 else f'{columns[0]} to {columns[-1]}'} differ by {size} from the same "
                f"text alone; they depend on the {'inputs' if reads else 'place'} of {what}"
            )

        same(y[row, columns], alone[0], message)


@PROPERTIES(
    "rows of a batch do not mix, not even in training mode",
    "The loss of a text depends on its neighbours in the batch; results change with the batch size.",
)
def batch_rows(subject: Subject) -> None:
    for role in subject.roles:
        module = subject.build(role)
        for segments in (None, [[1, 1, 1], [1, 1, 0]]):
            for training in (False, True):
                x = subject.x(2, 3).requires_grad_()
                memory = memory_of(subject, None, 2, 4) if role == "cross" else None
                if memory is not None:
                    memory.x_BSD.requires_grad_()
                y = run(module.train(training), x, sequence(segments, length=3), memory)
                inputs = [x] if memory is None else [x, memory.x_BSD]
                grads = torch.autograd.grad((y * subject.x(2, 3, 3))[0].sum(), inputs, allow_unused=True)
                for grad in grads:
                    if grad is not None and grad[1].abs().amax() > TOLERANCE * grad.abs().amax():
                        mode = "training" if training else "eval"
                        raise Violation(f"role {role}, batch of 2, {mode} mode: row 0 depends on the input of row 1")
        module.eval()
        with torch.no_grad():
            x, memory = subject.x(3, 4), dense_memory(subject, role, 3, 4)
            whole = run(module, x, Sequence.dense(4), memory)
            for row in range(3):
                taken = None if memory is None else memory.take(torch.tensor([row]))
                alone = run(module, x[row : row + 1], Sequence.dense(4), taken)
                message = f"role {role}: row {row} of 3 differs by {{}} from the same row alone"
                same(alone[0], whole[row], message.format)


@PROPERTIES(
    "cross-attention reads all of the memory except its padding",
    "A translation misses part of its source, or changes with the padding of the batch.",
)
def cross_memory(subject: Subject) -> None:
    need(subject, "cross")
    length = 5
    module = subject.build("cross")
    read_S = torch.zeros(length, dtype=torch.bool)
    for number in range(8):  # a sparse variant reads different positions for different queries
        x, memory = subject.x(1, 6, 20 + number), subject.x(1, length, 40 + number).requires_grad_()
        y = run(module, x, Sequence.dense(6), Memory(memory, Sequence.dense(length)))
        (grad,) = torch.autograd.grad((y * subject.x(1, 6, 3)).sum(), memory, allow_unused=True)
        if grad is not None:
            read_S |= grad[0].abs().amax(-1) > 0
    if not read_S.all():
        raise Violation(f"memory of length {length}: none of 48 queries reads position {int((~read_S).nonzero()[0])}")
    with torch.no_grad():
        for segments in ([[1, 0]], [[0, 1]], [[1, 0, 1]], [[1, 1, 1, 0], [0, 1, 1, 1]]):
            for position in POSITIONS:
                padded = memory_of(subject, segments, len(segments), len(segments[0]))
                x, seq = subject.x(len(segments), 3), sequence(None, position, 3, subject.dim)
                y = run(module, x, seq, padded)
                for row, columns in documents(segments):
                    cut = Memory(padded.x_BSD[row : row + 1, columns], Sequence.dense(len(columns)))
                    alone = run(module, x[row : row + 1], sequence(None, position, 3, subject.dim), cut)
                    where = f"memory segments {segments} (0 is padding), row {row}"
                    message = f"{where}: the output differs by {{}} from that of the same memory without padding"
                    same(y[row : row + 1], alone, message.format)
        rows = [[1, 1], [0, 0]]
        # The output has to be finite even where a row's memory is empty.
        run(module, subject.x(2, 3), Sequence.dense(3), memory_of(subject, rows, 2, 2))
