"""Properties of attention with a decoding state: piece by piece it computes what one full pass does."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.contracts import Attention
from llmkit.sequence import Memory, Sequence, State
from llmkit.testing.attention.cases import LONG, PACKED, PADDED, POSITIONS, Segments, part, run, sequence
from llmkit.testing.attention.subject import Subject, memory_of, need
from llmkit.testing.numerics import same
from llmkit.testing.report import NotApplicable, Properties, Violation

PROPERTIES: Properties[Subject] = Properties()
MEANING = "Generated text is not what the model would write: decoding and training compute different things."


def causal(subject: Subject) -> Attention:
    """Return the causal module, or raise NotApplicable if there is none."""
    need(subject, "causal")
    return subject.build("causal")


def state_of(subject: Subject, module: Attention, batch: int, columns: int) -> State:
    """Return an empty decoding state, or raise NotApplicable if the variant keeps none."""
    state = module.init_state(batch, columns, subject.x(batch, 1))
    if state is None:
        raise NotApplicable("it keeps no state: each new token runs the full forward pass")
    return state


@torch.no_grad()
def compare(
    subject: Subject, module: Attention, segments: Segments | None, position: str, *all_cuts: tuple[int, ...]
) -> None:
    """Compare decoding in pieces of these sizes with one full pass; raise Violation where they differ."""
    batch, length = 1 if segments is None else len(segments), sum(all_cuts[0])
    x = subject.x(batch, length)
    expected = run(module, x, sequence(segments, position, length, subject.dim))
    real = torch.ones(batch, length, dtype=torch.bool) if segments is None else torch.tensor(segments) > 0
    shown = "no padding" if segments is None else f"segments {segments} (0 is padding)"
    for cuts in dict.fromkeys(all_cuts):
        seq, state = sequence(segments, position, length, subject.dim), state_of(subject, module, batch, length)
        start = 0
        for size in cuts:
            end = start + size
            piece = run(module, x[:, start:end], part(seq, start, end), state=state)
            actual, full = (y[real[:, start:end]] for y in (piece, expected[:, start:end]))
            message = (
                f"{position}, {shown}, fed in pieces of {_short(cuts)}: columns {start} to {end - 1} differ by {{}}"
            )
            same(actual, full, message.format)
            if state.length != end:
                raise Violation(f"after {end} columns state.length is {state.length}")
            start = end


@PROPERTIES("decoding token by token equals the full pass", MEANING)
def decoding_steps(subject: Subject) -> None:
    module = causal(subject)
    for position in POSITIONS:
        for length in (1, 2, 3, 7):
            compare(subject, module, None, position, (1,) * length)


@PROPERTIES("decoding in pieces of several tokens equals the full pass", MEANING)
def decoding_chunks(subject: Subject) -> None:
    module = causal(subject)
    for position in POSITIONS:
        for all_cuts in (((2, 1), (1, 2)), ((3, 1, 2, 1), (2, 5), (7,))):
            compare(subject, module, None, position, *all_cuts)


@PROPERTIES("decoding past any window or block equals the full pass", MEANING)
def decoding_long(subject: Subject) -> None:
    module = causal(subject)
    for position in POSITIONS:
        compare(subject, module, None, position, (LONG // 2 + 3, *[1] * 5, 40, *[1] * (LONG - LONG // 2 - 48)))


@PROPERTIES("decoding with padding anywhere equals the full pass", f"{MEANING} Here for prompts of different lengths.")
def decoding_padding(subject: Subject) -> None:
    module = causal(subject)
    for position in POSITIONS:
        for segments in PADDED:
            length = len(segments[0])
            compare(subject, module, segments, position, (1,) * length, (length - 1, 1))


@PROPERTIES("decoding across the end of a document equals the full pass", f"{MEANING} The previous document leaks in.")
def decoding_documents(subject: Subject) -> None:
    module = causal(subject)
    for position in POSITIONS:
        for segments in PACKED:
            length = len(segments[0])
            compare(subject, module, segments, position, (1,) * length, (length - 1, 1), (1, length - 1))


@PROPERTIES(
    "prompts of different lengths can be continued token by token",
    f"{MEANING} A prompt's answer depends on the other prompts of the batch.",
)
@torch.no_grad()
def decoding_ragged(subject: Subject) -> None:
    module = causal(subject)
    all_prompts = ([[1, 1], [1, 0], [0, 1]], [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    for first, prompts in enumerate(all_prompts):
        for number, position in enumerate(POSITIONS):
            new = (3, LONG // 2)[(first + number) % 2]  # each pair of values occurs
            _ragged(subject, module, prompts, position, new)


def _ragged(subject: Subject, module: Attention, prompts: Segments, position: str, new: int) -> None:
    width = len(prompts[0])
    segments = [[*row, *[1] * new] for row in prompts]
    x = subject.x(len(prompts), width + new)
    expected = run(module, x, sequence(segments, position, dim=subject.dim))
    full = sequence(segments, position, dim=subject.dim)
    state = state_of(subject, module, len(prompts), width + new)
    run(module, x[:, :width], part(full, 0, width), state=state)
    for column in range(width, width + new):
        piece = part(full, column, column + 1)
        piece.segments_BT = None  # a step without padding comes without segments
        y = run(module, x[:, column : column + 1], piece, state=state)
        message = f"{position}, prompts {prompts} (0 is padding): new token {column - width} differs by {{}}"
        same(y[:, 0], expected[:, column], message.format)


@PROPERTIES("the rows of a state can be reordered", "Beam search continues one text with the state of another.")
@torch.no_grad()
def decoding_reorder(subject: Subject) -> None:
    module = causal(subject)
    for segments in ([[1] * 5, [1] * 5], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]):
        for position in POSITIONS:
            for order in ([1, 0], [0, 0], [1, 1, 0]):
                x, rows = subject.x(2, 5), torch.tensor(order)
                dense = not any(0 in row for row in segments)
                seq = sequence(None if dense else segments, position, 5, subject.dim)
                state = state_of(subject, module, 2, 5)
                run(module, x[:, :3], part(seq, 0, 3), state=state)
                state.reorder(rows)
                after = sequence([segments[row] for row in order], position, dim=subject.dim)
                piece = part(after, 3, 5)
                piece.segments_BT = None
                y = run(module, x[rows, 3:], piece, state=state)
                message = f"{position}, segments {segments}, rows {order} after 3 columns: the next ones differ by {{}}"
                same(y, run(module, x[rows], after)[:, 3:], message.format)


@PROPERTIES("cross-attention keeps decoding from the memory of its first call", MEANING)
@torch.no_grad()
def cross_decoding(subject: Subject) -> None:
    need(subject, "cross")
    module, x = subject.build("cross"), subject.x(2, 4)
    for segments in (None, [[1, 1, 0], [0, 1, 1]]):
        for cuts in ([1, 1, 1, 1], [2, 2], [1, 3]):
            memory, seq = memory_of(subject, segments, 2, 3), Sequence.dense(4)
            expected = run(module, x, Sequence.dense(4), memory)
            state, start = state_of(subject, module, 2, 4), 0
            for size in cuts:
                piece = part(seq, start, start + size)
                y = run(module, x[:, start : start + size], piece, memory, state)
                message = f"memory segments {segments}, pieces of {cuts}: columns from {start} on differ by {{}}"
                same(y, expected[:, start : start + size], message.format)
                start += size
    _reordered(subject)


def _reordered(subject: Subject) -> None:
    module, x, memory = subject.build("cross"), subject.x(2, 4), memory_of(subject, [[1, 1, 0], [0, 1, 1]], 2, 3)
    expected, rows = run(module, x, Sequence.dense(4), memory), torch.tensor([1, 0, 1])
    state = state_of(subject, module, 2, 4)
    run(module, x[:, :2], part(Sequence.dense(4), 0, 2), memory, state)
    state.reorder(rows)
    taken: Memory = memory.take(rows)
    y: Tensor = run(module, x[rows, 2:], part(Sequence.dense(4), 2, 4), taken, state)
    same(y, expected[rows, 2:], "after its rows were reordered (beam search) it differs by {}".format)


@PROPERTIES("a state holds as many columns as it was created for", "Generation stops before the end of the context.")
@torch.no_grad()
def state_size(subject: Subject) -> str:
    module = causal(subject)
    sizes = []
    for columns in (LONG, 2 * LONG):
        state = state_of(subject, module, 1, columns)
        run(module, subject.x(1, columns - 1), Sequence.dense(columns - 1), state=state)
        run(module, subject.x(1, 1), Sequence.dense(1, start=columns - 1), state=state)
        wrong = [name for name, value in state.items() if value.shape[:1] != (1,)]
        if wrong:
            raise Violation(
                f"state['{wrong[0]}'] of one row has the shape {tuple(state[wrong[0]].shape)}, not (1, ...)"
            )
        sizes.append(sum(value.numel() for value in state.values()))
    if sizes[0] == sizes[1]:
        return f"constant: {sizes[0]} numbers a row"
    return f"grows: {(sizes[1] - sizes[0]) / LONG:.0f} numbers a row and column"


def _short(cuts: tuple[int, ...]) -> str:
    return str([*cuts]) if len(cuts) < 9 else f"[{', '.join(map(str, cuts[:8]))}, ...]"
