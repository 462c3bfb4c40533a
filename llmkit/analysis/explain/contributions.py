"""What each token of a row contributes, by any of the methods, as plain data for a table, a picture or the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.analysis.explain.attribution import integrated_gradients
from llmkit.analysis.explain.faithfulness import METHODS
from llmkit.analysis.explain.scored import ScoredRow
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import evaluating

ON_THE_PAGE = ("integrated gradients", "occlusion")


def contributions(
    model: LanguageModel, given: str | Mapping[str, Any], method: str, layers: bool = False, at: int | None = None
) -> dict[str, Any]:
    """Return the contributions of a row's tokens: what is explained, the tokens, and ``values`` for each place.

    Args:
        model: the model, whose weights need no gradients.
        given: a text, or a row with the head's fields.
        method: one of ``faithfulness.METHODS``.
        layers: integrated gradients at the output of each layer too.
        at: see ``ScoredRow``.

    Raises UserError as ``ScoredRow``, and when captum is not installed.
    """
    with evaluating(model):
        row = ScoredRow(model, given, at)
        facts: dict[str, Any] = {"explained": row.explained, "method": method, "tokens": row.tokens}
        if method != ON_THE_PAGE[0]:
            return {**facts, "values": {method: METHODS[method](row).tolist()}}
        places = {"embedding": None} | ({f"layer {n}": layer for n, layer in enumerate(row.layers)} if layers else {})
        found = {name: integrated_gradients(row, layer) for name, layer in places.items()}
    return {
        **facts,
        "difference": found["embedding"].difference,
        "missed": {name: one.missed for name, one in found.items()},
        "steps": {name: one.steps for name, one in found.items()},
        "complete": all(one.complete for one in found.values()),
        "values": {name: one.values_P.tolist() for name, one in found.items()},
    }
