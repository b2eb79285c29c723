"""The CARVE recurrence and nothing else.

The legend, used in every file of the package:

    B   sequences in a batch         K   key dimension of a head
    T   tokens                       V   value dimension of a head
    H   key heads                    C   tokens in a content chunk (`chunk_size`)
    HV  value heads, a multiple of H R   rank of the content projection
    N   sequences: B, or the number in a packed batch
    D   model width

Start with `recurrence.py`: it is the definition. `chunked.py` computes the same by chunks.
"""

from carve.ops.api import carve_gates, chunk_carve, recurrent_carve
from carve.ops.decode import decode_carve
from carve.ops.state import CarveState

__all__ = ["CarveState", "carve_gates", "chunk_carve", "decode_carve", "recurrent_carve"]
