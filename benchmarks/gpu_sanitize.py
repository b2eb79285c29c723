"""Small launches of every CUDA kernel, to be watched by NVIDIA's compute-sanitizer:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck synccheck; do
        compute-sanitizer --tool $tool --num-cuda-barriers 40 python benchmarks/gpu_sanitize.py
    done

Without PyTorch's cache every tensor is an allocation of its own, whose ends memcheck knows. What it says of calls to
`cuGetProcAddress` is PyTorch's search for functions that the driver may not have.
"""

import torch
from torch.nn import functional as F

from carve.ops import CarveState, chunk_carve, decode_carve

H, HV, R, LENGTHS = 1, 2, 7, (70, 0, 30)


def main() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    T, N = sum(LENGTHS), len(LENGTHS)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).cuda()
    for K in (64, 128):
        for content in (None, "mean", "read"):
            q, k = (F.normalize(normal(1, T, H, K), dim=-1).bfloat16() for _ in range(2))
            g = -F.softplus(normal(1, T, H, K) - 3)
            g[:, ::20] = -50  # strong blocks take another path
            x = {"q": q, "k": k, "v": normal(1, T, HV, K).bfloat16(), "g": g, "e": normal(1, T, H, K).bfloat16()}
            x |= {"w": normal(1, T, HV)}
            projections, options = {}, {"content_norm": "rms", "content": content or "mean"}
            state = CarveState(normal(N, HV, K, K), None, None, torch.tensor([0, 5, 63], device="cuda"))
            if content is not None:
                projections = {"p_down": normal(HV, K, R), "p_up": normal(HV, R, K), "p_write": normal(HV, R)}
                seen = normal(N, HV, R) if content == "mean" else normal(N, HV, K, R)
                state = state._replace(content=seen, content_sum=normal(N, HV, K) if content == "mean" else None)
            leaves = [y.requires_grad_() for y in (*x.values(), *projections.values())]
            o, end = chunk_carve(
                **x, **projections, **options, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
                backend="cuda",
            )  # fmt: skip
            assert end is not None
            torch.autograd.grad(o.float().sum() + end.memory.sum(), leaves)
            first = CarveState(*(None if y is None else y[:1].detach().clone() for y in end))
            few = {name: y[:, :3].detach() for name, y in x.items()}
            fixed = {name: y.detach() for name, y in projections.items()}
            decode_carve(**few, **fixed, **options, state=first, backend="cuda")
            torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
