import pytest
from transformers import PreTrainedTokenizerFast

from carve.evals.context import end_tokens
from carve.train.tokenizer import byte_tokenizer


@pytest.mark.parametrize(("end", "pad", "filled"), [(256, 257, 257), (0, 0, 0), (256, None, 256), (None, None, None)])
def test_rows_are_filled_up_with_what_there_is(end: int | None, pad: int | None, filled: int | None) -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.eos_token_id, tokenizer.pad_token_id = end, pad
    assert end_tokens(tokenizer) == {"eos_token_id": end, "pad_token_id": filled}
