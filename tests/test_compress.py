"""Compression: what the methods do to weights, and checkpoints of compressed models."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import done, llmkit
from torch import Tensor, nn

from llmkit import LanguageModel, UserError, compress, load, plugin, registry
from llmkit.analysis.compress.chain import _batches, calibration_of
from llmkit.analysis.compress.frontier import _notes
from llmkit.analysis.compress.measure import paired
from llmkit.checkpoint.content import Stored, checked, section
from llmkit.compression import Packed, matrices
from llmkit.contracts import Tokenizer
from llmkit.ops.backend import multiplies_packed
from llmkit.sequence import DecodingOptions
from llmkit.testing import check
from llmkit.testing.head.examples import FIELDS
from llmkit_plugins.compression.gptq import output_error, round_columns
from llmkit_plugins.compression.int4 import Int4Matrix, packed, unpacked
from llmkit_plugins.compression.int8 import Int8Matrix

OLD = Path(__file__).parent / "old_checkpoints" / "translation.ckpt"
FEW = DecodingOptions(max_new_tokens=2)
TEXTS = ["a text to learn", "another one is"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found: Tokenizer = plugin("tokenizer", "byte")()
    return found


def scrambled(tokenizer: Tokenizer, **parts: Any) -> LanguageModel:
    """A small model, built, whose weights are far from their initial values."""
    model = LanguageModel(**{"dim": 16, "num_layers": 1, "context": 64, **parts})
    model.tokenizer, model.head_ready = tokenizer, True
    model.head.learn(FIELDS)
    model.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def parts_of(model: LanguageModel) -> nn.ModuleDict:
    return nn.ModuleDict({"net": model.network, "head": model.head})


def rows_of(model: LanguageModel, count: int = 4) -> list[dict[str, Any]]:
    """Rows that a head can be trained on."""
    fields = (*model.head.inputs, *model.head.targets)
    return [{name: FIELDS[name][number] for name in fields} for number in range(count)]


def content(model: LanguageModel) -> dict[str, Any]:
    assert model.tokenizer is not None
    part = section(model.spec, model.tokenizer, model.head, {}, model.compression)
    return {"llmkit": json.loads(json.dumps(part)), "state_dict": model.state_dict()}


def again(stored: Mapping[str, Any]) -> LanguageModel:
    """The model that comes out of the content of a checkpoint."""
    return LanguageModel.of_checkpoint(Stored(Path("x.ckpt"), checked(stored, "checkpoint x.ckpt"))).eval()


def forms(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def loss(model: LanguageModel) -> float:
    return calibration_of(model, _batches(model, rows_of(model))).loss()


def reached(model: LanguageModel, name: str) -> Tensor:
    """A weight as the network's code reads it."""
    where, _, last = name.rpartition(".")
    found = getattr(model.get_submodule(where), last)
    assert isinstance(found, Tensor)
    return found.detach()


VARIANTS = [{"attention": name} for name in registry.entries("attention") if name != "pattern"]
HEADS = [{"head": name} for name in registry.entries("head") if name != "generation"]
PATTERN = {"attention": {"name": "pattern", "variants": ["gru", "linear"]}, "num_layers": 2}
THREE = {"name": "multi_head", "num_heads": 3}
UNTIED = {
    "tie_embeddings": False,
    "output_bias": True,
    "position": "learned",
    "dim": 15,
    "attention": {"name": "multi_head", "num_heads": 3},
}


