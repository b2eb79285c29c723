"""GPU kernels of the chunk form, and what compiles and launches them.

`primitives.cuh` and `tile.cuh` head both `forward.cu` and `backward.cu`, which hold one kernel each; `compiler.py`
compiles them at first use; `cuda.py` makes torch operators of them.
"""
