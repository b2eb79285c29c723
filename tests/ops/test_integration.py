"""The kernels inside PyTorch: operators, compilation, autocast, checkpoints, graphs, streams.

Without a GPU the recurrence itself stands in for the two kernels, as a CPU implementation of the same operators: all
that lies around them is as it is on a GPU. The tests behind are of the GPU alone.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from carve import CarveMixer
from carve.mixer import MixerState
from carve.ops import CarveState, api, chunk_carve
from carve.ops.kernels import cuda, operator
from carve.ops.recurrence import Options, Projections, Tokens, recurrent
from tests.ops.cases import assert_close

TENSORS = ("q", "k", "v", "g", "e", "w", "p_down", "p_up", "p_write")
BEGINS: dict[
    int, list[Any]
] = {}  # initial states, by the address of what the forward saved: the stand-in has no room in it


# -- the stand-in --


@torch.autocast("cpu", enabled=False)
def run_recurrence(inputs: list[Any], begin: list[Any], numbers: tuple[Any, ...]) -> list[Any]:
    """o, memory, content and content_sum behind the last token, the last chunk left open as the kernel does."""
    kind, rms, chunk_size, scale, top = numbers
    tokens, p, bounds, position = Tokens(*inputs[:6]), Projections(*inputs[6:9]), inputs[9], inputs[10]
    options = Options(
        None if kind == "blind" else kind, "rms" if rms else None, chunk_size, scale, False, top == 2, torch.float32
    )
    x = cuda.Inputs(*inputs)
    if bounds is None:
        rows = [Tokens(*(y if y is None else y[n : n + 1] for y in tokens)) for n in range(x.sequences)]
    else:
        pairs = list(zip(bounds.tolist(), bounds.tolist()[1:], strict=False))
        rows = [Tokens(*(y if y is None else y[:, a:b] for y in tokens)) for a, b in pairs]
    zeros = [tokens.v.new_zeros(shape, dtype=torch.float32) for shape in x.state_shapes(kind)]
    begin = [z if y is None else y for y, z in zip(begin, zeros, strict=True)]
    begin = [y if y.numel() or y.dim() > 1 else None for y in begin]
    position = torch.zeros(x.sequences, dtype=torch.int64) if position is None else position
    parts = []
    for n, row in enumerate(rows):
        T = row.v.shape[1]
        state = CarveState(*(y if y is None else y[n : n + 1] for y in (*begin, position)))
        o, state = recurrent(Tokens(*(y if y is None else y[:, : T - 1] for y in row)), p, state, options)
        if T:
            last, still_open = Tokens(*(y if y is None else y[:, T - 1 :] for y in row)), chunk_size + 1
            o_last, state = recurrent(last, p, state, options._replace(chunk_size=still_open))
            o = torch.cat([o, o_last], 1)
        parts.append((o, *state[:3]))
    columns = list(zip(*parts, strict=True))
    o = torch.cat(columns[0], 0 if bounds is None else 1)
    return [o.to(tokens.v.dtype), *(None if column[0] is None else torch.cat(column) for column in columns[1:])]


def stand_in_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, begin, numbers = list(arguments[:11]), list(arguments[11:14]), arguments[14:19]
    final, save = arguments[19:]
    assert all(y is None or y.is_contiguous() for y in (*inputs, *begin))  # the kernel goes by addresses
    outputs = [y.zero_() for y in cuda.allocate(cuda.Inputs(*inputs), numbers[0], numbers[2], final, save)]
    if inputs[2].numel():
        for y, found in zip(outputs[:4], run_recurrence(inputs, begin, numbers), strict=True):
            if y.numel():
                y.copy_(found)
    BEGINS[outputs[4].data_ptr()] = begin
    return tuple(outputs)


def stand_in_backward(*arguments: Any) -> list[Tensor]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shapes = cuda.backward(
            *(mode.from_tensor(y) if isinstance(y, Tensor) else y for y in arguments[:11]),
            [mode.from_tensor(y) for y in arguments[11]],
            *(mode.from_tensor(y) if isinstance(y, Tensor) else y for y in arguments[12:]),
        )
    outputs = [torch.zeros(y.shape, dtype=y.dtype) for y in shapes]
    inputs, d_outputs, numbers = list(arguments[:11]), arguments[12:16], arguments[16:21]
    begin = BEGINS[arguments[11][0].data_ptr()]
    leaves = [None if y is None else y.detach().requires_grad_() for y in (*inputs[:9], *begin)]
    wanted = [y for y in leaves if y is not None]

    def run_backward() -> tuple[Tensor | None, ...]:
        found = run_recurrence([*leaves[:9], *inputs[9:]], leaves[9:], numbers)
        pairs = [(y, dy) for y, dy in zip(found, d_outputs, strict=True) if dy is not None and dy.numel()]
        pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
        ends, d_ends = zip(*pairs, strict=True)
        return torch.autograd.grad(ends, wanted, d_ends, allow_unused=True)

    if inputs[2].numel():
        with ThreadPoolExecutor(1) as other_thread:  # in this one, autograd is switched off behind operators
            gradients = dict(zip(map(id, wanted), other_thread.submit(run_backward).result(), strict=True))
        for out, leaf in zip(outputs, leaves, strict=True):
            if out.numel() and gradients.get(id(leaf)) is not None:
                out.copy_(gradients[id(leaf)])
    return outputs


def run_where(on_cpu: Callable[..., Any], on_gpu: Callable[..., Any], *arguments: Any) -> Any:
    """The tests of the GPU alone are of the kernels, whatever else the module has replaced."""
    return (on_gpu if arguments[2].is_cuda else on_cpu)(*arguments)


@pytest.fixture(scope="module", autouse=True)
def stand_in() -> Iterator[None]:
    """The recurrence as the operators' implementation on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for operator, run in ((cuda.forward, stand_in_forward), (cuda.backward, stand_in_backward)):
            operator.op.register_kernel("cpu")(run)
            patch.setattr(operator, "run", partial(run_where, run, operator.run))
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the kernels serves inputs on a CPU, and "auto" takes it."""
    choose = api.choose_backend

    def prefer_kernels(backend: str, *arguments: Any) -> str:
        return choose("cuda" if backend == "auto" else backend, *arguments)

    monkeypatch.setattr(cuda, "why_not", lambda x, p, options: None)
    monkeypatch.setattr(cuda, "build", lambda *_: None)
    monkeypatch.setattr(api, "choose_backend", prefer_kernels)


def make(B: int = 2, T: int = 11, H: int = 2, HV: int = 2, K: int = 64, V: int = 64, R: int = 4) -> dict[str, Any]:
    r = torch.Generator().manual_seed(B + T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r)

    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    x |= {"g": -0.1 * normal(B, T, H, K).abs(), "e": normal(B, T, H, K), "w": normal(B, T, HV)}
    x |= {"p_down": 0.3 * normal(HV, V, R), "p_up": 0.3 * normal(HV, R, K), "p_write": 0.3 * normal(HV, R)}
    return {name: y.bfloat16() if name in "qkve" else y for name, y in x.items()}


OPTIONS = {"content_norm": "rms", "qk_l2norm": True, "chunk_size": 4, "backend": "cuda"}


def differentiate(x: dict[str, Any], only: tuple[str, ...] = TENSORS, **options: Any) -> list[Tensor]:
    """o, and the gradients of some inputs."""
    x = {name: y.detach().requires_grad_(name in only) if isinstance(y, Tensor) else y for name, y in x.items()}
    o, _ = chunk_carve(**x, **{**OPTIONS, **options})
    return [o, *torch.autograd.grad(o.float().square().sum(), [x[name] for name in only])]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for y, wanted in zip(found, expected, strict=True):
        assert torch.equal(y, wanted)


# -- the operators --


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("content", ["mean", "read"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_path_of_the_kernels_is_the_recurrence(content: str, packed: bool) -> None:
    """Values, states and gradients through all that lies around the kernels."""
    x = make(1 if packed else 2, 11, HV=4)
    x |= {name: torch.nn.functional.normalize(x[name].float(), dim=-1).bfloat16() for name in "qk"}
    options = {"qk_l2norm": False, "content": content, "cu_seqlens": torch.tensor([0, 3, 3, 11]) if packed else None}
    found, expected = [], []
    for results, backend in ((found, "cuda"), (expected, "torch")):
        leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
        first, state = chunk_carve(**leaves, **{**OPTIONS, **options, "backend": backend}, output_final_state=True)
        again = {"initial_state": state, "output_final_state": True, "backend": backend}
        second, end = chunk_carve(**leaves, **{**OPTIONS, **options, **again})
        loss = sum(y.float().square().sum() for y in (first, second, *end[:3]) if y is not None)
        results += [first, second, end.memory, *torch.autograd.grad(loss, list(leaves.values()))]
        assert end.position.tolist() == ([2, 0, 0] if packed else [2, 2])
    for name, y, wanted in zip(("first", "second", "memory", *x), found, expected, strict=True):
        assert_close(y, wanted, "op_around_kernels", name)


@pytest.mark.usefixtures("kernels")
def test_the_operators_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, shapes without values, autograd, and tracing with shapes left open."""
    calls: list[tuple[Any, ...]] = []

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        calls.append(arguments)
        return cuda.forward(*arguments)

    monkeypatch.setattr(cuda, "fused", partial(operator.run_sequences, forward))
    leaves = {name: y.requires_grad_() for name, y in make(1, 5).items()}
    _, state = chunk_carve(**leaves, **OPTIONS, output_final_state=True)
    assert state is not None
    begin = CarveState(*(None if y is None else y.detach() for y in state))
    bounds = torch.tensor([0, 2, 2, 5])
    chunk_carve(**leaves, **OPTIONS, initial_state=begin)
    chunk_carve(**leaves, **OPTIONS, content="read", cu_seqlens=bounds, output_final_state=True)
    with torch.no_grad():
        chunk_carve(**leaves | dict.fromkeys(("p_down", "p_up", "p_write")), **OPTIONS)
    for arguments in calls[1:]:
        torch.library.opcheck(cuda.forward.op, arguments)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("only", [("q",), ("g",), ("p_up",), ("e", "w")])
