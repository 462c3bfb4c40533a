"""The parametric surface L = E + A / N^alpha + B / D^beta, fitted in two ways.

Variable projection (Golub and Pereyra 1973) searches alpha and beta only: E, A and B are the solution of a linear least
squares problem without negative coefficients. The Huber fit is approach 3 of arXiv:2203.15556, as arXiv:2404.10102
repeated it: all five parameters by BFGS on log losses, from many starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import UserError

Floats = NDArray[np.float64]
DELTA = 1e-3
"""Of the Huber loss on log losses (arXiv:2203.15556)."""
LOW, HIGH = 0.005, 5.0
"""Between these the exponents are searched."""
ROBUST = 1.345
"""Residuals beyond so many standard deviations count less: Huber's M-estimator, 95 % efficient for normal noise."""
STARTS = (np.arange(0, 30, 5.0), np.arange(0, 30, 5.0), np.arange(-1, 1.5, 0.5), *[np.arange(0, 2.5, 0.5)] * 2)
"""Hoffmann's grid of log A, log B, log E, alpha and beta: 4,500 starts."""


def scipy_part(name: str) -> Any:
    """Return a module of scipy. Raises UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError:
        raise UserError("fitting scaling laws needs the package scipy: pip install 'llmkit[study]'") from None


class Cost(NamedTuple):
    """What training costs: C = ``k`` N^``gamma`` D. Six FLOPs for each parameter and token, or as they were counted."""

    k: float = 6.0
    gamma: float = 1.0

    def exponent(self, alpha: float, beta: float) -> float:
        """Return the exponent a of N* = G C^a on a surface."""
        return beta / (alpha + self.gamma * beta)

    @classmethod
    def counted(cls, N: Floats, D: Floats, C: Floats) -> Cost:
        """Return the power law that is closest to counted FLOPs."""
        gamma, offset = np.polyfit(np.log(N) - np.log(N).mean(), np.log(C / D), 1)
        return cls(float(np.exp(offset - gamma * np.log(N).mean())), float(gamma))


SIX = Cost()


class Surface(NamedTuple):
    """Five numbers: the loss that remains, and how fast the rest falls with parameters and tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: Any, D: Any) -> Any:
        """Return the loss of models with ``N`` parameters after ``D`` tokens."""
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    @property
    def exponent(self) -> float:
        """The exponent a of the best size for a budget, N* = G C^a, where C = 6 N D."""
        return SIX.exponent(self.alpha, self.beta)

    def optimum(self, C: Any, cost: Cost) -> tuple[Any, Any]:
        """Return the parameters and tokens with the least loss for a budget ``C`` of FLOPs."""
        power = self.alpha + cost.gamma * self.beta
        ratio = (self.alpha * self.A / (cost.gamma * self.beta * self.B)) ** (1 / power)
        size = ratio * (C / cost.k) ** (self.beta / power)
        return size, C / cost.k / size**cost.gamma

    def frontier(self, C: Any, cost: Cost) -> Any:
        """Return the least loss for a budget."""
        return self.loss(*self.optimum(C, cost))


class Fit(NamedTuple):
    """A surface and how well it fits."""

    surface: Surface
    residuals: Floats
    """(predicted - measured) / measured loss, one a run."""
    weights: Floats
    """Of each run; below 1 for outliers."""
    objective: float


class _Centred(NamedTuple):
    """Runs with N and D divided by their geometric means, so that the powers of both are of the size of 1."""

    n: Floats
    d: Floats
    loss: Floats
    middle: tuple[float, float]

    @classmethod
    def of(cls, N: Floats, D: Floats, loss: Floats) -> _Centred:
        middle = (float(np.exp(np.log(N).mean())), float(np.exp(np.log(D).mean())))
        return cls(np.log(N / middle[0]), np.log(D / middle[1]), loss, middle)

    def surface(self, E: float, a: float, b: float, alpha: float, beta: float) -> Surface:
        """Return the surface whose coefficients are ``a`` and ``b`` at the means."""
        with np.errstate(over="ignore"):
            return Surface(E, float(a * self.middle[0] ** alpha), float(b * self.middle[1] ** beta), alpha, beta)


class _Point(NamedTuple):
    """What variable projection knows at one (alpha, beta)."""

    cost: float
    coefficients: Floats
    residuals: Floats
    jacobian: Floats
    """(runs, 2), by the logarithms of alpha and beta, after the linear part has adapted (Kaufman 1975)."""


