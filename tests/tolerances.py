"""Every tolerance of the tests, with its reason. A test takes `tolerance(name)`; none writes a number of its own."""

TOLERANCES: dict[str, tuple[float, str]] = {
    # -- the op: largest error relative to the largest value, see `tests/ops/cases.py` --
    "op_float64": (1e-10, "float64 rounding over at most a few hundred tokens; a wrong term is off by 1e-3 or more"),
    "op_float64_gradient": (
        1e-8,
        "as op_float64; saturated gates and strong decays make gradients of very unlike sizes",
    ),
    "op_float32": (
        1e-4,
        "float32 rounding (6e-8) through at most 200 edits of the memory, each of gain up to sqrt(4/3)",
    ),
    "op_float32_gradient": (1e-3, "as op_float32, through the forward and the backward"),
    "op_bfloat16": (2**-8, "o is rounded once to bfloat16: half a unit in the last place is 2^-9 of the value"),
    "op_float16": (2**-10, "o is rounded once to float16: half a unit in the last place is 2^-11, and float32 inside"),
    # -- the op's kernels: norm of the error over the norm, see `tests/ops/test_cuda.py` --
    "op_kernel": (6e-3, "bfloat16 operands (2^-9 each) in float32 sums, and o rounded to 16 bits"),
    "op_kernel_gradient": (1.2e-2, "as op_kernel, through the forward run again and the backward"),
    "op_kernel_content": (8e-3, "as op_kernel, of a mean over a chunk, where outputs cancel more than their errors"),
    "op_kernel_float32": (1e-4, "float32 products in three passes of 10 bits (2e-7), as op_float32 otherwise"),
    "op_kernel_float32_content": (1e-4, "as op_kernel_float32"),
    "op_kernel_float32_gradient": (1e-3, "as op_kernel_float32, through the forward run again and the backward"),
    "op_portable_operands": (
        0.03,
        "bfloat16 operands as in op_kernel, as the largest error in place of a norm; the interpreter cuts o off",
    ),
    "op_around_kernels": (
        0.01,
        "outputs and gradients rounded to bfloat16, those of shared heads once more when summed",
    ),
    "layer_float32": (1e-6, "a few float32 roundings of 6e-8, and the GPU's own exp and rsqrt"),
    "layer_bfloat16": (2**-7, "rounded once to 8 bits, which the interpreter cuts off; float32 inside"),
    "layer_float16": (2**-10, "as layer_bfloat16, to 11 bits"),
    "layer_bfloat16_gradient": (2**-6, "as op_bfloat16, worked out from outputs that are rounded themselves"),
    "layer_float16_gradient": (2**-8, "as op_float16, worked out from outputs that are rounded themselves"),
    "layer_compiled": (
        0.2,
        "a compiler rounds to bfloat16 in other places, 0.10 for a gradient that nearly cancels over 9 tokens; what is "
        "left out is off by its own size",
    ),
    "op_content_effect": (0.05, "the content term must move the outputs by this much, or a test of it shows nothing"),
    # -- the layer and the model: largest error relative to the largest value, see `tests/models/tiny.py` --
    "model_float64": (1e-10, "float64 rounding through up to 6 layers; a leak or a lost token is off by 1e-3 or more"),
    "model_float32": (1e-4, "as model_float64 in float32, each recurrent layer as op_float32"),
    "model_bfloat16": (0.1, "bfloat16 keeps 8 bits; every layer rounds its weights, inputs and outputs to them"),
    # -- comparisons --
    "compare_float64": (1e-9, "as model_float64, in nats summed over a text"),
    "compare_content_effect": (1e-4, "the content term must move losses by this much, or a test of it shows nothing"),
    "compare_bootstrap": (0.1, "an interval's ends from 10,000 resamples of 4,000 windows, against the normal ones"),
}


def tolerance(name: str) -> float:
    """The tolerance of that name."""
    return TOLERANCES[name][0]
