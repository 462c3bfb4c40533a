"""A large corpus of mistakes in the shipped configs: every one is told by key and place, and none is accepted."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
from broken_configs import Broken, corpus, several_mistakes, shipped, write_data
from command import Result, llmkit
from test_cli_errors import JARGON

CORPUS = corpus()


class AcceptedError(Exception):
    """The run would have begun."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a few rows of each data set; a run in it ends where training would begin."""
    path = tmp_path_factory.mktemp("broken")
    write_data(path / "data")

    def accept(*args: object) -> None:
        raise AcceptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("LLMKIT_DATA", str(path / "data"))
        patch.setenv("STDLIB", str(path / "data" / "stdlib"))
        patch.setattr(pl.Trainer, "_run_stage", accept)
        yield path


def fit(name: str, text: str, words: tuple[str, ...] = ()) -> Result:
    Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    small = ("--trainer.enable_progress_bar", "false", "--trainer.devices", "1") if "devices" not in text else ()
    return llmkit("fit", "--config", f"{name}.yaml", *small, *words)


@pytest.mark.parametrize("config", [config for config in shipped() if not config.has("model.init_from")])
def test_the_shipped_config_itself_is_accepted(config, folder: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AcceptedError):
        fit(config.name, config.text, ("--trainer.accelerator", "cpu"))


def verdict(case: Broken) -> str:
    """What is wrong with the answer to a mistake; empty: nothing."""
    try:
        result = fit(case.name, case.text, case.words)
    except AcceptedError:
        return "ACCEPTED"
    except Exception as error:
        return f"TRACEBACK {type(error).__name__}: {error}"
    lines = [line.removeprefix("llmkit: error: ") for line in result.err.splitlines() if "llmkit: error: " in line]
    if result.code != 2 or not lines:
        return f"EXIT {result.code} {result.err}"
    if any(word in result.err for word in JARGON):
        return f"JARGON {result.err}"
    says = [text.replace("@", f"{case.name}.yaml:", 1) if text[0] == "@" else text for text in case.says]
    return "" if any(all(text in line for text in says) for line in lines) else f"UNCLEAR {says} {result.err}"


def test_every_mistake_is_told_by_key_place_and_remedy(folder: Path) -> None:
    assert len(CORPUS) >= 120
    assert len({(case.text, case.words) for case in CORPUS}) == len(CORPUS)
    told = {
        f"{case.kind} {number}: {case.name} {case.words or ''}": verdict(case) for number, case in enumerate(CORPUS)
    }
    bad = {name: text for name, text in told.items() if text}
    for name, text in bad.items():
        print(f"{name}\n    {text.strip()}")
    kinds = collections.Counter(case.kind for case in CORPUS)
    print(f"{len(CORPUS) - len(bad)} of {len(CORPUS)} told by key, place and remedy: {dict(kinds)}")
    assert not [text for text in bad.values() if not text.startswith("UNCLEAR")]
    assert len(bad) <= 0.05 * len(CORPUS)


SEVERAL = several_mistakes()


def test_mistakes_in_several_places_are_reported_together(folder: Path) -> None:
    """In one line each, with the place of each: two files and the command line are layers of one tree."""
    assert len(SEVERAL) >= 30
    bad = []
    for case in SEVERAL:
        Path("base.yaml").write_text(case.base, encoding="utf-8")
        Path("overlay.yaml").write_text(case.overlay, encoding="utf-8")
        result = llmkit("fit", "--config", "base.yaml", "--config", "overlay.yaml", *case.words)
        lines = [line for line in result.err.splitlines() if line.startswith("llmkit: error: ")]
        found = [sum(all(text in line for text in says) for line in lines) for says in case.says]
        if result.code != 2 or len(lines) != len(case.says) or set(found) != {1}:
            bad.append(f"{case.name} {case.words} {case.says}\n    {result.err}")
        assert not any(word in result.err for word in JARGON), result.err
    print("\n".join(bad))
    assert not bad
