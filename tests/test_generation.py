import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from carve import CarveConfig, CarveForCausalLM
from carve.generation import generate_text

PROMPT = "def naïve(x):\n    return 漢 "


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model() -> CarveForCausalLM:
    torch.manual_seed(0)
    config = CarveConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        head_dim=8,
        intermediate_size=32,
        chunk_size=8,
        initializer_range=0.3,
    )
    return CarveForCausalLM(config).eval()


def test_greedy_is_what_the_full_forward_finds_likeliest(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT)["input_ids"]]])
    start = row.shape[1]
    with torch.no_grad():
        while row.shape[1] < start + 30 and row[0, -1] != tokenizer.eos_token_id:
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(row[0, start:], skip_special_tokens=True)
    assert generate_text(model, tokenizer, PROMPT, temperature=0, max_new_tokens=30) == expected


def test_pieces_join_to_the_text_and_never_end_in_a_character(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tokenizer("naïve “漢字” 🙂🙂 ends in half of one: ")["input_ids"] + tokenizer("🙂")["input_ids"][:2]

    def scripted(row: torch.Tensor, streamer, **kwargs: object) -> None:
        streamer.put(row)
        for token in script:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(model, "generate", scripted)
    pieces: list[str] = []
    text = generate_text(model, tokenizer, PROMPT, write=pieces.append)
    assert "".join(pieces) == text == "naïve “漢字” 🙂🙂 ends in half of one: �"
    assert len(pieces) > 5
    assert all("�" not in piece for piece in pieces[:-1])


def test_an_interrupt_hands_over_what_was_held_back(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(row: torch.Tensor, streamer, **kwargs: object) -> None:
        streamer.put(row)
        for token in tokenizer("two words")["input_ids"]:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    pieces: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        generate_text(model, tokenizer, PROMPT, write=pieces.append)
    assert "".join(pieces) == "two words"


def test_the_seed_decides_and_the_global_random_state_is_left_alone(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    state = torch.random.get_rng_state()
    first, same, other = (
        generate_text(model, tokenizer, PROMPT, seed=seed, temperature=1.0, max_new_tokens=40) for seed in (1, 1, 2)
    )
    assert first == same != other
    assert torch.equal(torch.random.get_rng_state(), state)
    unseeded = {generate_text(model, tokenizer, PROMPT, temperature=1.0, max_new_tokens=40) for _ in range(3)}
    assert len(unseeded) > 1


def test_a_small_top_p_and_a_small_temperature_are_greedy(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    greedy = generate_text(model, tokenizer, PROMPT, temperature=0, max_new_tokens=20)
    assert generate_text(model, tokenizer, PROMPT, top_p=1e-6, temperature=1.0, max_new_tokens=20) == greedy
    assert generate_text(model, tokenizer, PROMPT, top_p=1.0, temperature=1e-4, max_new_tokens=20) == greedy


def test_every_token_can_be_sampled(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At a huge temperature all bytes are equally likely: far more than 50 different ones must come.
    seen: set[int] = set()

    def count(self: object, value: torch.Tensor) -> None:
        seen.update(value.flatten().tolist())

    monkeypatch.setattr("carve.generation._Writer.put", count)
    for seed in range(4):
        generate_text(model, tokenizer, "x", temperature=1e6, top_p=1.0, seed=seed, max_new_tokens=100)
    assert len(seen) > 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"seed": -1}, r"seed must be from 0 to below 2\*\*64, got -1"),
        ({"seed": 1 << 64}, r"seed must be from 0 to below 2\*\*64, got 18446744073709551616"),
    ],
)
def test_bad_arguments_are_named(
    model: CarveForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_text(model, tokenizer, **({"prompt": "x"} | arguments))


def test_full_attention_ends_where_its_positions_end(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_heads": 1, "head_dim": 8, "intermediate_size": 16}
    fields = sizes | {"num_hidden_layers": 1, "max_position_embeddings": 16}
    model = CarveForCausalLM(CarveConfig(**fields, layer_types=["full_attention"]))
    generate_text(model, tokenizer, "1234567890", max_new_tokens=5)  # with the BOS token, 16
    with pytest.raises(ValueError, match="sequences of 17 tokens, but the model has max_position_embeddings = 16"):
        generate_text(model, tokenizer, "1234567890", max_new_tokens=6)
    for layer_type in ("carve", "sliding_attention"):
        generate_text(CarveForCausalLM(CarveConfig(**fields, layer_types=[layer_type])), tokenizer, "1234567890")
