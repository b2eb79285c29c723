"""The CARVE language model: embeddings, pre-norm blocks of a token mixer and a SwiGLU MLP, output layer.

It follows the conventions of Hugging Face. Recurrent layers work on sequences without padding: `Layout` says where
they lie in a batch `[B, T]`, and a block packs them before its mixer and unpacks them behind it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from carve.mixer import CarveMixer, GatedRMSNorm, ShortConvolution
from carve.models.cache_carve import CarveCache, check_cache
from carve.models.configuration_carve import ATTENTION, CarveConfig, longest_context
from carve.ops.api import check_cu_seqlens


class Layout(NamedTuple):
    """Where the sequences of a batch `[B, T]` lie.

    Attributes:
        tokens: `[total]`, the places of real tokens in the flattened batch; None if there is no padding.
        cu_seqlens: `[N + 1]`, where sequences begin and end among them; None if they are the rows of the batch.
        position_ids: `[B or 1, T]`, positions within the sequences.
    """

    tokens: Tensor | None
    cu_seqlens: Tensor | None
    position_ids: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to `[1, total, D]`, or unchanged if the rows are the sequences."""
        if self.cu_seqlens is None:
            return x
        x = x.flatten(0, 1)
        return (x if self.tokens is None else x[self.tokens]).unsqueeze(0)

    def unpack(self, y: Tensor, like: Tensor) -> Tensor:
        """The inverse of `pack`, with zeros for padding."""
        if self.cu_seqlens is None:
            return y
        if self.tokens is None:
            return y.view(like.shape)
        return y.new_zeros(like.shape).flatten(0, 1).index_copy(0, self.tokens, y[0]).view(like.shape)


