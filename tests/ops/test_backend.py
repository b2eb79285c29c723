"""The choice of a backend. Stubs stand in for the paths, and tensors without storage for those on a GPU."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from carve.ops import api, slow
from carve.ops.kernels import compiler, cuda
from carve.ops.recurrence import Options, Projections, Tokens
from tests.ops.cases import Case

CASE = Case(B=1, T=3, K=64, V=64, R=16)
OPTIONS = Options("read", None, 64, 1.0, False, False, torch.float32)


class Path:
    """Serves everything, unless told a reason why not."""

    def __init__(self) -> None:
        self.reason: str | None = None  # why it does not serve the inputs
        self.log: str | None = None  # why its kernels do not compile

    def why_not(self, x: Tokens, p: Projections, options: Options) -> str | None:
        return self.reason

    def build(self, x: Tokens, p: Projections, options: Options, state: Any, N: int) -> str | None:
        return self.log


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    stubs = {"cuda": Path(), "triton": Path()}
    monkeypatch.setattr(api, "PATHS", stubs)
    monkeypatch.delenv("CARVE_STRICT", raising=False)
    slow.warn_once.cache_clear()
    yield stubs
    slow.warn_once.cache_clear()


def choose(backend: str = "auto", device: str = "meta") -> str:
    """For tensors on a device that is not a CPU."""
    arguments = {name: y.to(device) for name, y in CASE.arguments(torch.float32).items() if isinstance(y, torch.Tensor)}
    x = Tokens(*(arguments[name] for name in Tokens._fields))
    p = Projections(*(arguments[f"p_{name}"] for name in Projections._fields))
    return api.choose_backend(backend, api.PATHS, x, p, OPTIONS, None, 1)


@pytest.fixture
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("silence")
def test_auto_takes_the_fastest(paths: dict[str, Path]) -> None:
    assert choose() == "cuda"


@pytest.mark.usefixtures("silence")
def test_the_cpu_runs_plain_torch(paths: dict[str, Path]) -> None:
    assert choose(device="cpu") == "torch"


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_the_path_named_is_taken(paths: dict[str, Path], backend: str) -> None:
    for name, path in paths.items():
        path.reason = None if name == backend else "it is not asked"
    assert choose(backend) == backend


def test_auto_goes_on_to_the_next_path_and_says_why(paths: dict[str, Path]) -> None:
    paths["cuda"].reason = "K = 32, expected 64"
    with pytest.warns(UserWarning, match=r"on meta the op runs on 'triton', .* because 'cuda' .* K = 32, expected 64;"):
        assert choose() == "triton"
    paths["triton"].reason = "Triton is not installed"
    reasons = "'cuda' does not serve it: K = 32, expected 64; 'triton' does not serve it: Triton is not installed"
    with pytest.warns(UserWarning, match=f"runs in plain torch, which is slow there, because {reasons};"):
        assert choose() == "torch"


def test_a_reason_is_given_once(paths: dict[str, Path]) -> None:
    paths["cuda"].reason = "K = 32, expected 64"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(1000):
            choose()
        assert len(said) == 1
        paths["cuda"].reason = "K = 16, expected 64"
        for _ in range(1000):
            choose()
        assert len(said) == 2


def test_a_path_named_that_does_not_serve_is_an_error(paths: dict[str, Path]) -> None:
    for name, path in paths.items():
        path.reason = "K = 32, expected 64"
        with pytest.raises(ValueError, match=f"^backend is '{name}', but K = 32, expected 64$"):
            choose(name)


@pytest.mark.parametrize("strict", ["1", "yes"])
def test_strict(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, strict: str) -> None:
    monkeypatch.setenv("CARVE_STRICT", strict)
    assert choose() == "cuda"
    assert choose(device="cpu") == "torch"
    paths["cuda"].reason = "K = 32, expected 64"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"K = 32, expected 64; CARVE_STRICT forbids it, pass backend='triton'"):
            choose()
    assert choose("triton") == "triton"
    assert choose("torch") == "torch"


@pytest.mark.parametrize("strict", ["0", ""])
def test_not_strict(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, strict: str) -> None:
    monkeypatch.setenv("CARVE_STRICT", strict)
    paths["cuda"].reason = "K = 32, expected 64"
    with pytest.warns(UserWarning, match="K = 32, expected 64"):
        assert choose() == "triton"


def test_kernels_that_do_not_compile(paths: dict[str, Path]) -> None:
    paths["cuda"].log = "the CUDA compiler refused forward for sm_90:\nforward(3): error: expected a ';'"
    with pytest.raises(
        RuntimeError, match=r"^backend is 'cuda', but the CUDA compiler refused .*\nforward\(3\): error"
    ):
        choose("cuda")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [choose() for _ in range(3)] == ["triton"] * 3
    assert len(said) == 1
    assert "forward(3): error: expected a ';'" in str(said[0].message)


def test_a_compiled_function_chooses_while_it_is_traced(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    paths["cuda"].reason = "K = 32, expected 64"

    def double(v: torch.Tensor) -> torch.Tensor:
        x = Tokens(v, v, v, v, v, None)
        name = api.choose_backend("auto", api.PATHS, x, Projections(None, None, None), OPTIONS, None, 1)
        return v.new_empty(2 if name == "triton" else 3)

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    v = torch.empty(1, 2, 1, 32, device="meta")
    with pytest.warns(UserWarning, match="on 'triton', which is not the fastest"):
        assert len(compiled(v)) == 2
    torch._dynamo.reset()
    monkeypatch.setenv("CARVE_STRICT", "1")
    with pytest.raises(Exception, match="K = 32, expected 64; CARVE_STRICT forbids it"):
        compiled(v)


# -- what the CUDA kernels serve --


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a device and its installation are like; a test may change it."""
    found = {"name": "NVIDIA H100", "capability": 90, "shared_room": 232448, "processors": 132, "no_compiler": None}
    monkeypatch.setattr(cuda, "facts", lambda device: cuda.Device(**found))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return found