def test_gradients_of_some_inputs(only: tuple[str, ...]) -> None:
    x = make()
    everything = dict(zip(("o", *TENSORS), differentiate(x), strict=True))
    assert_same(differentiate(x, only), [everything[name] for name in ("o", *only)])


@pytest.mark.usefixtures("kernels")
def test_inputs_that_are_not_contiguous() -> None:
    x = make()
    strided = {name: torch.stack([y, y], -1)[..., 0] for name, y in x.items()}
    assert not any(y.is_contiguous() for y in strided.values())
    assert_same(differentiate(strided), differentiate(x))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(B: int, T: int) -> None:
    x = {name: y.requires_grad_() for name, y in make(B, T).items()}
    o, state = chunk_carve(**x, **OPTIONS, output_final_state=True)
    assert o.shape == (B, T, 2, 64)
    assert state.memory.shape == (B, 2, 64, 64)
    assert state.position.tolist() == [0] * B
    for y, dy in zip(x.values(), torch.autograd.grad(o.float().sum(), list(x.values())), strict=True):
        assert dy.shape == y.shape
        assert not dy.any()


@pytest.mark.usefixtures("kernels")
def test_derivatives_that_there_are_none_of() -> None:
    x = make(1, 3)
    v = x.pop("v").requires_grad_()
    o, _ = chunk_carve(**x, v=v, **OPTIONS)
    (dv,) = torch.autograd.grad(o.float().square().sum(), v, create_graph=True)
    with pytest.raises(NotImplementedError, match="the kernels' backward cannot be differentiated"):
        dv.float().square().sum().backward()
    v = v.detach()
    with pytest.raises(NotImplementedError, match="'cuda' has no forward-mode derivative"):
        torch.func.jvp(lambda v: chunk_carve(**x, v=v, **OPTIONS)[0], (v,), (v,))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("position", [4, 40, -1])