def lay_out(
    B: int,
    T: int,
    past: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    window: bool = False,
) -> Layout:
    """Find the sequences of a batch.

    Args:
        B, T: rows, and new tokens in each.
        past: tokens in the cache.
        attention_mask: `[B, past + T]`, 0 for padding.
        position_ids: `[B or 1, T]`; where they restart, another packed document begins.
        cu_seqlens: `[N + 1]`, for N documents packed into B = 1.
        window: whether there are layers whose window would count padding between real tokens.

    Raises:
        ValueError: the three do not fit the batch or each other.
    """
    if attention_mask is not None:
        if attention_mask.shape != (B, past + T):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, expected [B, past + T] = {[B, past + T]}"
            )
        attention_mask = attention_mask.bool()
    padded = attention_mask is not None and not bool(attention_mask.all())
    if cu_seqlens is not None:
        if B != 1 or past or padded:
            raise ValueError("cu_seqlens needs B = 1, an empty cache and no padding in attention_mask")
        bounds = check_cu_seqlens(cu_seqlens, B, T).to(device)
        places = (torch.arange(T, device=device) - bounds[:-1].repeat_interleave(bounds.diff())).unsqueeze(0)
        if position_ids is not None and not torch.equal(position_ids, places):
            raise ValueError("position_ids or seq_idx and cu_seqlens say different things, expected one, or the same")
        return Layout(None, bounds, places)

    if padded:
        assert attention_mask is not None
        runs = (attention_mask[:, 1:] & ~attention_mask[:, :-1]).sum(-1) + attention_mask[:, 0]  # of real tokens
        if window and bool((runs > 1).any()):
            raise ValueError(
                "attention_mask has padding between tokens, which the window of sliding_attention would count, "
                "expected it at the ends of rows only"
            )
        real, before = attention_mask[:, past:], (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        if position_ids is None:
            position_ids = before
        elif ((position_ids < before) & real).any():  # there are more tokens before it than its position allows
            raise ValueError(
                "position_ids restart in a batch with padding, expected either packed documents or padding"
            )
        if bool(real.all()):
            return Layout(None, None, position_ids)
        cu_seqlens = nn.functional.pad(real.sum(-1).cumsum(0), (1, 0))
        return Layout(real.flatten().nonzero().flatten(), cu_seqlens, position_ids)

    before = torch.arange(past, past + T, device=device).unsqueeze(0)
    if position_ids is None:
        return Layout(None, None, before)
    restarts = nn.functional.pad(position_ids.expand(B, T).diff() != 1, (1, 0), value=True)
    if past and bool(restarts[:, 1:].any() | (position_ids < before).any()):
        raise ValueError(
            f"position_ids restart, expected no new documents with a cache that already holds {past} tokens"
        )
    if T > 1 and bool(restarts[:, 1:].any()):
        cu_seqlens = nn.functional.pad(restarts.flatten().nonzero().flatten(), (0, 1), value=B * T)
        return Layout(None, cu_seqlens, position_ids)
    return Layout(None, None, position_ids)


def agree_on_packing(
    B: int,
    T: int,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    bounds: dict[str, Tensor | None],
    longest: dict[str, int | None],
) -> tuple[Tensor | None, Tensor | None]:
    """What transformers' names say of packed documents, as `position_ids` and `cu_seqlens`.

    Args:
        bounds: `cu_seqlens` under all of its names.
        longest: the tokens of the longest document, under all names of that; beside position_ids alone not looked at.

    Raises:
        ValueError: they do not fit the batch or each other.
    """
    for name, y in (("position_ids", position_ids), ("seq_idx", seq_idx)):
        if y is not None and y.shape not in ((B, T), (1, T)):
            raise ValueError(f"{name} has shape {list(y.shape)}, expected [B, T] = {[B, T]} or {[1, T]}")
    if seq_idx is not None:
        begins = nn.functional.pad(seq_idx.diff() != 0, (1, 0), value=True)
        places = torch.arange(T, device=seq_idx.device).expand_as(begins)
        places = places - places.masked_fill(~begins, 0).cummax(-1).values
        if position_ids is not None and not torch.equal(*torch.broadcast_tensors(position_ids, places)):
            raise ValueError("position_ids and seq_idx say different things, expected one of them, or the same")
        position_ids = places
    given = {name: y for name, y in bounds.items() if y is not None}
    stated = {name: most for name, most in longest.items() if most is not None}
    if B == 1 and (len(given) > 1 or (given and stated)):  # there is something to compare; `lay_out` looks at the rest
        first, *others = (check_cu_seqlens(y, B, T) for y in given.values())  # on the CPU, each tensor read once
        if any(not torch.equal(first, y) for y in others):
            raise ValueError(f"{' and '.join(given)} say different things, expected one of them, or the same")
        tokens = int(first.diff().max())
    else:
        tokens = T if position_ids is None else 0
    for name, most in stated.items():
        if most < tokens:
            raise ValueError(f"{name} is {most}, expected at least {tokens}, as the longest document has")
    return position_ids, next(iter(given.values()), None)


class CarveBlock(GradientCheckpointingLayer):
    """A token mixer and an MLP, each behind a norm and added to the stream."""

    def __init__(self, config: CarveConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.layer_type = config.layer_types[layer_idx]
        self.layer_idx = layer_idx
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        self.mixer_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.layer_type in ATTENTION:
            self.mixer: nn.Module = LlamaAttention(config, layer_idx)  # type: ignore[arg-type]
        else:
            self.mixer = CarveMixer(**config.mixer_arguments(layer_idx))
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        past_key_values: Any = None,
    ) -> Tensor:
        mix = self.attend if self.layer_type in ATTENTION else self.recur
        x = x + mix(self.mixer_norm(x), layout, attention_mask, position_embeddings, past_key_values)
        return x + self.mlp(self.mlp_norm(x))

    def attend(self, x: Tensor, layout: Layout, mask: Tensor | None, rotary: Any, cache: Any) -> Tensor:
        y, _ = self.mixer(x, rotary, mask, cache, position_ids=layout.position_ids, sliding_window=self.sliding_window)
        return y

    def recur(self, x: Tensor, layout: Layout, mask: Tensor | None, rotary: Any, cache: Any) -> Tensor:
        layer = None if cache is None else cache.layers[self.layer_idx]
        if layer is None:
            y, _ = self.mixer(layout.pack(x), None, layout.cu_seqlens, output_state=False)
        else:
            y, state = self.mixer(layout.pack(x), layer.state, layout.cu_seqlens, in_place=True)
            layer.advance(state, x.shape[1])
        return layout.unpack(y, x)


class CarvePreTrainedModel(PreTrainedModel):
    config: CarveConfig
    config_class = CarveConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CarveBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (CarveMixer, GatedRMSNorm, ShortConvolution)):
            for name, value in module.initial_values().items():
                initialization.copy_(getattr(module, name), value)