def _project(runs: _Centred, logs: Floats, weights: Floats, E: float | None) -> _Point:
    """Solve the linear part at the logarithms of (alpha, beta); ``E``: held fixed."""
    alpha, beta = np.exp(logs)
    basis = np.stack([np.ones_like(runs.n), np.exp(-alpha * runs.n), np.exp(-beta * runs.d)], axis=1)
    root = np.sqrt(weights)
    scaled = basis * (root / runs.loss)[:, None]
    target = root if E is None else root * (1 - E / runs.loss)
    free = scaled if E is None else scaled[:, 1:]
    found = scipy_part("optimize").nnls(free, target)[0]
    residuals = free @ found - target
    orthogonal = np.linalg.qr(free[:, found > 0])[0]
    moves = np.stack([-alpha * runs.n * scaled[:, 1] * found[-2], -beta * runs.d * scaled[:, 2] * found[-1]], axis=1)
    moves -= orthogonal @ (orthogonal.T @ moves)
    coefficients = found if E is None else np.array([E, *found])
    return _Point(float(residuals @ residuals), coefficients, residuals, moves)


def _descend(
    point_at: Callable[[Floats], _Point], start: Floats, free: Floats, tolerance: float
) -> tuple[Floats, _Point]:
    """Levenberg and Marquardt's method over what is ``free``: columns of (2, k) by which the logarithms move."""
    low, high = np.log(LOW), np.log(HIGH)
    logs, damping = np.clip(start, low, high), 1e-3
    here = point_at(logs)
    for _ in range(60):
        jacobian = here.jacobian @ free
        gradient, curvature = jacobian.T @ here.residuals, jacobian.T @ jacobian
        step = np.linalg.lstsq(curvature + damping * np.diag(np.diag(curvature) + 1e-300), -gradient, rcond=None)[0]
        there = np.clip(logs + free @ step, low, high)
        moved = float(np.abs(there - logs).max())
        other = point_at(there)
        if other.cost <= here.cost:
            logs, here, damping = there, other, max(damping / 10, 1e-12)
            if moved < tolerance:
                break
        else:
            damping *= 10
            if moved < tolerance or damping > 1e12:
                break
    return logs, here


def project(
    N: Floats,
    D: Floats,
    loss: Floats,
    *,
    start: Surface | None = None,
    weights: Floats | None = None,
    E: float | None = None,
    held: tuple[str, float] | None = None,
    tolerance: float = 1e-10,
) -> Fit:
    """Fit by variable projection: least squares of relative residuals, robust against outliers.

    Args:
        N: parameters of each run.
        D: tokens of each run.
        loss: of each run, in any unit.
        start: near the solution; None: a grid is searched.
        weights: of the runs. None: 1, and less for outliers (Huber's M-estimator, scale by the median).
        E: holds the loss that remains fixed.
        held: ("alpha", "beta" or "exponent", value): holds that fixed.
        tolerance: steps of log alpha and log beta below it end the search.
    """
    runs = _Centred.of(N, D, loss)
    given = np.ones_like(loss) if weights is None else weights

    def fit(start: Floats | None, weights: Floats) -> tuple[Floats, _Point]:
        def point(logs: Floats) -> _Point:
            return _project(runs, logs, weights, E)

        free, along = _free(held)
        if start is not None:
            return _descend(point, along(start), free, tolerance)
        grid = np.log(np.geomspace(0.05, 2, 8))
        starts = {tuple(along(np.array(pair))): None for pair in itertools.product(grid, grid)}
        best = sorted(starts, key=lambda logs: point(np.array(logs)).cost)[:3]
        return min((_descend(point, np.array(logs), free, tolerance) for logs in best), key=lambda found: found[1].cost)

    if start is None:
        logs, found = fit(None, given)
        plain = found.residuals / np.sqrt(given)
    else:
        logs, plain = np.log(np.clip([start.alpha, start.beta], LOW, HIGH)), start.loss(N, D) / loss - 1
    for turn in range(20):
        if weights is None:
            before, given = given, _robust(plain)
            if (start is None or turn) and np.abs(given - before).max() < max(1e-4, tolerance**0.5):
                break
        logs, found = fit(logs, given)
        if weights is not None:
            break
        plain = found.residuals / np.sqrt(given)
    alpha, beta = np.exp(logs)
    surface = runs.surface(*map(float, (*found.coefficients, alpha, beta)))
    return Fit(surface, found.residuals / np.sqrt(given), given, found.cost)


def _robust(residuals: Floats) -> Floats:
    """Return Huber's weights, with the scale of the median; all 1 where there is no noise to speak of."""
    count = len(residuals)
    scale = 1.4826 * float(np.median(np.abs(residuals))) * (count / max(count - 5, 1)) ** 0.5
    if scale <= 1e-9:
        return np.ones_like(residuals)
    return np.asarray(np.minimum(1, ROBUST * scale / np.maximum(np.abs(residuals), 1e-300)), float)