def test_a_state_of_another_chunk_size_does_not_reach_the_kernels(position: int) -> None:
    """They would write where nothing is theirs."""
    x = make(1, 8)
    _, state = chunk_carve(**x, **OPTIONS, output_final_state=True)
    state = state._replace(position=torch.tensor([position]))
    with pytest.raises(ValueError, match="expected values from 0 to below chunk_size = 4"):
        chunk_carve(**x, **OPTIONS, initial_state=state)


@pytest.mark.usefixtures("kernels")
def test_kernels_are_compiled_for_as_many_sequences_as_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cuda, "build", lambda *arguments: asked.append(arguments[-1]))
    chunk_carve(**make(1, 11), **OPTIONS, cu_seqlens=torch.tensor([0, 4, 4, 11]))
    chunk_carve(**make(2, 5), **OPTIONS)
    assert asked == [3, 2]


def test_what_kernels_copy_begins_at_a_multiple_of_16_bytes() -> None:
    room = torch.arange(33, dtype=torch.bfloat16)
    assert room.data_ptr() % 16 == 0
    assert cuda.align(room).data_ptr() == room.data_ptr()
    for odd in (room[1:], room[4:12]):
        assert cuda.align(odd).data_ptr() % 16 == 0
        assert torch.equal(cuda.align(odd), odd)


