"""Decoder language models as the memory model sees them: their shape, and what their operations keep for backward.

:func:`shape_of` reads a ``config.json``; the programs below note a decoder layer and the head on a
:class:`finegrid.tape.Tape`, operation by operation as transformers 5, peft and bitsandbytes run them (read in their
``models/*/modeling_*.py``, ``integrations/sdpa_attention.py``, ``tuners/lora``, ``autograd/_functions.py``). Used by
:mod:`finegrid.memory`; pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from finegrid.errors import UserError, nearest
from finegrid.tape import NOTHING, Size, Tape, Tensor, Timeline

FLOAT, HALF = 4, 2


class Linear(NamedTuple):
    """A linear layer of a decoder layer: its name inside it, its widths, whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Family:
    """What tells the decoders apart; the defaults are Llama's."""

    norms: int = 2  # RMS norms in a layer
    plus_one_norms: bool = False  # Gemma: float32 throughout, times (1 + weight)
    qk_norms: bool = False
    fused_qkv: bool = False
    fused_mlp: bool = False
    interleaved_rope: bool = False
    joins_rope: bool = False  # its RoPE joins two parts: queries come with heads first, the answer is laid out anew
    scaled_embedding: bool = False
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    output_bias: bool | None = None
    tied: bool = False  # where the config does not say
    head_dim: int | None = None
    kv_heads: int | None = None  # None: as many as query heads
    eager: bool = False  # transformers refuses SDPA for it
    remote: bool = False  # code of the model's own repository, other names
    sliding: bool = False  # two masks: full and sliding


FAMILIES = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, output_bias=False, kv_heads=8),
    "qwen2": Family(qkv_bias=True, output_bias=False, kv_heads=32),
    "qwen3": Family(qk_norms=True, head_dim=128, kv_heads=32),
    "phi3": Family(joins_rope=True, fused_qkv=True, fused_mlp=True, qkv_bias=False, output_bias=False),
    "gemma": Family(plus_one_norms=True, scaled_embedding=True, tied=True, head_dim=256, kv_heads=16),
    "gemma2": Family(
        norms=4, plus_one_norms=True, scaled_embedding=True, tied=True, head_dim=256, kv_heads=4, eager=True,
        sliding=True,
    ),
    "gemma3_text": Family(
        norms=4, plus_one_norms=True, qk_norms=True, scaled_embedding=True, tied=True, head_dim=256, kv_heads=4,
        sliding=True,
    ),
    "glm": Family(
        fused_mlp=True, interleaved_rope=True, joins_rope=True, output_bias=False, head_dim=128, kv_heads=2,
    ),
    "glm4": Family(
        norms=4, fused_mlp=True, interleaved_rope=True, joins_rope=True, output_bias=False, head_dim=128, kv_heads=2,
    ),
    "chatglm": Family(
        fused_qkv=True, fused_mlp=True, interleaved_rope=True, joins_rope=True, output_bias=False, remote=True,
    ),
}  # fmt: skip
FAMILIES["gemma3"] = FAMILIES["gemma3_text"]
BIAS_DEFAULT = {"glm": True, "glm4": True}


