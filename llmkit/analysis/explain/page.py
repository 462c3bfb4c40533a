"""Explanations as one page, which opens in any browser without a network."""

from __future__ import annotations

import base64
import html
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.analysis.explain.explanation import Explanation
from llmkit.analysis.explain.maps import Map
from llmkit.study import page

PLAIN = 256 * 256
"""Most cells of a picture that has four digits; larger ones have two and are packed."""
LABEL = 60

LIMITS = (
    "A large weight says that much is taken from a token, not that the answer would change without it: other tokens "
    "may hold the same (Jain and Wallace 2019, arXiv:1902.10186).",
    "How much arrives also depends on the size of what is taken, the values: a token with a large weight may have next "
    "to nothing to give (Kobayashi et al. 2020, arXiv:2004.10102).",
    "A map is of one layer. Its inputs are states in which earlier layers have mixed tokens already, and each layer "
    "adds to a stream that passes by its map.",
    "A contribution is relative to a text of mask tokens, which most models never saw; of two words that say the same "
    "occlusion counts neither.",
    "A Jacobian norm is how much an output would change with an input close to this text; it is not a share, and its "
    "sizes cannot be compared with weights.",
)
"""What the page does not show."""


def page_of(explanations: list[Explanation], checkpoint: str) -> str:
    """Return the page of explanations, at least one."""
    here = Path(__file__)
    data = json.dumps({"rows": [_row(one) for one in explanations]}, ensure_ascii=False, separators=(",", ":"))
    style, script = (here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    body = BODY.format(
        checkpoint=html.escape(checkpoint),
        limits=page.bullets(LIMITS),
        style=style,
        script=script,
        # Text of users stands in it: nothing in it may end the element.
        data=data.replace("<", "\\u003c"),
    )
    return page.page(f"What the answers of {Path(checkpoint).name} rest on", body)


BODY = """\
<style>
{style}</style>
<h1>What the answer rests on</h1>
<p class="more">{checkpoint}</p>
<p id="shown" class="shown"></p>
<div class="controls">
<label>Row <select id="row"></select></label>
<label>Layer <select id="map"></select></label>
<label>Head <select id="head"></select></label>
</div>
<p id="how" class="more"></p>
<h2>In the text</h2>
<p id="hint" class="more"></p>
<div id="lines"></div>
<div id="numbers" aria-live="polite"></div>
<h2>As a map</h2>
<label class="more"><input type="checkbox" id="own"> shade each row by its own largest</label>
<div id="box" class="picture"><canvas id="canvas" role="img"></canvas></div>
<p id="tip" class="more"></p>
<p id="legend" class="more"></p>
<section id="contributions">
<h2>What each token contributes</h2>
<div class="controls"><label>Method <select id="method"></select></label></div>
<p id="of" class="more"></p>
<div id="shares" class="tokens"></div>
<p id="share" class="more"></p>
</section>
<h2>All layers and heads</h2>
<p id="many" class="more">Too many numbers to draw at once: choose a layer and a head above.</p>
<div id="all"></div>
<h2>What this does not show</h2>
{limits}
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>"""


def _row(one: Explanation) -> dict[str, Any]:
    first = next(iter(one.row.values()), "")
    label = " ".join(" ".join(map(str, first if isinstance(first, list) else [first])).split())
    return {
        "label": label if len(label) <= LABEL else f"{label[: LABEL - 3]}...",
        "shown": one.shown,
        "texts": [vars(text) for text in one.texts],
        "maps": [_map(found) for found in one.maps],
        "contributions": [_contributed(found) for found in one.contributions],
    }


def _contributed(facts: dict[str, Any]) -> dict[str, Any]:
    """Return contributions for the page: of the tokens as they are read, with three digits, and what they add up to."""
    (values,) = facts["values"].values()
    says = f"{facts['method']} of: {facts['explained']}"
    if "difference" in facts:
        says += (
            f". They add up to {sum(values):+.4g}; the score is {facts['difference']:+.4g} above that of masks alone"
        )
    return {
        "name": facts["method"],
        "says": f"{says}.",
        "tokens": facts["tokens"],
        "values": [float(f"{value:.3g}") for value in values],
    }


def _map(one: Map) -> dict[str, Any]:
    weights_HTS = one.weights_HTS.float().numpy()
    large = weights_HTS[0].size > PLAIN
    heads = []
    for name, weights_TS in zip(one.heads, weights_HTS, strict=True):
        largest = float(np.abs(weights_TS).max(initial=0.0))
        raw = _roots(weights_TS, largest, large).tobytes()
        packed = base64.b64encode(zlib.compress(raw, 6) if large else raw).decode("ascii")
        heads.append({"name": name, "largest": largest, "data": packed})
    return {
        **{name: getattr(one, name) for name in ("stack", "layer", "part", "variant", "kind", "how", "query", "key")},
        "shape": list(weights_HTS.shape[1:]),
        "signed": bool((weights_HTS < 0).any()),
        "bits": 8 if large else 16,
        "packed": large,
        "heads": heads,
    }


def _roots(weights_TS: npt.NDArray[np.float32], largest: float, large: bool) -> npt.NDArray[np.int16]:
    """Return square roots relative to the largest, with their sign: small weights keep their digits."""
    kind, top = ("int8", 127) if large else ("<i2", 32767)
    roots = np.sign(weights_TS) * np.sqrt(np.abs(weights_TS) / (largest or 1.0))
    found: npt.NDArray[np.int16] = np.round(roots * top).astype(kind)
    return found
