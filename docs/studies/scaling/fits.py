"""The oracles of the scaling fits in full: published figures, exact surfaces, and the coverage of intervals.

    python docs/studies/scaling/fits.py [--draws 4000] [--samples 200] [--data FOLDER]

Takes about ten minutes. What it printed last is in docs/studies/scaling/fits.txt. FOLDER: with ``epoch_chinchilla/``
and ``isoflops/``, the tables of arXiv:2404.10102 and of Open Athena's digitisations.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from llmkit.study.scaling.isoflop import budgets, parabola, power_law
from llmkit.study.scaling.runs import read
from llmkit.study.scaling.surface import SIX, Fit, Floats, Surface, conditions, huber, project
from llmkit.study.scaling.uncertainty import bootstrap, predict, profile, quantiles

HOFFMANN = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
NAMES = ("E", "A", "B", "alpha", "beta")


def grid(surface: Surface, around: Floats, count: int, seeds: int = 1) -> tuple[Floats, Floats]:
    """Return N and D of runs at ``count`` budgets from 1e17 to 1e21, with sizes ``around`` the best one (times)."""
    C = np.repeat(np.geomspace(1e17, 1e21, count), len(around) * seeds)
    N = surface.optimum(C, SIX)[0] * np.tile(np.repeat(around, seeds), count)
    return N, C / 6 / N


def row(title: str, values: Floats | Surface) -> None:
    """Print a line of five numbers."""
    print(f"  {title:32}", *(f"{name} {value:.6g}" for name, value in zip(NAMES, values, strict=True)), sep="  ")


def epoch(data: Path, draws: int) -> None:
    """Fit Epoch AI's 240 points, and bootstrap both fits."""
    file = data / "epoch_chinchilla" / "svg_extracted_data.csv"
    (runs,) = read([str(file)], "N=Model Size,C=Training FLOP,L=loss", ["loss<3.44"]).values()
    print(f"Epoch AI's points ({len(runs)}), {draws} bootstrap samples")
    row("published", Surface(1.8172, 477.84, 2143.86, 0.34731, 0.36718))
    fit = huber(runs.N, runs.D, runs.L)
    row(f"Huber, objective {fit.objective:.11f}", fit.surface)
    row("published standard errors", np.array([0.026, 124.5, 1293.3, 0.015, 0.021]))

    def again(N: Floats, D: Floats, loss: Floats, start: Surface) -> Fit:
        return huber(N, D, loss, start=start)

    row("Huber, standard errors", np.std(bootstrap(runs.N, runs.D, runs.L, fit.surface, draws, again), axis=0))
    fit = project(runs.N, runs.D, runs.L)
    row("variable projection", fit.surface)
    row("its standard errors", np.std(bootstrap(runs.N, runs.D, runs.L, fit.surface, draws), axis=0))


def tables(data: Path) -> None:
    """Fit the isoFLOP tables by parabolas."""
    print("isoFLOP tables: exponents of N* and D*; published .495 / .505 and .513 / .488")
    for file in sorted((data / "isoflops").glob("*.csv")):
        (runs,) = read([str(file)], "N=params,D=tokens,L=loss,budget=budget").values()
        found = []
        for size in (runs.N, runs.D):
            assert runs.budget is not None
            groups = budgets(runs.C, runs.budget)
            curves = [parabola(float(runs.budget[group[0]]), group, size, runs.L) for group in groups]
            for law in (power_law(one._replace(refused="") for one in curves), power_law(curves)):
                assert law is not None
                found.append(law.exponent)
        print(f"  {file.stem}: {found[0]:.3f} / {found[2]:.3f}; used vertices {found[1]:.3f} / {found[3]:.3f}")


def exact() -> None:
    """Fit surfaces without noise."""
    print("Surfaces without noise: largest relative error of the five parameters; condition of the Hessian")
    surfaces = {
        "Hoffmann": HOFFMANN,
        "alpha = beta": HOFFMANN._replace(alpha=0.31, beta=0.31),
        "asymmetric": HOFFMANN._replace(alpha=0.465, beta=0.155),
        "Epoch, off centre": Surface(1.8172, 477.84, 2143.86, 0.34731, 0.36718),
    }
    for name, surface in surfaces.items():
        around = np.geomspace(1 / 8, 8, 15) * (4 if "off" in name else 1)
        N, D = grid(surface, around, 5)
        errors = []
        for fit in (project(N, D, surface.loss(N, D)), huber(N, D, surface.loss(N, D))):
            errors.append(max(abs(a / b - 1) for a, b in zip(fit.surface, surface, strict=True)))
        found = conditions(surface, N, D)
        print(
            f"  {name:18} variable projection {errors[0]:.0e}, Huber {errors[1]:.0e}; condition of five "
            f"parameters {found['five']:.1e}, of their logarithms {found['five_log']:.1e}, "
            f"of the projection {found['projected']:.2g}"
        )


def coverage(samples: int) -> None:
    """Simulate studies, and count how often nominal 90 % intervals contain the truth."""
    print(f"Coverage of 90 % intervals, {samples} simulated studies each, 200 bootstrap samples")
    for title, count, sizes, seeds, noise in (
        ("5 budgets x 5 sizes, noise 0.5 %", 5, 5, 1, 0.005),
        ("5 budgets x 5 sizes x 3 seeds, 1 %", 5, 5, 3, 0.01),
    ):
        N, D = grid(HOFFMANN, np.geomspace(1 / 6, 6, sizes), count, seeds)
        C = np.repeat([1e21, 4e21, 1e22], 3)
        n = HOFFMANN.optimum(C, SIX)[0] * np.tile([0.5, 1, 2], 3)
        chance, inside, names = np.random.default_rng(0), np.zeros(3), ("alpha", "beta", "exponent", "E")
        hits = {kind: dict.fromkeys(names, 0) for kind in ("bootstrap", "profile")}

        def draw(count: int, noise: float = noise, chance: np.random.Generator = chance) -> Floats:
            return np.asarray(1 + noise * chance.standard_normal(count))

        for sample in range(samples):
            loss = HOFFMANN.loss(N, D) * draw(len(N))
            fit = project(N, D, loss)
            drawn = bootstrap(N, D, loss, fit.surface, 200, seed=sample)
            _, low, high = predict(fit, drawn, n, C / 6 / n, seed=sample)
            measured = HOFFMANN.loss(n, C / 6 / n) * draw(len(n))
            inside += ((low <= measured) & (measured <= high)).reshape(3, 3).sum(1)
            for name in names:
                ends = {
                    "bootstrap": quantiles([getattr(one, name) for one in drawn]),
                    "profile": profile(N, D, loss, fit, name),
                }
                for kind, (a, b) in ends.items():
                    hits[kind][name] += a <= getattr(HOFFMANN, name) <= b
        shares = ", ".join(f"{share:.1%}" for share in inside / 3 / samples)
        print(f"  {title}: runs at 1, 4 and 10 times the largest budget {shares}")
        for kind, by_name in hits.items():
            print(f"    {kind:10}", ", ".join(f"{name} {hit / samples:.1%}" for name, hit in by_name.items()))


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LLMKIT_DATA", "."), "scaling_laws"))
    options = parser.parse_args()
    exact()
    if options.data.is_dir():
        tables(options.data)
        epoch(options.data, options.draws)
    coverage(options.samples)


if __name__ == "__main__":
    main()