@dataclass(frozen=True)
class Shape:
    """What memory hangs on of a model: widths, counts and the habits of its family."""

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    rotary_dim: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    attention_softcap: bool
    logit_softcap: bool
    stored: int = FLOAT  # bytes of a weight in the checkpoint's file

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer, in the order of the forward pass."""
        family, hidden = self.family, self.hidden
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = "self_attention" if family.remote else "self_attn"
        if family.fused_qkv:
            name = "query_key_value" if family.remote else "qkv_proj"
            linears = [Linear(f"{attention}.{name}", hidden, queries + 2 * keys, self.qkv_bias)]
        else:
            widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
            linears = [Linear(f"{attention}.{name}", hidden, width, self.qkv_bias) for name, width in widths.items()]
        output = "dense" if family.remote else "o_proj"
        linears.append(Linear(f"{attention}.{output}", queries, hidden, self.output_bias))
        names = ("dense_h_to_4h", "dense_4h_to_h") if family.remote else ("gate_up_proj", "down_proj")
        if family.fused_mlp:
            linears.append(Linear(f"mlp.{names[0]}", hidden, 2 * self.intermediate, self.mlp_bias))
        else:
            linears += [
                Linear(f"mlp.{name}", hidden, self.intermediate, self.mlp_bias) for name in ("gate_proj", "up_proj")
            ]
        linears.append(Linear(f"mlp.{names[1]}", self.intermediate, hidden, self.mlp_bias))
        return tuple(linears)

    @cached_property
    def layer_vectors(self) -> int:
        """Parameters of one layer that are no matrices and no biases: its norms."""
        return self.family.norms * self.hidden + (2 * self.head_dim if self.family.qk_norms else 0)

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return sum(linear.parameters for linear in self.linears) + self.layer_vectors

    @cached_property
    def parameters(self) -> int:
        """Parameters of the model, tied weights once, as transformers' ``model.num_parameters()`` counts them."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden

    def layer_name(self, layer: int) -> str:
        """The name of a decoder layer in the model, as peft matches it."""
        return f"transformer.encoder.layers.{layer}" if self.family.remote else f"model.layers.{layer}"


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the shape that a ``config.json`` describes; of a multimodal Gemma 3 its language model's.

    Raises:
        UserError: an architecture whose memory this package does not know, or a config without a width or a count.
    """
    kind = config.get("model_type")
    if kind == "gemma3" and isinstance(config.get("text_config"), Mapping):
        config = {**config["text_config"], "model_type": "gemma3_text"}
    elif kind not in FAMILIES:
        expected = nearest(str(kind), FAMILIES) or f"; known are {', '.join(sorted(FAMILIES))}"
        raise UserError(f"config.json: model_type: '{kind}' is no decoder whose memory Finegrid can predict{expected}")
    family, kind = FAMILIES[config["model_type"]], config["model_type"]
    read = _chatglm if family.remote else dict
    values = read(config)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in keys if not isinstance(values.get(key), int)]
    if missing:
        raise UserError(f"config.json: {', '.join(missing)}: not given; the memory of '{kind}' hangs on it")
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    head_dim = values.get("head_dim") or family.head_dim or hidden // heads
    rope = values.get("rope_parameters") or {}
    rotary = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or (
        0.5 if family.interleaved_rope else 1.0
    )
    bias = bool(values.get("attention_bias", BIAS_DEFAULT.get(kind, False)))
    softcap = kind == "gemma2"
    return Shape(
        model_type=kind,
        vocabulary=values["vocab_size"],
        hidden=hidden,
        intermediate=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or family.kv_heads or heads,
        head_dim=head_dim,
        tied=bool(values.get("tie_word_embeddings", family.tied)),
        rotary_dim=int(head_dim * rotary),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias if family.output_bias is None else family.output_bias,
        mlp_bias=bool(values.get("mlp_bias", False)) and kind == "llama",
        attention_softcap=values.get("attn_logit_softcapping", 50.0 if softcap else None) is not None,
        logit_softcap=values.get("final_logit_softcapping", 30.0 if softcap else None) is not None,
        stored=HALF if str(config.get("dtype") or config.get("torch_dtype")).endswith("16") else FLOAT,
    )


def _chatglm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of ChatGLM2, ChatGLM3 and GLM-4-9B-chat (code of their own repository) in transformers' names."""
    return {
        "vocab_size": config.get("padded_vocab_size"),
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": config.get("ffn_hidden_size"),
        "num_hidden_layers": config.get("num_layers"),
        "num_attention_heads": config.get("num_attention_heads"),
        "num_key_value_heads": config.get("multi_query_group_num") if config.get("multi_query_attention") else None,
        "head_dim": config.get("kv_channels"),
        "attention_bias": config.get("add_qkv_bias", False) or config.get("add_bias_linear", False),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


# ---------------------------------------------------------------- how a model is computed


@dataclass(frozen=True)
class Numerics:
    """How the operations run: what decides which copies they make.

    Attributes:
        itemsize: bytes of a stored unquantised weight.
        autocast: matrix products run in 16 bits beside weights of ``itemsize`` bytes.
        base: how the frozen linear layers are stored: ``plain``, ``4bit`` or ``8bit``.
        compute: bytes of the type that 4-bit layers compute in.
        trained: the weights themselves are trained (full fine-tuning).
        attention: ``sdpa``, ``eager`` or ``flash`` (flash-attn's own kernels).
        masked: rows of unequal length: the attention gets a mask, or is called row by row.
        flat: they lie end to end, so that there is no mask.
        cuda: dropout keeps a mask of bytes, 4-bit layers answer in their input's type.
        adapter: bytes of an adapter's weight.
        adds_gradients: parameters have a gradient already when backward starts.
        smoothing: labels are smoothed.
        parts: logits of a plain head are made for some label positions at a time.
        narrow: the last layer's MLP is run on label positions alone.
        fused: the loss of a plain head is torch's ``linear_cross_entropy``.
        half_loss: it is :class:`finegrid.training.loss.HalfCrossEntropy`, which keeps its copy of a frozen matrix.
        evaluates: nothing gets a gradient.
    """

    itemsize: int
    autocast: bool
    base: str
    compute: int
    trained: bool
    attention: str
    masked: bool
    cuda: bool
    adapter: int = FLOAT
    adds_gradients: bool = False
    smoothing: bool = False
    flat: bool = False
    parts: bool = True
    narrow: bool = False
    fused: bool = False
    half_loss: bool = False
    evaluates: bool = False

    @property
    def stream(self) -> int:
        """Bytes of the hidden states between layers: the unquantised weights' type, float32 if quantised."""
        return FLOAT if self.base != "plain" else self.itemsize


class Adapter(NamedTuple):
    """An adapter on one linear layer: ``kind`` is ``lora``, ``dora``, ``ia3`` (on its output) or ``ia3_input``."""

    kind: str
    rank: int
    dropout: bool


Adapters = tuple[Adapter | None, ...]  # one for each of shape.linears


@lru_cache(maxsize=4096)
def layer_timeline(
    shape: Shape, numerics: Numerics, adapters: Adapters, input_has_gradient: bool, is_last: bool = False
) -> Timeline:
    """Play one decoder layer.

    Args:
        adapters: of the layer's linear layers.
        input_has_gradient: False for the first layer of a model whose embedding is frozen.
        is_last: the MLP of such a layer may be run on label positions alone.
    """
    program = _Program(shape, numerics)
    width = shape.hidden
    source = Tensor(Size(token=width), numerics.stream, input_has_gradient and not numerics.evaluates)
    by_name = dict(zip((linear.name for linear in shape.linears), adapters, strict=True))
    result = program.layer(source, by_name, is_last and numerics.narrow)
    return program.tape.play(source, result, numerics.adds_gradients)


@lru_cache(maxsize=4096)
def head_timeline(shape: Shape, numerics: Numerics, head_trained: bool, input_has_gradient: bool) -> Timeline:
    """Play the last norm, the head on label positions and the cross-entropy."""
    program = _Program(shape, numerics)
    source = Tensor(Size(token=shape.hidden), numerics.stream, input_has_gradient and not numerics.evaluates)
    result = program.head(source, head_trained)
    return program.tape.play(source, result, numerics.adds_gradients)


class _Program:
    """The operations of one model on a tape; every method returns the tensor it makes."""

    def __init__(self, shape: Shape, numerics: Numerics):
        self.shape, self.numerics, self.tape = shape, numerics, Tape()
        self.itemsize = numerics.stream

    # ---- single operations

    def parameter(self, count: int, trained: bool | None = None, itemsize: int | None = None) -> Tensor:
        trained = self.numerics.trained if trained is None else trained
        trained = trained and not self.numerics.evaluates
        return Tensor(Size(fixed=count), itemsize or self.itemsize, trained, parameter=True)

    def cast(self, x: Tensor, itemsize: int) -> Tensor:
        return x if x.itemsize == itemsize else self.tape.op([x], x.elements, itemsize)

    def scale(self, x: Tensor) -> Tensor:
        """Times or by a number; also neg: nothing is saved."""
        return self.tape.op([x], x.elements, x.itemsize)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        itemsize = max(a.itemsize, b.itemsize)
        same = a.itemsize == b.itemsize
        return self.tape.op([a, b], a.elements, itemsize, passes=same)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        saves = [x for x, other in ((b, a), (a, b)) if other.needs_grad]
        return self.tape.op([a, b], a.elements, max(a.itemsize, b.itemsize), saves)

    def mul_broadcast(self, a: Tensor, b: Tensor) -> Tensor:
        """a times a smaller b: b's gradient is as large as a before it is summed."""
        saves = [x for x, other in ((b, a), (a, b)) if other.needs_grad]
        itemsize = max(a.itemsize, b.itemsize) if not b.parameter else a.itemsize
        scratch = a.elements * itemsize if b.needs_grad else NOTHING
        return self.tape.op([a, b], a.elements, itemsize, saves, backward_scratch=scratch)

    def linear(self, x: Tensor, outputs: int, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.numerics.autocast:
            x, weight = self.cast(x, HALF), self.cast(weight, HALF)
            bias = self.cast(bias, HALF) if bias is not None else None
        saves = [*([x] if weight.needs_grad else []), *([weight] if x.needs_grad else [])]
        inputs = [x, weight, *([bias] if bias is not None else [])]
        return self.tape.op(inputs, _like(x, outputs), x.itemsize, saves)

    # ---- layers

    def norm(self, x: Tensor, width: int | None = None) -> Tensor:
        """RMS norm over the last dimension, as the models write it out; ``width``: of heads rather than of a token."""
        width = width or self.shape.hidden
        itemsize = x.itemsize
        h = self.cast(x, FLOAT)
        # The derivative of pow(2) is made of two more tensors: pow(1) and twice that.
        square = self.tape.op([h], h.elements, FLOAT, [h], backward_scratch=h.bytes * 2)
        variance = self.tape.op([square], square.elements * (1 / width), FLOAT)
        root = self.tape.op([variance], variance.elements, FLOAT)
        self.tape.saves_output()
        normed = self.mul_broadcast(h, root)
        weight = self.parameter(width)
        if self.shape.family.plus_one_norms:
            weight = self.cast(weight, FLOAT)
            one = self.tape.op([weight], weight.elements, FLOAT, passes=True)
            result = self.mul_broadcast(normed, one)
            self.tape.keep(x, normed)
            return self.cast(result, itemsize)
        result = self.mul_broadcast(self.cast(normed, itemsize), weight)
        self.tape.keep(x, normed)
        return result

    def projection(self, x: Tensor, linear: Linear, adapter: Adapter | None) -> Tensor:
        itemsize = x.itemsize
        if adapter is None:
            return self.base_linear(x, linear)
        if adapter.kind == "ia3_input":
            x = self.cast(x, self.numerics.adapter)
            x = self.mul_broadcast(x, self.parameter(linear.inputs, True, self.numerics.adapter))
            return self.base_linear(self.cast(x, itemsize), linear)
        base = self.base_linear(x, linear)
        if adapter.kind == "ia3":
            scaled = self.mul_broadcast(base, self.parameter(linear.outputs, True, self.numerics.adapter))
            return self.cast(scaled, base.itemsize)
        return self.lora(x, base, linear, adapter)

    def base_linear(self, x: Tensor, linear: Linear) -> Tensor:
        numerics, count = self.numerics, linear.inputs * linear.outputs
        if numerics.base == "4bit":
            return self.four_bit_linear(x, linear)
        if numerics.base == "8bit":
            kept = [x]  # MatMul8bitLt keeps its input
            decoded = Size(fixed=count * x.itemsize)
            return self.tape.op([x], _like(x, linear.outputs), x.itemsize, kept, backward_scratch=decoded)
        bias = self.parameter(linear.outputs) if linear.bias else None
        return self.linear(x, linear.outputs, self.parameter(count), bias)

    def four_bit_linear(self, x: Tensor, linear: Linear) -> Tensor:
        """Keeps nothing: the weight is decoded again in backward."""
        numerics = self.numerics
        itemsize = HALF if numerics.autocast and not numerics.cuda else numerics.compute
        answer = itemsize if numerics.autocast and not numerics.cuda else x.itemsize
        y = self.cast(x, itemsize)
        decoded = Size(fixed=linear.inputs * linear.outputs * itemsize)
        y = self.tape.op([y], _like(x, linear.outputs), itemsize, forward_scratch=decoded, backward_scratch=decoded)
        if linear.bias and not numerics.cuda:
            y = self.tape.op([y], y.elements, itemsize, passes=True)
        return self.cast(y, answer)

    def lora(self, x: Tensor, base: Tensor, linear: Linear, adapter: Adapter) -> Tensor:
        numerics = self.numerics
        itemsize = base.itemsize
        if numerics.base == "4bit":
            base = self.tape.op([base], base.elements, base.itemsize, passes=True)  # peft clones the answer
        # Beside quantised layers peft leaves the casts to autocast, but asks CUDA's whether it is on.
        casts = numerics.base == "plain" or not (numerics.autocast and numerics.cuda)
        if casts:
            x = self.cast(x, numerics.adapter)
        dropped = self.dropout(x) if adapter.dropout and not numerics.evaluates else x
        weight = self.parameter(linear.inputs * adapter.rank, True, numerics.adapter)
        dora = self.dora_weights(x, linear) if adapter.kind == "dora" else None
        low = self.linear(dropped, adapter.rank, weight)
        self.tape.keep(dropped)
        weight = self.parameter(linear.outputs * adapter.rank, True, numerics.adapter)
        update = self.linear(low, linear.outputs, weight)
        self.tape.keep(low)
        if dora is not None:
            result = self.dora(dropped, base, update, dora, linear, adapter)
        else:
            update = self.scale(update)
            if numerics.base != "plain" and casts:
                update = self.cast(update, itemsize)
            result = self.add(base, update)
        result = self.cast(result, itemsize)
        self.tape.keep(x, base)
        return result

    def dora_weights(self, x: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
        """The weight in x's type; beside it, for the forward pass, the update as a matrix, with its graph."""
        numerics, area = self.numerics, linear.inputs * linear.outputs
        weight = self.parameter(area, False)
        if numerics.base != "plain" or weight.itemsize != x.itemsize:
            weight = self.tape.op([weight], weight.elements, x.itemsize)
        eye = linear.inputs**2 * (numerics.adapter + (HALF if numerics.autocast else 0))
        made = HALF if numerics.autocast else numerics.adapter
        update = area * (x.itemsize + (made if made != x.itemsize else 0))
        beside = self.tape.op([], Size(fixed=eye + update), 1)
        # The norm of weight + scaling * update: a product and a sum.
        self.tape.op([beside], NOTHING, 1, forward_scratch=Size(fixed=2 * area * x.itemsize))
        return weight, beside

    def dora(
        self,
        x: Tensor,
        base: Tensor,
        update: Tensor,
        weights: tuple[Tensor, Tensor],
        linear: Linear,
        adapter: Adapter,
    ) -> Tensor:
        """(magnitude - 1) * base + magnitude * update * scaling; with dropout the base is computed once more."""
        answer = base
        magnitude = self.tape.op([self.parameter(linear.outputs, True, FLOAT)], Size(fixed=linear.outputs), FLOAT)
        if adapter.dropout and not self.numerics.evaluates:
            base = self.linear(x, linear.outputs, weights[0])
        a = self.mul_broadcast(base, magnitude)
        b = self.scale(self.mul_broadcast(update, magnitude))
        result = self.add(a, b)
        self.tape.keep(base, update, *weights)
        return self.add(answer, result)

    def dropout(self, x: Tensor) -> Tensor:
        noise = Tensor(x.elements, 1 if self.numerics.cuda else x.itemsize, False)
        return self.tape.op([x], x.elements, x.itemsize, [noise])

    def rope(self, x: Tensor) -> Tensor:
        """x * cos + rotate_half(x) * sin; cos and sin have the type of the embeddings and are the model's own."""
        itemsize = max(x.itemsize, self.itemsize)
        whole = self.shape.head_dim
        part = self.shape.rotary_dim / whole
        turned = x if part == 1 else self.slice(x, part)
        half = self.slice(turned, 0.5)
        negative = self.scale(half)
        other = self.slice(turned, 0.5)
        rotated = self.tape.op([negative, other], turned.elements, x.itemsize, passes=True)
        a = self.tape.op([turned], turned.elements, itemsize)
        b = self.tape.op([rotated], turned.elements, itemsize)
        result = self.add(a, b)
        if part == 1:
            return result
        rest = self.slice(x, 1 - part)
        return self.tape.op([result, rest], x.elements, itemsize, passes=True)

    def slice(self, x: Tensor, share: float) -> Tensor:
        """A view of a part; its backward makes a gradient of the whole."""
        return self.tape.op([x], x.elements * share, x.itemsize, view=True)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        numerics, shape = self.numerics, self.shape
        flat = numerics.flat and not shape.attention_softcap  # with which rows are padded
        masked = numerics.masked and not flat
        if (
            shape.heads != shape.kv_heads
            and numerics.attention != "flash"
            and (masked or numerics.attention == "eager")
        ):
            k, v = (self.tape.op([x], q.elements, x.itemsize) for x in (k, v))
        if numerics.attention == "eager":
            return self.eager_attention(q, k, v)
        if numerics.autocast:
            exact = flat and not numerics.cuda  # finegrid.training.flat
            q, k, v = (self.cast(x, FLOAT if exact else HALF) for x in (q, k, v))
        saves = [q, k, v, Tensor(Size(token=shape.heads), FLOAT, False)]
        if masked and numerics.attention == "sdpa":
            saves.append(Tensor(Size(square=1), q.itemsize, False))  # made anew of the boolean mask in every layer
        out = self.tape.op([q, k, v], q.elements, q.itemsize, saves)
        self.tape.saves_output()
        if flat and numerics.masked:  # the rows' outputs are put together
            out = self.tape.op([out], out.elements, out.itemsize)
        if shape.family.joins_rope:
            out = self.tape.op([out], out.elements, out.itemsize)
        return out

    def eager_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = self.shape
        if self.numerics.autocast:
            q, k, v = (self.cast(x, HALF) for x in (q, k, v))
        scores = self.tape.op([q, k], Size(square=shape.heads), q.itemsize, [q, k])
        scores = self.scale(scores)
        if shape.attention_softcap:
            scores = self.scale(scores)
            scores = self.tape.op([scores], scores.elements, scores.itemsize)
            self.tape.saves_output()
            scores = self.scale(scores)
        mask = Tensor(Size(square=1), self.itemsize, False, parameter=True)
        scores = self.tape.op(
            [scores, mask],
            scores.elements,
            max(scores.itemsize, self.itemsize),
            passes=scores.itemsize == self.itemsize,
        )
        weights = self.tape.op([scores], scores.elements, FLOAT)
        self.tape.saves_output()
        weights = self.cast(weights, HALF if self.numerics.autocast else q.itemsize)
        out = self.tape.op([weights, v], q.elements, v.itemsize, [weights, v])
        return self.tape.op([out], out.elements, out.itemsize)

    def layer(self, x: Tensor, adapters: Mapping[str, Adapter | None], narrow: bool) -> Tensor:
        shape, family = self.shape, self.shape.family
        linears = list(shape.linears)
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        h = self.norm(x)
        if family.fused_qkv:
            linear = linears.pop(0)
            joint = self.projection(h, linear, adapters[linear.name])
            if family.remote:
                q, k, v = self.tape.split(joint, [width / (queries + 2 * keys) for width in (queries, keys, keys)])
            else:
                q, k, v = (self.slice(joint, width / (queries + 2 * keys)) for width in (queries, keys, keys))
        else:
            q, k, v = (self.projection(h, linear, adapters[linear.name]) for linear in linears[:3])
            del linears[:3]
        if family.qk_norms:
            q, k = self.norm(q, shape.head_dim), self.norm(k, shape.head_dim)
        q, k = self.rope(q), self.rope(k)
        output, *mlp = linears
        attention = self.projection(self.attention(q, k, v), output, adapters[output.name])
        self.tape.keep(x, h, q, k, v)
        if family.norms == 4:
            attention = self.norm(attention)
        x = self.add(x, attention)
        h = self.norm(x)
        if narrow:
            at_labels = self.tape.op([h], Size(last=shape.hidden), h.itemsize)
            out = self.mlp(at_labels, mlp, adapters)
            out = self.tape.op([out], Size(token=shape.hidden), out.itemsize)
        else:
            out = self.mlp(h, mlp, adapters)
        self.tape.keep(h)
        if family.norms == 4:
            out = self.norm(out)
        return self.add(x, out)

    def mlp(self, h: Tensor, linears: list[Linear], adapters: Mapping[str, Adapter | None]) -> Tensor:
        *inner, down = linears
        if len(inner) == 1:
            joint = self.projection(h, inner[0], adapters[inner[0].name])
            gate, up = self.tape.split(joint, [0.5, 0.5])
            active = self.activation(gate)
        else:
            active = self.activation(self.projection(h, inner[0], adapters[inner[0].name]))
            up = self.projection(h, inner[1], adapters[inner[1].name])
        return self.projection(self.mul(active, up), down, adapters[down.name])

    def activation(self, x: Tensor) -> Tensor:
        return self.tape.op([x], x.elements, x.itemsize, [x])

    def head(self, x: Tensor, head_trained: bool) -> Tensor:
        shape = self.shape
        h = self.norm(x)
        width = shape.hidden
        h = self.tape.op([h], Size(label=width), h.itemsize)
        matrix = self.parameter(width * shape.vocabulary, head_trained)
        if self.numerics.fused and not shape.logit_softcap:
            return self.fused_loss(h, matrix)
        if self.numerics.half_loss:
            matrix = matrix if matrix.needs_grad else self.parameter(width * shape.vocabulary, False, HALF)
            if not self.numerics.evaluates:
                return self.half_loss(h, matrix)
        logits = self.linear(h, shape.vocabulary, matrix)
        if self.numerics.parts and not shape.logit_softcap:
            logits.elements = Size(chunk=shape.vocabulary)
        if shape.logit_softcap:
            logits = self.scale(logits)
            logits = self.tape.op([logits], logits.elements, logits.itemsize)
            self.tape.saves_output()
            logits = self.scale(logits)
        self.tape.hold(logits)
        logits = self.cast(logits, FLOAT)
        self.tape.hold(logits)
        losses = self.tape.op([logits], logits.elements, FLOAT)
        self.tape.saves_output()
        if self.numerics.smoothing:
            losses = self.tape.op([losses], losses.elements, FLOAT)
        return self.tape.op([losses], NOTHING, FLOAT, [losses])

    def fused_loss(self, h: Tensor, matrix: Tensor) -> Tensor:
        """Gradients are made with the loss, and are what its backward gives; meanwhile there are zeros of their size,
        for what the loss' own answers besides it might have got as gradients."""
        logits = Size(chunk=self.shape.vocabulary) * h.itemsize
        made = [Tensor(each.elements, each.itemsize, False) for each in (h, matrix) if each.needs_grad]
        return self.tape.op([h, matrix], NOTHING, FLOAT, made, forward_scratch=logits)

    def half_loss(self, h: Tensor, matrix: Tensor) -> Tensor:
        """As above; logits and softmax in 32 bits, then the gradient in 16 beside the latter, or a part's gradient of
        the matrix."""
        vocabulary = self.shape.vocabulary
        logits = Size(chunk=vocabulary * 2 * FLOAT + self.shape.hidden * HALF)
        made = [Tensor(each.elements, each.itemsize, False) for each in (h, matrix) if each.needs_grad]
        if matrix.needs_grad:
            logits += matrix.elements * HALF
        return self.tape.op([h, matrix], NOTHING, FLOAT, made, forward_scratch=logits)


def _like(x: Tensor, width: int) -> Size:
    """As many rows as x (all tokens, or the label positions) of another width."""
    if x.elements.last:
        return Size(last=width)
    return Size(label=width) if x.elements.label else Size(token=width)