# -- the layer --


def make_layer(**arguments: Any) -> CarveMixer:
    torch.manual_seed(0)
    layer = CarveMixer(16, **({"num_heads": 1, "head_dim": 64, "content_rank": 4, "chunk_size": 4} | arguments))
    for name in ("p_up", "p_write"):
        if getattr(layer, name) is not None:
            torch.nn.init.normal_(getattr(layer, name))
    return layer


def tokens(B: int, T: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(B, T, 16, generator=torch.Generator().manual_seed(T)).to(device, dtype)


def step(layer: CarveMixer, call: Callable, x: Tensor, *more: Any) -> list[Tensor]:
    """Everything that a training step gives: outputs, state, gradients."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y, state = call(x, *more)
    (y.float().square().sum() + state.memory.memory.square().sum()).backward()
    kept = [z for z in (state.conv, *state.memory) if z is not None]
    return [y, *kept, x.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]


def detached(state: MixerState) -> MixerState:
    memory = CarveState(*(None if y is None else y.detach() for y in state.memory))
    return MixerState(state.conv.detach(), memory, state.chunk_size)


def check_compiled(layer: CarveMixer, device: str, backend: str, how: str) -> None:
    """A training step of the compiled layer, in whole graphs, against the layer."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    B = 1 if "packed" in how else 2
    state, bounds = None, torch.tensor([0, 4, 9], device=device) if "packed" in how else None
    if "state" in how:
        state = detached(layer(tokens(2, 7, device))[1])
    for _ in range(2):  # the second finds all compiled
        found = step(layer, compiled, tokens(B, 9, device), state, bounds)
    for y, wanted in zip(found, step(layer, layer, tokens(B, 9, device), state, bounds), strict=True):
        assert_close(y, wanted, "layer_compiled", how)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("content", "how"), [("mean", "rows"), ("read", "packed, from a state")])
def test_the_compiled_layer_is_one_graph_and_the_layer(content: str, how: str) -> None:
    layer = make_layer(content=content, content_write=True).bfloat16()
    check_compiled(layer, "cpu", "aot_eager", how)


@pytest.mark.usefixtures("kernels")
def test_boundaries_that_do_not_fit_are_found_in_a_compiled_layer() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(make_layer().bfloat16(), backend="aot_eager", fullgraph=True)
    x = tokens(1, 9)
    compiled(x, None, torch.tensor([0, 4, 9]))
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, never decrease and end at T"):
        compiled(x, None, torch.tensor([0, 4, 8]))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "arguments", [{}, {"content": "read", "content_write": True}, {"gates": "gdn2"}, {"gates": "kda"}, {"gates": "gdn"}]
)
def test_autocast(arguments: dict[str, Any]) -> None:
    """Inputs narrow as autocast makes them reach the kernels, which would not serve others; the state stays wide."""
    layer, seen = make_layer(**arguments), []
    x = tokens(2, 9, dtype=torch.float32)

    def note(x: Tokens, *_: Any) -> None:
        seen.append([y.dtype for y in (x.q, x.k, x.v, x.e)])

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(cuda, "why_not", note)
        y, state = layer(x)
        y, state = layer(x, state)
    assert seen == [[torch.bfloat16] * 4] * 2
    assert y.dtype == state.conv.dtype == torch.bfloat16
    assert {z.dtype for z in state.memory[:3] if z is not None} == {torch.float32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "choose_backend", lambda *_: "torch")
        _, begin = layer(x)
        assert_close(y, layer(x, begin)[0], "model_bfloat16")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("content", ["mean", "read"])
