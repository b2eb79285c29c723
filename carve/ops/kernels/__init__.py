"""GPU kernels of the chunk form and of the decode step, and what compiles and launches them.

`forward.cu`, `reverse.cu`, `gradients.cu` and `decode.cu` hold one kernel each, headed by what they share (`*.cuh`);
`compiler.py` compiles them at first use; `cuda.py` and `decode.py` make torch operators of them. `triton_forward.py`
and `triton_backward.py` hold the portable kernels, of which `portable.py` makes operators. `operator.py` is what the
two have in common. `triton_layer.py` holds what a layer does around the recurrence, `layer.py` the operators of that.
`triton_launch.py` launches all that is Triton's, `registration.py` registers all operators.
"""