def _free(held: tuple[str, float] | None) -> tuple[Floats, Callable[[Floats], Floats]]:
    """Return how log (alpha, beta) may move, (2, k), and what puts a start on that line."""
    if held is None:
        return np.eye(2), lambda logs: logs
    name, value = held
    if name == "exponent":  # beta / alpha = a / (1 - a)
        gap = float(np.log(value / (1 - value)))
        return np.ones((2, 1)), lambda logs: logs.mean() + np.array([-gap / 2, gap / 2])
    index = ("alpha", "beta").index(name)
    return np.eye(2)[:, [1 - index]], lambda logs: np.where(np.arange(2) == index, np.log(value), logs)


def huber(N: Floats, D: Floats, loss: Floats, *, start: Surface | None = None, refine: int = 12) -> Fit:
    """Fit approach 3: the summed Huber loss of log residuals, over log A, log B, log E, alpha and beta.

    Args:
        N: parameters of each run.
        D: tokens of each run.
        loss: of each run, in nats.
        start: near the solution; None: the best ``refine`` of Hoffmann's grid of starts are followed.
        refine: how many.
    """
    runs, target = _Centred.of(N, D, loss), np.log(loss)
    shift = np.log(runs.middle)

    def objective(x: Floats) -> tuple[Floats, Floats]:
        """Of one or more starts, (..., 5): the value, and the gradient."""
        a, b, e, alpha, beta = np.moveaxis(x, -1, 0)[..., None]
        terms = np.stack([a - alpha * runs.n, b - beta * runs.d, e + np.zeros_like(runs.n)])
        total = np.logaddexp.reduce(terms, axis=0)
        residuals = total - target
        size = np.abs(residuals)
        value = np.where(size <= DELTA, residuals**2 / 2, DELTA * (size - DELTA / 2)).sum(-1)
        slope = np.clip(residuals, -DELTA, DELTA) * np.exp(terms - total)
        gradient = [*slope.sum(-1), -(slope[0] * runs.n).sum(-1), -(slope[1] * runs.d).sum(-1)]
        return value / DELTA, np.stack(gradient, axis=-1) / DELTA

    if start is not None:
        coefficients = np.log([start.A, start.B, max(start.E, 1e-3)])
        first = [*coefficients[:2] - shift * [start.alpha, start.beta], coefficients[2], start.alpha, start.beta]
        starts = [np.array(first)]
    else:
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*STARTS, indexing="ij")], axis=1)
        grid[:, :2] -= grid[:, 3:] * shift
        values = np.concatenate([objective(rows)[0] for rows in np.array_split(grid, 20)])
        starts = list(grid[np.argsort(values, kind="stable")[:refine]])
    minimize = scipy_part("optimize").minimize
    options = {"gtol": 1e-9, "maxiter": 2000}
    with np.errstate(over="ignore", under="ignore"):
        found = [minimize(objective, x, jac=True, method="BFGS", options=options) for x in starts]
    best = min(found, key=lambda result: result.fun)
    a, b, e, alpha, beta = map(float, best.x)
    surface = runs.surface(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta)
    residuals = surface.loss(N, D) / loss - 1
    return Fit(surface, residuals, np.ones_like(loss), float(best.fun) * DELTA)


def conditions(surface: Surface, N: Floats, D: Floats) -> dict[str, float]:
    """Return the condition of the Hessian of the squared residuals at a surface.

    ``five`` is that of (A, B, E, alpha, beta), ``five_log`` that of their logarithms, and ``projected`` that of
    (alpha, beta) where E, A and B always are the best ones: what variable projection searches.
    """
    loss = surface.loss(N, D)
    x, y = N**-surface.alpha, D**-surface.beta
    by_alpha, by_beta = -surface.A * x * np.log(N), -surface.B * y * np.log(D)
    jacobian = np.stack([x, y, np.ones_like(x), by_alpha, by_beta], axis=1)
    orthogonal = np.linalg.qr(jacobian[:, :3] / np.linalg.norm(jacobian[:, :3], axis=0))[0]
    rest = jacobian[:, 3:] - orthogonal @ (orthogonal.T @ jacobian[:, 3:])
    values = np.array([surface.A, surface.B, surface.E, surface.alpha, surface.beta])
    kinds = {"five": jacobian, "five_log": jacobian * values / loss[:, None], "projected": rest}
    return {name: float(np.linalg.cond(matrix) ** 2) for name, matrix in kinds.items()}