def described(K: int = 64, V: int = 128, R: int = 16, device: str = "cuda", **dtypes: torch.dtype) -> tuple[Any, Any]:
    """Inputs as `why_not` looks at them: shape, dtype and a device, of a number that no machine has."""

    def tensor(name: str, *shape: int) -> Any:
        dtype = dtypes.get(name, torch.bfloat16)
        return SimpleNamespace(shape=torch.Size(shape), dtype=dtype, device=torch.device(device, 77))

    q, k, g, e = (tensor(name, 1, 5, 2, K) for name in "qkge")
    x = Tokens(q, k, tensor("v", 1, 5, 2, V), g, e, tensor("w", 1, 5, 2))
    return x, Projections(tensor("p_down", 2, V, R), tensor("p_up", 2, R, K), None)


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("V", [64, 128])
@pytest.mark.parametrize("content", ["mean", "read", None])
def test_what_an_h100_serves(h100: dict[str, Any], K: int, V: int, content: str | None) -> None:
    options = OPTIONS._replace(content=content)
    assert cuda.why_not(*described(K, V), options) is None
    half = dict.fromkeys(("q", "k", "v", "e"), torch.float16)
    assert cuda.why_not(*described(K, V, 7, g=torch.float32, w=torch.float32, **half), options) is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"device": "cpu"}, "the inputs are on cpu:77, expected a CUDA device"),
        ({"v": torch.float32}, "q has dtype torch.bfloat16, expected q, k, v and e all in torch.bfloat16 or all in"),
        ({"q": torch.float32}, "q has dtype torch.float32, expected q, k, v and e all in torch.bfloat16 or all in"),
        ({"e": torch.float16}, "e has dtype torch.float16, expected q, k, v and e all in torch.bfloat16 or all in"),
        ({"K": 32}, "K = 32 and V = 128, expected each to be one of 64, 128"),
        ({"V": 256}, "K = 64 and V = 256, expected each to be one of 64, 128"),
        ({"R": 17}, "p_down has R = 17, expected at most 16"),
    ],
)
def test_what_it_does_not_serve(h100: dict[str, Any], inputs: dict[str, Any], message: str) -> None:
    assert (cuda.why_not(*described(**inputs), OPTIONS) or "").startswith(message)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("K", "heads", "expected"), [(128, 66, 2), (128, 67, 1), (64, 3, 1)])
def test_a_compiler_follows_how_programs_are_shared_out(
    h100: dict[str, Any], monkeypatch: pytest.MonkeyPatch, K: int, heads: int, expected: int, dynamic: bool
) -> None:
    monkeypatch.setattr(cuda, "facts", compiler.constant(lambda device: cuda.Device(**h100)))
    device = torch.device("cuda", 77)

    def count(x: torch.Tensor) -> torch.Tensor:
        split = cuda.programs_of_head(x.shape[1], x.shape[1], x.shape[0], device)
        return x[0, 0] + split + cuda.forward_tile(K, K, "mean", device)

    torch._dynamo.reset()
    found = torch.compile(count, backend="eager", fullgraph=True, dynamic=dynamic)(torch.zeros(heads, K))
    assert found == expected + 64


def test_too_long_chunks(h100: dict[str, Any]) -> None:
    said = cuda.why_not(*described(), OPTIONS._replace(chunk_size=2**31))
    assert said is not None
    assert said.startswith("chunk_size is 2147483648, expected at most")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capability": 75}, "NVIDIA H100 has compute capability 7.5 and 232448 bytes of shared memory a block, "),
        ({"shared_room": 49152}, "NVIDIA H100 has compute capability 9.0 and 49152 bytes of shared memory a block, "),
        ({"no_compiler": "cuda-core is not installed"}, "cuda-core is not installed"),
    ],
)
def test_devices_that_do_not_serve(h100: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    h100 |= changes
    assert (cuda.why_not(*described(), OPTIONS) or "").startswith(message)


def test_a_pytorch_for_other_gpus(h100: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this PyTorch is not built for CUDA" in (cuda.why_not(*described(), OPTIONS) or "")


def test_what_is_compiled(h100: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward only where it will be needed; a failure is not tried again."""
    loaded: list[str] = []

    def load(name: str, device: int, constants: Any, size: int) -> None:
        loaded.append(name)
        assert dict(constants)["CARVE_V"] == "128"
        if dict(constants)["CARVE_CONTENT"] == "0":
            raise RuntimeError("the log")

    monkeypatch.setattr(cuda.compiler, "load", load)
    x, p = described()
    tensors = [y for y in (*x, *p) if y is not None]
    for y in tensors:
        y.requires_grad = False
    assert cuda.build(x, p, OPTIONS, None, 1) is None
    assert loaded == ["forward"]
    x.v.requires_grad = True
    with torch.no_grad():
        assert cuda.build(x, p, OPTIONS, None, 1) is None
    assert loaded == ["forward"]
    assert cuda.build(x, p, OPTIONS, None, 1) is None
    assert "reverse" in loaded[1:]
    count = len(loaded)
    for _ in range(3):
        assert cuda.build(x, p, OPTIONS._replace(content=None), None, 1) == "the log"
    assert len(loaded) == count + 1