class CarveModel(CarvePreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config: CarveConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([CarveBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        has_attention = any(block.layer_type in ATTENTION for block in self.layers)
        self.rotary_emb = LlamaRotaryEmbedding(config) if has_attention else None  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, past + T]`, 0 for padding, on any side. Padding gives outputs of no meaning.
            position_ids: `[B, T]` int64; where they restart (0, 1, 2, 0, 1), another packed document begins.
            past_key_values: the cache of an earlier call with `use_cache`: the tokens continue those it has seen.
            inputs_embeds: `[B, T, D]`, in place of input_ids.
            use_cache: also return a cache. By default `config.use_cache`, but not in training or with packed documents.
            output_hidden_states: also return the stream before each block and behind the last norm. By default
                `config.output_hidden_states`.
            cu_seqlens: `[N + 1]` int32 or int64, for N documents packed into B = 1.
            cu_seq_lens_q, cu_seq_lens_k: the same, under transformers' names.
            max_length_q, max_length_k: at least the tokens of the longest document.
            seq_idx: `[B, T]`, the same number for all tokens of a document.
            token_type_ids: as many tokenizers make them, all 0.
            output_attentions: not True: there are no weights to return. By default `config.output_attentions`.

        Raises:
            ValueError: arguments that do not fit the batch or each other.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is True, expected False: the model has no attention weights to return")
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise ValueError("token_type_ids has values other than 0, expected only 0: the model knows no types")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3:
            raise ValueError(
                f"the embeddings have shape {list(x.shape)}, expected input_ids [B, T] or inputs_embeds [B, T, D]"
            )
        B, T = x.shape[:2]
        past = 0
        if past_key_values is not None:
            check_cache(past_key_values, self.config, B)
            past = past_key_values.get_seq_length()
        assert self.config.layer_types is not None
        window = "sliding_attention" in self.config.layer_types
        bounds = {"cu_seqlens": cu_seqlens, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        longest = {"max_length_q": max_length_q, "max_length_k": max_length_k}
        position_ids, cu_seqlens = agree_on_packing(B, T, position_ids, seq_idx, bounds, longest)
        layout = lay_out(B, T, past, x.device, attention_mask, position_ids, cu_seqlens, window)
        packed = layout.cu_seqlens is not None and layout.tokens is None
        if packed and (use_cache or past_key_values is not None):
            raise ValueError("use_cache was asked for packed documents, expected one sequence in each row for a cache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and past_key_values is None:
            past_key_values = CarveCache(self.config)

        rotary = None if self.rotary_emb is None else self.rotary_emb(x, layout.position_ids)
        masks = {
            layer_type: create(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask if layout.tokens is not None or past else None,
                past_key_values=past_key_values,
                position_ids=layout.position_ids,
            )
            for layer_type, create in MASKS.items()
            if layer_type in self.config.layer_types
        }
        streams = []
        for block, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            streams.append(x)
            x = block(x, layout, masks.get(layer_type), rotary, past_key_values=past_key_values)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*streams, x) if output_hidden_states else None,
        )


MASKS: dict[str, Callable] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class CarveForCausalLM(CarvePreTrainedModel, GenerationMixin):
    """The model with its output layer, for training and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: CarveConfig) -> None:
        super().__init__(config)
        self.model = CarveModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            labels: `[B, T]` int64, the tokens themselves (shifted inside); -100 is not scored. With logits_to_keep,
                only those of the positions that it keeps.
            logits_to_keep: only the last so many positions get logits, or those at these indices; 0 for all.
            num_items_in_batch: scored tokens to divide the loss by; None for those of this batch.
            skip_logits: return the loss alone: the logits, which are most of the memory that a training step takes, are
                then nobody's to keep.
            others: see `CarveModel.forward`. All are named here, as transformers looks for what it may pass on.

        Returns:
            logits `[B, T, vocab_size]`; loss, in nats a token, if labels are given; the cache if asked for.

        Raises:
            ValueError: labels do not fit, or skip_logits leaves nothing to return.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits is True, expected labels for the loss that it leaves")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            seq_idx=seq_idx,
            token_type_ids=token_type_ids,
            output_attentions=output_attentions,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, keep]
        if labels is not None and labels.shape != hidden.shape[:2]:
            expected = f"[B, T or logits_to_keep] = {list(hidden.shape[:2])}"
            raise ValueError(f"labels has shape {list(labels.shape)}, expected {expected}")
        scored = {"labels": labels, "num_items_in_batch": num_items_in_batch}
        logits = None if skip_logits else self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.head_loss(hidden, **scored) if logits is None else self.loss_from(logits, **scored)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(self, input_ids: Any, inputs_embeds: Any = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Arguments of `forward`, without the tokenizer of stop strings, which `generate` hands on.

        Raises:
            ValueError: a prompt ends with padding: behind that there is nothing to continue.
        """
        kwargs.pop("tokenizer", None)
        mask = kwargs.get("attention_mask")
        if kwargs.get("is_first_iteration") and mask is not None and (mask.any(1) & (mask[:, -1] == 0)).any():
            raise ValueError("attention_mask has padding behind a prompt, expected it before: padding_side='left'")
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]

    # `generate` takes max_position_embeddings for a limit of every model; here it is one of full attention only.

    def _prepare_generated_length(self, generation_config: Any, **lengths: Any) -> Any:  # type: ignore[override]
        default = generation_config.max_length
        prepared = super()._prepare_generated_length(generation_config, **lengths)  # type: ignore[misc]
        unlimited = longest_context(self.config) is None
        if unlimited and lengths["has_default_max_length"] and prepared.max_new_tokens is None:
            prepared.max_length = default + lengths["input_ids_length"]
        return prepared

    def _get_stopping_criteria(self, **arguments: Any) -> StoppingCriteriaList:  # type: ignore[override]
        criteria = super()._get_stopping_criteria(**arguments)  # type: ignore[misc]
        for each in criteria:
            if isinstance(each, MaxLengthCriteria):
                each.max_position_embeddings = longest_context(self.config)
        return criteria

    def _prepare_static_cache(self, cache_implementation: str, **arguments: Any) -> Any:  # type: ignore[override]
        raise ValueError(
            f"cache_implementation is {cache_implementation!r}, expected None: recurrent layers are cached by their "
            "state, which never grows, and which generate makes by itself (a CarveCache as past_key_values goes on)"
        )

    def head_loss(self, hidden: Tensor, **scored: Any) -> Tensor:
        """Output layer and loss as one, which `torch.compile` makes with one copy of the logits."""
        return self.loss_from(self.lm_head(hidden), **scored)

    def loss_from(self, logits: Tensor, **scored: Any) -> Tensor:
        return self.loss_function(logits=logits, vocab_size=self.config.vocab_size, **scored)


AutoConfig.register("carve", CarveConfig)
AutoModel.register(CarveConfig, CarveModel)
AutoModelForCausalLM.register(CarveConfig, CarveForCausalLM)
