"""GPU kernels of the chunk form and of the decode step, and what compiles and launches them.

`forward.cu`, `reverse.cu` and `gradients.cu` hold one kernel each, headed by `primitives.cuh` and `tile.cuh`;
`compiler.py` compiles them at first use; `cuda.py` makes torch operators of them.
"""