def test_autocast_leaves_the_arithmetic_alone(content: str) -> None:
    """Where a chunk ends, the next one's content is computed outside the kernels."""
    x = make(T=8)
    _, expected = chunk_carve(**x, **OPTIONS, content=content, output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = chunk_carve(**x, **OPTIONS, content=content, output_final_state=True)
    assert expected.position.tolist() == [0, 0]
    assert_same([state.memory, state.content], [expected.memory, expected.content])


def test_the_unit_norm_is_rounded_once_and_keeps_nothing_wide() -> None:
    x = make()["q"].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (kept.append(y), y)[1], lambda y: y):
        y = operator.unit(x)
    assert max(z.numel() for z in kept if z.dtype == torch.float32) == x[..., :1].numel()
    wide = x.detach().double().requires_grad_()
    expected = wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    assert_close(y, expected, "op_bfloat16")
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    (found,), (wanted,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, wide, dy.double())
    assert_close(found, wanted, "op_around_kernels")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant: bool) -> None:
    layer = make_layer()

    def gradients(call: Callable) -> list[Tensor]:
        layer.zero_grad()
        x = tokens(2, 9, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        y.float().square().sum().backward()
        return [y, x.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]

    def run(x: Tensor) -> Tensor:
        return layer(x)[0]

    assert_same(gradients(lambda x: checkpoint(run, x, use_reentrant=reentrant)), gradients(run))


# -- on a GPU --


def on_gpu(x: dict[str, Any]) -> dict[str, Any]:
    return {name: y.cuda() for name, y in x.items()}


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the fastest path will do."""
    monkeypatch.setenv("CARVE_STRICT", "1")


@pytest.mark.gpu
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("content", ["mean", "read"])
@pytest.mark.parametrize("how", ["rows", "from a state", "packed", "packed, from a state"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_compiled_layer_on_a_gpu(content: str, how: str, head_dim: int) -> None:
    layer = make_layer(content=content, content_write=True, head_dim=head_dim).bfloat16().cuda()
    check_compiled(layer, "cuda", "inductor", how)


@pytest.mark.gpu
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"content": "read"}, {"gates": "gdn2"}, {"gates": "kda"}, {"gates": "gdn"}])
def test_autocast_on_a_gpu(arguments: dict[str, Any], compiled: bool) -> None:
    torch._dynamo.reset()
    layer = make_layer(**arguments).cuda()
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    x = tokens(2, 9, "cuda", torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        found = step(layer, call, x)
    expected = step(layer.cpu(), layer, x.cpu())
    for y, wanted in zip(found, expected, strict=True):
        assert_close(y.cpu(), wanted, "model_bfloat16")


@pytest.mark.gpu
def test_no_call_waits_for_the_gpu() -> None:
    """Nor does a packed batch, once its boundaries were read."""
    rows, packed = on_gpu(make()), on_gpu(make(1))
    bounds = torch.tensor([0, 4, 11], device="cuda")

    def call() -> None:
        differentiate(rows)
        differentiate(packed, cu_seqlens=bounds, content="read", output_final_state=True)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("content", ["mean", "read"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_cuda_graph_gives_the_same_bits(content: str, packed: bool) -> None:
    """Forward and backward, captured once and replayed with other inputs and other boundaries."""
    B = 1 if packed else 2
    first, second = on_gpu(make(B, 150)), on_gpu(make(B, 150))
    second = {name: y.flip(1) if y.dim() > 2 and y.shape[1] == 150 else y for name, y in second.items()}
    options = {"content": content, "chunk_size": 64}
    first_bounds = torch.tensor([0, 70, 150], device="cuda") if packed else None
    second_bounds = torch.tensor([0, 1, 150], device="cuda") if packed else None
    expected = differentiate(second, **options, cu_seqlens=second_bounds)

    held, bounds = (
        {name: y.clone() for name, y in first.items()},
        None if first_bounds is None else first_bounds.clone(),
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        differentiate(held, **options, cu_seqlens=bounds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate(held, **options, cu_seqlens=bounds)
    for name, y in second.items():
        held[name].copy_(y)
    if bounds is not None:
        bounds.copy_(second_bounds)
    for _ in range(2):
        for y in captured:
            y.fill_(float("nan"))
        graph.replay()
        assert_same(captured, expected)


@pytest.mark.gpu
def test_any_stream_and_any_thread() -> None:
    """Behind work that another stream has still to do, and in a thread that has not used the GPU yet."""
    x = on_gpu(make(2, 300))
    expected = differentiate(x)
    stream = torch.cuda.Stream()
    inputs = {name: torch.zeros_like(y) for name, y in x.items()}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, y in x.items():
            inputs[name].copy_(y)
        found = differentiate(inputs)
    stream.synchronize()
    assert_same(found, expected)
    with ThreadPoolExecutor(1) as other_thread:
        assert_same(other_thread.submit(differentiate, x).result(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_that_is_not_the_current_one(backend: str) -> None:
    x = on_gpu(make(2, 300))
    expected = differentiate(x, backend=backend)
    found = differentiate({name: y.to("cuda:1") for name, y in x.items()}, backend=backend)
    assert all(y.device.index == 1 for y in found)
    assert_same([y.to("cuda:0") for y in found], expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_boundaries_on_either_device() -> None:
    """On a GPU they are read once, and again when they have changed."""
    x = on_gpu(make(1))
    bounds = torch.tensor([0, 4, 11], device="cuda")
    expected = differentiate(x, cu_seqlens=bounds)
    assert_same(differentiate(x, cu_seqlens=bounds.cpu().int()), expected)
    bounds[1] = 12
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 12, 11\], expected to start at 0, never decrease"):
        differentiate(x, cu_seqlens=bounds)
    bounds[1] = 4
    assert_same(differentiate(x, cu_seqlens=bounds), expected)
    with torch.inference_mode():
        o, _ = chunk_carve(**x, **OPTIONS, cu_seqlens=bounds.clone())
    assert torch.equal(o, expected[0])


@pytest.mark.gpu
def test_more_programs_than_the_other_axes_of_a_grid_hold() -> None:
    x = on_gpu(make(70_000, 2, 1, 1))
    found = differentiate(x, ("q", "v", "g"))
    last = {name: y[-3:] if y.shape[0] == 70_000 else y for name, y in x.items()}
    assert_same([y[-3:] for y in found], differentiate(last, ("q", "v", "g")))


@pytest.mark.gpu
def test_inputs_on_a_gpu_that_are_not_contiguous() -> None:
    x = on_gpu(make())
    assert_same(differentiate({name: torch.stack([y, y], -1)[..., 0] for name, y in x.items()}), differentiate(x))


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do_on_a_gpu(B: int, T: int) -> None:
    x = {name: y.requires_grad_() for name, y in on_gpu(make(B, T)).items()}
    o, state = chunk_carve(**x, **OPTIONS, output_final_state=True)
    assert o.shape == (B, T, 2, 64)
    assert not state.memory.any()
    for y, dy in zip(x.values(), torch.autograd.grad(o.float().sum(), list(x.values())), strict=True):
        assert dy.shape == y.shape
        assert not dy.any()


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_on_a_gpu(reentrant: bool) -> None:
    x = on_gpu(make())

    def run(*tensors: Tensor) -> Tensor:
        return chunk_carve(*tensors, **OPTIONS)[0]

    def gradients(call: Callable) -> list[Tensor]:
        leaves = [y.detach().requires_grad_() for y in x.values()]
        call(*leaves).float().square().sum().backward()
        return [y.grad for y in leaves]  # type: ignore[misc]

    assert_same(gradients(lambda *y: checkpoint(run, *y, use_reentrant=reentrant)), gradients(run))


@pytest.mark.gpu
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("content", ["mean", "read", None])
def test_the_layer_decodes_what_it_computes_at_once(content: str | None) -> None:
    """Tokens one by one and a few at once, each call leaving the state that it is given as it was."""
    layer = make_layer(content=content).bfloat16().cuda()
    x = tokens(2, 30, "cuda")
    with torch.no_grad():
        expected, end = layer(x)
        _, state = layer(x[:, :7])
        outputs = []
        for piece in x[:, 7:].split([1, 1, 1, 5, 1, 14], dim=1):
            given = [y for y in state.memory if y is not None]
            kept = [y.clone() for y in given]
            y, state = layer(piece, state)
            assert_same(given, kept)
            outputs.append(y)
    assert_close(torch.cat(outputs, 1), expected[:, 7:], "model_bfloat16")
    assert_close(state.memory.memory, end.memory.memory, "model_bfloat16")
    assert torch.equal(state.memory.position, end.memory.position)
