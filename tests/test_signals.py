"""The layer of `benchmarks/signals.py`, which runs chunk by chunk, is the package's where both have a signal."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from torch import Tensor

from carve import CarveMixer
from carve.evals.probes.results import read_results
from carve.models import CarveForCausalLM
from tests.models.tiny import assert_near, hear_content

SIZES = {"hidden_size": 24, "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "v_head_dim": 6, "chunk_size": 4}
NAMES = ["mean", "read", "mean, a chunk later", "read, a chunk later", "mean, gradient stopped"]
NAMES += ["read, gradient stopped", "error", "query"]


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("signals")


def make(signals: ModuleType, name: str, norm: str | None = "rms") -> tuple[CarveMixer, CarveMixer]:
    """The layer with a signal, and the package's with the content it is nearest to; the same weights."""
    content = "mean" if name.startswith("mean") else "read"
    torch.manual_seed(0)
    ours = CarveMixer(**SIZES, content=content, content_norm=norm, content_write=True).double()
    hear_content(ours)
    layer = signals.SignalMixer(**SIZES, content=content, content_norm=norm, content_write=True).double()
    layer.signal = signals.SIGNALS[name]
    layer.load_state_dict(ours.state_dict())
    return layer, ours


def tokens(T: int) -> Tensor:
    return torch.randn(2, T, 24, generator=torch.Generator().manual_seed(1)).double()


def step(layer: CarveMixer, x: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of all weights."""
    y = layer(x, output_state=False)[0]
    return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]


@pytest.mark.parametrize("norm", ["rms", None])
@pytest.mark.parametrize("name", ["mean", "read"])
def test_the_signals_of_the_op_give_its_outputs_and_gradients(signals: ModuleType, name: str, norm: str | None) -> None:
    layer, ours = make(signals, name, norm)
    for found, expected in zip(step(layer, tokens(15)), step(ours, tokens(15)), strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("name", ["mean", "read"])
def test_a_stopped_gradient_changes_gradients_alone(signals: ModuleType, name: str) -> None:
    layer, ours = make(signals, f"{name}, gradient stopped")
    found, expected = step(layer, tokens(15)), step(ours, tokens(15))
    assert_near(found[0], expected[0])
    assert any((y - z).norm() > 1e-3 * z.norm() for y, z in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("name", ["mean", "read"])
def test_a_chunk_later_the_first_two_chunks_see_nothing(signals: ModuleType, name: str) -> None:
    layer, ours = make(signals, f"{name}, a chunk later")
    blind = CarveMixer(**SIZES, content=None).double()
    blind.load_state_dict(ours.state_dict(), strict=False)
    y, without, now = (some(tokens(15), output_state=False)[0] for some in (layer, blind, ours))
    assert_near(y[:, :8], without[:, :8])
    assert (y[:, 8:] - without[:, 8:]).norm() > 1e-2 * without.norm()
    assert (y[:, 8:] - now[:, 8:]).norm() > 1e-2 * now.norm()


def test_all_are_tested(signals: ModuleType) -> None:
    assert list(signals.SIGNALS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_signal_knows_the_future(signals: ModuleType, name: str) -> None:
    layer, _ = make(signals, name)
    x, other = tokens(15), tokens(15)
    other[:, 9:] = 0
    y = layer(x)[0]
    assert torch.equal(layer(other)[0][:, :9], y[:, :9])
    with torch.no_grad():
        layer.p_up.zero_()
        layer.p_write.zero_()
    assert (layer(x)[0] - y).norm() > 1e-3 * y.norm()  # it is heard


def test_a_model_is_trained_with_a_signal(signals: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    make_mixer = signals.SignalMixer.__init__

    def count(self: CarveMixer, *args: object, **kwargs: object) -> None:
        built.append(self.signal)
        make_mixer(self, *args, **kwargs)

    monkeypatch.setattr(signals.SignalMixer, "__init__", count)
    model = {"hidden_size": 16, "num_heads": 1, "head_dim": 8, "intermediate_size": 16, "chunk_size": 4}
    options = {"pairs": [2], "seeds": 1, "steps": 2, "batch_size": 2, "evaluated": 4, "model": model}
    with signals.mixing("error"):
        runs = signals.plan("error", ["write-once"], **options)
        assert signals.run_probes(runs, tmp_path)
    assert signals.SIGNALS["error"] in built
    (record,) = read_results(tmp_path / "results.jsonl").values()
    assert record["configuration"]["mixer"] == "error"
    assert not any(isinstance(module, signals.SignalMixer) for module in CarveForCausalLM(runs[0].model).modules())


def test_all_signals_are_in_one_table(signals: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = {"pairs": 2, "seeds": 1, "steps": 1, "learning_rate": 1e-3, "device": "cpu", "shard": "1/1"}
    signals.main("query; error", " write-once", **main, output=str(tmp_path))
    printed = capsys.readouterr().out
    assert printed.count("write-once") == 1
    assert all(name in printed for name in ("query", "error"))
    with pytest.raises(typer.BadParameter, match="there is no task 'write-onc' here, expected some of write-once"):
        signals.main("query", "write-onc", **main, output=str(tmp_path))
