import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CORPUS = (
    "def read(path):\n    return open(path).read()\n\n\nclass Reader:\n\tx = 1  # naïve, “quoted”\n\n"
    "The quick  brown fox   jumps over 12345 lazy dogs.\r\nEin Satz mit Umlauten: äöü. 漢字 and emoji 🙂🙂.\n"
) * 20
KINDS = ("bytes", "gpt2", "sentencepiece")


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Plain bytes, a small BPE with GPT-2's splitting, or one with SentencePiece's leading space and no splitting."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "gpt2":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], max_token_length=12)
        tokenizer.train_from_iterator([CORPUS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def corpus() -> str:
    return CORPUS


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(request.param)


@pytest.fixture(scope="session")
def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("bytes")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).double().eval()