@pytest.mark.parametrize(
    "parts", [*VARIANTS, PATTERN, UNTIED, *HEADS], ids=lambda parts: "-".join(map(str, parts.values()))[:40]
)
def test_every_variant_and_head(parts: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Every weight stays within half a step; the model that is built again from its checkpoint computes the same."""
    model = scrambled(tokenizer, **parts)
    original = {one.name: one.weight.detach() for one in matrices(parts_of(model))}
    for method in ("int8", "int4"):
        small = compress(model, method)
        assert not [name for name, weight in small.named_parameters() if weight.dim() == 2 and min(weight.shape) > 1]
        for name, weight in original.items():
            form: Any = small.get_submodule(re.sub(r"\.(\w+)$", r".packed_\1", name))
            width = form.group if method == "int4" else weight.shape[1]
            step = form.scale.float().repeat_interleave(width, 1)[:, : weight.shape[1]]
            assert ((reached(small, name) - weight).abs() <= step / 2 * (1 + 1e-5)).all(), name
        back = again(content(small))
        state, other = small.state_dict(), back.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
        assert loss(back) == loss(small) != loss(model)
    assert "packed" not in str(model.state_dict().keys())  # which has not changed


@pytest.mark.parametrize("method", ["bf16", "dynamic_int8", "gptq:4", "int8+bf16"])
@pytest.mark.parametrize("parts", [{"attention": "latent"}, {"attention": "lstm"}, {"head": "classification"}], ids=str)
def test_methods_come_back_from_a_checkpoint(method: str, parts: dict[str, Any], tokenizer: Tokenizer) -> None:
    model = scrambled(tokenizer, **parts)
    rows = rows_of(model, 2)
    small = compress(model, method, rows)
    back = again(content(small))
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in small.state_dict().items())
    assert back.predict(rows, FEW) == small.predict(rows, FEW)


@pytest.mark.parametrize("name", ["bf16", "dynamic_int8", "gptq", "int4", "int8"])
def test_methods_have_what_is_checked_of_every_one(name: str) -> None:
    report = check("compression", name)
    assert not report.failed, str(report)


def test_int4_packs_bit_for_bit() -> None:
    every = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).flatten()[None]
    assert packed(every).tolist() == [[(a + 8) | (b + 8) << 4 for a in range(-8, 8) for b in range(-8, 8)]]
    assert torch.equal(unpacked(packed(every)), every.to(torch.int8))


def test_dynamic_int8_computes_what_torch_does(tokenizer: Tokenizer) -> None:
    """Linear maps, an LSTM and a GRU by torch.ao's own modules, of the same weights by channel."""
    ao = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(0)
    x_BTD = torch.randn(3, 7, 16)
    for kind in ("lstm", "gru"):
        model = scrambled(tokenizer, attention=kind)
        small = compress(model, "dynamic_int8")
        layers: list[Any] = [net.network.decoder[0] for net in (model, small)]
        layer, mixing = layers
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            how = {nn.LSTM: ao.per_channel_dynamic_qconfig, nn.GRU: ao.per_channel_dynamic_qconfig}
            theirs = ao.quantize_dynamic(nn.Sequential(layer.attention.rnn), how)
            out = ao.quantize_dynamic(
                nn.Sequential(layer.feedforward.inner), {nn.Linear: ao.per_channel_dynamic_qconfig}
            )
            ours = mixing.attention._run(x_BTD, None)[0]
            undefined = mixing.attention._run(torch.full_like(x_BTD, float("nan")), None)[0]
            assert undefined.isnan().all() and mixing.feedforward.inner(undefined).isnan().all()
            torch.testing.assert_close(ours, theirs(x_BTD)[0], atol=4e-2, rtol=0)
            torch.testing.assert_close(mixing.feedforward.inner(x_BTD), out(x_BTD), atol=4e-2, rtol=0)
            assert not torch.equal(ours, layer.attention._run(x_BTD, None)[0])
        gradients: list[Tensor] = []
        for part in (mixing.attention, layer.attention, mixing.feedforward.inner, layer.feedforward.inner):
            x = x_BTD.clone().requires_grad_()
            y = part._run(x, None)[0] if hasattr(part, "_run") else part(x)
            gradients += torch.autograd.grad(y.sum(), x)
        for own, expected in zip(gradients[::2], gradients[1::2], strict=True):  # torch's operators have none
            torch.testing.assert_close(own, expected, atol=0.05, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["multi_head", "gru", "lstm"])
def test_gptq_is_better_than_rounding_on_what_it_has_read(attention: str, tokenizer: Tokenizer) -> None:
    """The outputs of the layer are nearer, also of a recurrence, whose matrices read its inputs and states."""
    model = scrambled(tokenizer, dim=32, attention=attention)
    small, plain = (compress(model, method, rows_of(model)) for method in ("gptq", "int4"))
    made = small.compression[0]["made"]
    assert 0 < made["error"] < 0.9 and "of that of plain rounding" in made["note"]
    calls: list[tuple[Any, Tensor]] = []
    layers: list[Any] = [each.network.decoder[0].attention for each in (model, small, plain)]
    with layers[0].register_forward_hook(lambda module, args, y: calls.append((args, y))):
        loss(model)
    errors = [float((layer(*calls[0][0]) - calls[0][1]).square().mean()) for layer in layers[1:]]
    assert errors[0] < 0.8 * errors[1]


def slowly(weight: Tensor, moments: Tensor, group: int) -> Tensor:
    """Optimal brain quantization in a fixed order, which GPTQ computes faster: no factor, one inverse for each step."""
    left, columns = weight.double().clone(), weight.shape[1]
    moments = moments + 0.01 * moments.diagonal().mean() * torch.eye(columns)
    for column in range(columns):
        if column % group == 0:
            scale = (left[:, column : column + group].abs().amax(1) / 7).bfloat16().double()
        inverse = torch.linalg.inv(moments[column:, column:])
        rounded = (left[:, column] / scale).round().clamp(-8, 7) * scale
        error = (left[:, column] - rounded) / inverse[0, 0]
        left[:, column + 1 :] -= error[:, None] * inverse[0, 1:]
        left[:, column] = rounded
    return left


def test_gptq_is_the_slow_form_and_plain_rounding_where_inputs_are_independent() -> None:
    weight = torch.randn(5, 48)
    plain, own = Int4Matrix(weight, 32), Int4Matrix(weight, 32)
    plain.take(weight)
    round_columns(own, weight, torch.eye(48, dtype=torch.float64))
    assert torch.equal(plain.codes, own.codes) and torch.equal(plain.scale, own.scale)
    correlated = torch.randn(200, 48, dtype=torch.float64) @ torch.randn(48, 48, dtype=torch.float64) ** 3
    moments = correlated.T @ correlated
    round_columns(own, weight, moments)
    torch.testing.assert_close(own().double(), slowly(weight, moments, 32))
    errors = [output_error(form() - weight, moments) for form in (own, plain)]
    assert errors[0] < 0.7 * errors[1]


@torch.no_grad()
def test_packed_weights_are_multiplied_as_they_are_in_bfloat16() -> None:
    """To the rounding of a result; where the kernels of torch do not fit or many rows come the matrix is made."""
    torch.manual_seed(0)
    supported = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    for rows, columns, count, fits in [(48, 64, 3, True), (48, 64, 33, False), (40, 64, 3, False), (48, 48, 3, False)]:
        weight, x = torch.randn(rows, columns).bfloat16(), torch.randn(2, count, columns).bfloat16()[:1]
        bias = torch.randn(rows).bfloat16()
        assert multiplies_packed(x, (rows, columns)) == (fits and supported)
        assert not multiplies_packed(x.float(), (rows, columns))
        assert not multiplies_packed(x[..., 1:], (rows, columns - 1))
        for form in (Int8Matrix(weight), Int4Matrix(weight, 32)):
            form.take(weight)
            exact = x.double() @ form().double().T + bias.double()
            found = form.linear(x, bias).double()
            assert (found - exact).abs().max() < 0.02 * exact.abs().max(), (form, rows, columns)
    assert not multiplies_packed(torch.randn(1, 64).bfloat16()[:, 1:33], (48, 32))  # which is not aligned
    with torch.enable_grad():
        assert not multiplies_packed(torch.randn(1, 64).bfloat16().requires_grad_(), (48, 64))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    small = ("--model.dim", "16", "--model.num_layers", "1", "--model.context", "16", "--data.batch_size", "4")
    return done(
        *("fit", "--data.train", folder / "train.txt", "--data.validation_share", "0.2", "--data.tokenizer", "char"),
        *(*small, "--trainer.max_steps", "2", "--output", folder / "runs", "--trainer.accelerator", "cpu"),
        *("--data.cache_dir", folder / "cache", "--trainer.enable_progress_bar", "false"),
    ).folder


@pytest.fixture(scope="module")
def written(run: Path) -> tuple[Path, str]:
    """A folder that the command has written, and what it printed."""
    folder = run.parent / "small"
    few = ("--rows", 6, "--rounds", 2, "--calibration", 4, "--no_memory")
    more = ("--more", f"again={run}")
    return folder, done("compress", run, "--to", "int8, gptq:4,int4+bf16", "--output", folder, *more, *few).out


def test_the_command(written: tuple[Path, str], run: Path) -> None:
    folder, out = written
    names = {path.name for path in folder.iterdir()}
    forms = {"original.ckpt", "int8.ckpt", "gptq-4.ckpt", "int4+bf16.ckpt", "again.ckpt"}
    assert names == forms | {"frontier.json", "frontier.csv", "frontier.png", "frontier.pdf", "report.html"}
    results = json.loads((folder / "frontier.json").read_text())
    assert results["stage"] == "validation" and results["unit"] == "token"
    original, int8, *_, again = results["settings"]
    assert again["loss"] == original["loss"] and again["difference"] == 0 < original["bytes"] == again["bytes"]
    assert int8["bytes"] == (folder / "int8.ckpt").stat().st_size < original["bytes"]
    table = csv.DictReader((folder / "frontier.csv").open())
    assert [row["name"] for row in table] == ["original", "int8", "gptq-4", "int4+bf16", "again"]
    assert all(name in out for name in ("gptq-4", "of that of plain rounding", "report.html"))


def test_the_recipes_of_the_guide(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that compress and train further, and the block of Python; those of distillation have their own."""
    guide = (Path(__file__).parent.parent / "docs" / "compressing.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/quickstart/version_0")
    Path("configs").mkdir()
    shutil.copy(run / "config.yaml", "configs/quickstart.yaml")
    few = {
        "compress": ("--rows", 4, "--rounds", 2, "--calibration", 4, "--no_memory"),
        "fit": ("--output", "runs", "--trainer.max_steps", 4),
        "infer": ("--max_new_tokens", 2),
    }
    first, further, *_ = re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)
    for _, command, *words in map(shlex.split, (first + further).splitlines()):
        done(command, *words, *few[command])
    made = {path.name for path in [*Path("small").glob("*.ckpt"), *Path("smaller").glob("*.ckpt")]}
    assert made == {"original.ckpt", "int8.ckpt", "gptq.ckpt", "prune50.ckpt", "svd50+int8.ckpt"}
    (python,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(python, {})


def test_an_interval_is_that_of_the_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    values, others = np.random.default_rng(0).normal(size=(2, 12))
    mean, half = paired(values, others)
    interval = stats.ttest_rel(values, others).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], [interval.low, interval.high])
    values[3] = np.nan  # a row without a target
    assert paired(values, others)[0] == pytest.approx(np.delete(values - others, 3).mean())


def test_what_is_not_gained_is_said() -> None:
    times = {f"ms_{size}_high": high for size, high in ((1, 0.9), (8, 1.1))}
    original = {"held": 100}
    one = {"bytes_ratio": 0.99, "held": 98, "made": ["read 4 rows"], **times}
    assert _notes(one, original) == [
        *("not smaller on disk", "not smaller in memory", "not faster at batch 8", "read 4 rows"),
    ]
    assert _notes({**one, "bytes_ratio": 0.5, "held": None, "ms_8_high": 0.9, "made": []}, original) == []
    assert _notes({**one, "bytes_ratio": 0.5, "held": 10, "ms_1_high": None, "made": []}, original) == ["not faster"]


def test_other_commands_take_what_it_writes(written: tuple[Path, str], run: Path, tmp_path: Path) -> None:
    """Exports have plain weights. What a fresh process answers: test_compressed_files.py."""
    folder, _ = written
    greedy = ("To be", "--greedy", "--max_new_tokens", "2")
    answers = {name: done("infer", folder / f"{name}.ckpt", *greedy).out for name in ("int8", "gptq-4", "int4+bf16")}
    assert all(answer.startswith("To be") for answer in answers.values())
    how = ("--output", tmp_path, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    assert (
        done("validate", "--ckpt_path", folder / "int8.ckpt", *how).out
        != done("validate", "--ckpt_path", run, *how).out
    )
    pytest.importorskip("safetensors")
    exported = done("export", folder / "int8.ckpt", tmp_path / "hf")
    assert "Int8" in exported.err and "written out in full" in exported.err
    weights = safetensors_of(tmp_path / "hf")
    small = load(folder / "int8.ckpt")
    assert any(torch.equal(value, reached(small, "net.embedding.weight")) for value in weights.values())


def safetensors_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "int5"), "unknown compression 'int5'. Did you mean 'int"),
        (("--to", "int8+int4"), "compression 'int4': there is no matrix left to compress"),
        (("--to", "int4:3"), "compression 'int4:3': group must be even and at least 2, got 3"),
        (("--to", "int4x"), "compression 'int4x': int4 takes the size of its groups, as in int4:64, and got 'x'"),
        (("--to", "int8:4"), "compression 'int8:4': int8 takes nothing after its name"),
        (("--to", ","), "compress: --to names no method"),
        (("--to", "int8", "--more", "x"), "compress: --more takes NAME=CHECKPOINT, with a name of its own, got 'x='"),
        (("--to", "int8", "--more", "int8=x"), "compress: --more takes NAME=CHECKPOINT, with a name of its own, got"),
        (("--to", "int8", "--more", f"x={OLD}"), "compress: --more x: its tokenizer is not that of the checkpoint"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], says: str, run: Path, tmp_path: Path) -> None:
    answer = llmkit("compress", run, *words, "--output", tmp_path / "new", "--no_memory")
    assert answer.code == 2 and answer.err.strip().splitlines()[-1].startswith(f"llmkit: error: {says}"), answer.err


def test_a_missing_package_is_named_before_anything_is_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    answer = llmkit("compress", run, "--to", "int8", "--output", tmp_path / "new")
    assert answer.code == 2 and "pip install 'llmkit[study]'" in answer.err and not (tmp_path / "new").exists()


def test_what_cannot_be_trained_further_is_refused(written: tuple[Path, str], tmp_path: Path) -> None:
    file = written[0] / "int8.ckpt"
    answer = llmkit("fit", "--ckpt_path", file, "--output", tmp_path, "--trainer.accelerator", "cpu")
    assert answer.code == 2 and "is compressed by Int8, whose weights cannot be trained" in answer.err, answer
    with pytest.raises(UserError, match=r"model.init_from: .* is compressed by Int8, whose weights cannot be trained"):
        LanguageModel(dim=16, num_layers=1, context=16, init_from=str(file))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"compression": "int8"}, "its compression should be a list of methods"),
        ({"compression": [{"method": {"class_path": "os.system"}, "made": {}}]}, "which is not an installed plugin"),
        ({"compression": [{"method": {"class_path": "llmkit_plugins.norm.RMSNorm"}, "made": {}}]}, "does not derive"),
        ({"compression": []}, "its weights do not fit"),
        ("scale", "its weights do not fit"),
        ("codes", "its weights do not fit"),
        ("group", "its weights do not fit"),
        ("twice", "there is no matrix left to compress"),
    ],
    ids=str,
)
def test_a_damaged_file_is_refused_in_one_line(change: Any, says: str, tokenizer: Tokenizer) -> None:
    stored = content(compress(scrambled(tokenizer), "int4"))
    state, part = stored["state_dict"], stored["llmkit"]
    name = "net.embedding.packed_weight"
    if isinstance(change, dict):
        part |= change
    elif change == "group":
        part["compression"][0]["method"]["init_args"] = {"group": 2**40}
        state[f"{name}.scale"] = torch.zeros(2, 1)
    elif change == "twice":
        part["compression"] *= 2
    else:
        state[f"{name}.{change}"] = state[f"{name}.{change}"].float()[:1]
    with pytest.raises(UserError, match=says) as caught:
        again(stored)
    assert "\n" not in str(caught.value)
