"""Pictures of what was measured: scores of heads, losses by layer, probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmkit.analysis.explain.patterns import PATTERNS, HeadScores, Scored
from llmkit.analysis.explain.probing import Probed
from llmkit.run.drawing import BLACK, COLOURS, GREY, canvas, panel_grid, save, style

TITLES = {
    "induction": "induction: what followed last time",
    "previous": "previous token",
    "duplicate": "the same token before",
    "first": "first token",
    "self": "the token itself",
}


def heads_of_one(scores: Sequence[HeadScores], path: Path) -> None:
    """Draw the scores of one model: a panel for each pattern, layers by heads."""
    layers = max(one.layer for one in scores) + 1
    by_layer = [[one for one in scores if one.layer == layer] for layer in range(layers)]
    width = max(map(len, by_layer))
    named = all(one.head.startswith("head ") for one in scores)
    with style():
        figure, axes = panel_grid(len(PATTERNS), 1.0 + 0.28 * layers, 3)
        for axis, pattern in zip(axes, PATTERNS, strict=True):
            table = [[getattr(one, pattern) for one in row] + [float("nan")] * (width - len(row)) for row in by_layer]
            image = axis.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axis.set_title(TITLES[pattern])
            axis.set_xticks(range(width))
            axis.set_yticks(range(layers))
            axis.set(xlabel="head" if named else "map", ylabel="layer")
            for spine in axis.spines.values():
                spine.set_visible(False)
            if width <= 12:
                for layer, row in enumerate(by_layer):
                    for place, one in enumerate(row):
                        value = getattr(one, pattern)
                        colour = "white" if value > 0.6 else BLACK
                        axis.text(place, layer, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=6)
        figure.colorbar(image, ax=axes, label="share of the weight", shrink=0.6, aspect=40)
        save(figure, path)


def heads_over_steps(steps: Sequence[int], found: Sequence[Scored], even: HeadScores, path: Path) -> None:
    """Draw the scores of each head over the steps of a run, and the loss of the first and the second copy."""
    heads = [(one.layer, one.head) for one in found[0].scores]
    losses = [one.losses for one in found]
    with style():
        figure, axes = panel_grid(len(PATTERNS) + any(losses), 1.9, 3, sharex=True)
        for axis, pattern in zip(axes, PATTERNS, strict=False):
            for number, (layer, head) in enumerate(heads):
                first = next(place for place, one in enumerate(heads) if one[0] == layer)
                values = [getattr(one.scores[number], pattern) for one in found]
                look = ("-", "--", ":", "-.")[(number - first) % 4]
                label = f"layer {layer}, {head}"
                axis.plot(
                    steps, values, look, color=COLOURS[layer % len(COLOURS)], label=label, marker="o", markersize=2
                )
            axis.axhline(
                getattr(even, pattern), color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), label="even attention"
            )
            axis.set(title=TITLES[pattern], ylim=(-0.03, 1.03))
            axis.grid(alpha=0.5)
        if any(losses):
            for copy, name in enumerate(("first copy", "second copy")):
                values = [one[copy] if one else float("nan") for one in losses]
                axes[-1].plot(steps, values, label=name, color=(BLACK, GREY)[copy], marker="o", markersize=2)
            axes[-1].set(title="loss of repeated random tokens (nats)")
            axes[-1].grid(alpha=0.5)
            axes[-1].legend()
        for axis in axes:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("optimizer step")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        save(figure, path)


def by_layer(title: str, ylabel: str, curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw values by layer, 0 being the states before the first one."""
    with style():
        figure = canvas(4.6, 2.8)
        axis = figure.add_subplot()
        for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
            axis.plot(range(len(values)), values, label=name, color=colour, marker="o")
        axis.set(title=title, xlabel="layers passed", ylabel=ylabel)
        axis.set_xticks(range(len(next(iter(curves.values())))))
        axis.grid(alpha=0.5)
        if len(curves) > 1:
            axis.legend()
        save(figure, path)


def probes(found: Sequence[Probed], most: float, path: Path) -> None:
    """Draw the accuracies of a probe by layer, with those on the control task and of the most frequent label."""
    with style():
        figure = canvas(4.6, 2.8)
        axis = figure.add_subplot()
        layers = [one.layer for one in found]
        errors = [  # an accuracy of 1 may be above its interval by rounding
            [max(0.0, one.accuracy - one.interval[0]) for one in found],
            [max(0.0, one.interval[1] - one.accuracy) for one in found],
        ]
        accuracies = [one.accuracy for one in found]
        axis.errorbar(layers, accuracies, yerr=errors, color=COLOURS[0], marker="o", capsize=2, label="labels")
        axis.plot(layers, [one.control for one in found], "--", color=COLOURS[1], marker="s", label="control task")
        axis.axhline(most, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), label="most frequent label")
        axis.set(xlabel="layers passed", ylabel="accuracy on texts not fitted", ylim=(0, 1.02))
        axis.set_xticks(layers)
        axis.grid(alpha=0.5)
        axis.legend()
        save(figure, path)


def contributions(tokens: Sequence[str], rows: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the contributions of tokens, a line for each layer, blue for what speaks for the answer, red against it."""
    most = max(abs(value) for values in rows.values() for value in values) or 1.0
    with style():
        figure = canvas(max(3.5, 1.6 + 0.16 * min(len(tokens), 120)), 1.5 + 0.2 * len(rows))
        axis = figure.add_subplot()
        image = axis.imshow(list(rows.values()), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        axis.set_yticks(range(len(rows)), list(rows))
        if len(tokens) <= 120:
            axis.set_xticks(range(len(tokens)), [token.strip() or "\N{OPEN BOX}" for token in tokens], rotation=90)
        else:
            axis.set_xlabel("token")
        figure.colorbar(image, ax=axis, label="contribution", shrink=0.9)
        save(figure, path)
