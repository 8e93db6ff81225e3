"""The text model in plain numpy: what the engine computes, said as simply as it can be said.

docs/model.md explains the model in prose; this file is its executable twin, and every test of
the engine ends in a comparison with it or with stored values it is itself tested against
(tests/test_reference.py). Nothing here is fast. All arithmetic is in `dtype`, float32 or
float64; float64 gives a ground truth to judge float32 results by.

Letters: x input, y output, w weight, s recurrent state [d_k, d_v] of one head. Shapes are
written slowest axis first. A linear layer is y = x w^T with w [out, in]; none has a bias.

    model = Reference.load(folder)
    model.logits([3, 1, 4])               # float32 [3, vocab]
    state = model.start()
    model.feed(state, [3, 1, 4])          # hidden rows after the final norm; state moves on
    model.greedy([3, 1, 4], 16)           # 16 token ids
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import safetensors

# ---------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Yarn:
    """An extension of the context (arXiv:2309.00071), under the config's own names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by."""
        given = self.attention_factor
        return 0.1 * float(np.log(self.factor)) + 1 if given is None else given


@dataclass(frozen=True)
class Config:
    """The text part of a config.json, under the checkpoint's own names."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    linear_conv_kernel_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]  # "linear_attention" | "full_attention"
    rope_theta: float
    rotary_dim: int  # leading dims of an attention head that rotate
    mrope_section: tuple[int, int, int]  # frequencies per axis: time, height, width
    yarn: Yarn | None = None
    mtp_num_hidden_layers: int = 0

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: all of q, k and v."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    @staticmethod
    def from_dict(whole: dict) -> Config:
        """Read a config.json, in any of the spellings in use.

        The text fields sit in `text_config`, or at the top of a text-only file. The rope
        fields sit in `rope_parameters`, in the older `rope_scaling`, or loose beside the
        others; the first of these that has a field wins. `rope_type` may be called `type`.
        Without `layer_types` every `full_attention_interval`-th layer is full attention.
        """
        text = whole.get("text_config", whole)
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}

        def rope_field(name: str, default):
            return rope.get(name, text.get(name, default))

        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise ValueError(f'rope_type is "{kind}", only "default" and "yarn" are supported')
        if any(rope.get(name) is not None for name in ("mscale", "mscale_all_dim", "truncate")):
            raise ValueError("mscale, mscale_all_dim and truncate: only the default is supported")
        for name, only in (("hidden_act", "silu"), ("attention_bias", False)):
            if text.get(name, only) != only:
                raise ValueError(f"{name} is {text[name]!r}, only {only!r} is supported")
        if not text.get("attn_output_gate", True):
            raise ValueError("attn_output_gate is false, only true is supported")

        yarn = {f.name: rope_field(f.name, None) for f in fields(Yarn)}
        yarn = {name: value for name, value in yarn.items() if value is not None}

        layers = text["num_hidden_layers"]
        interval = text.get("full_attention_interval", 4)
        by_interval = [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
        ]
        return Config(
            hidden_size=text["hidden_size"],
            num_hidden_layers=layers,
            intermediate_size=text["intermediate_size"],
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            vocab_size=text["vocab_size"],
            linear_conv_kernel_dim=text["linear_conv_kernel_dim"],
            linear_num_key_heads=text["linear_num_key_heads"],
            linear_num_value_heads=text["linear_num_value_heads"],
            linear_key_head_dim=text["linear_key_head_dim"],
            linear_value_head_dim=text["linear_value_head_dim"],
            rms_norm_eps=text["rms_norm_eps"],
            tie_word_embeddings=text.get(
                "tie_word_embeddings", whole.get("tie_word_embeddings", False)
            ),
            layer_types=tuple(text.get("layer_types") or by_interval),
            rope_theta=float(rope_field("rope_theta", 1e7)),
            rotary_dim=int(text["head_dim"] * rope_field("partial_rotary_factor", 0.25)),
            mrope_section=tuple(rope_field("mrope_section", (11, 11, 10))),
            yarn=Yarn(**yarn) if kind == "yarn" else None,
            mtp_num_hidden_layers=text.get("mtp_num_hidden_layers", 0),
        )


# --------------------------------------------------------------------------------- weights


def text_tensors(c: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model and its shape, under names without a prefix."""
    values = c.linear_num_value_heads * c.linear_value_head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for i, kind in enumerate(c.layer_types):
        own: dict[str, tuple[int, ...]]
        if kind == "linear_attention":
            own = {
                "linear_attn.in_proj_qkv.weight": (c.conv_dim, c.hidden_size),
                "linear_attn.in_proj_z.weight": (values, c.hidden_size),
                "linear_attn.in_proj_b.weight": (c.linear_num_value_heads, c.hidden_size),
                "linear_attn.in_proj_a.weight": (c.linear_num_value_heads, c.hidden_size),
                "linear_attn.conv1d.weight": (c.conv_dim, 1, c.linear_conv_kernel_dim),
                "linear_attn.A_log": (c.linear_num_value_heads,),
                "linear_attn.dt_bias": (c.linear_num_value_heads,),
                "linear_attn.norm.weight": (c.linear_value_head_dim,),
                "linear_attn.out_proj.weight": (c.hidden_size, values),
            }
        else:
            own = attention_tensors(c)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block_tensors(c, own).items()}
    shapes["norm.weight"] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def attention_tensors(c: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a full-attention mixer."""
    queries = c.num_attention_heads * c.head_dim
    keys = c.num_key_value_heads * c.head_dim
    return {
        "self_attn.q_proj.weight": (2 * queries, c.hidden_size),
        "self_attn.k_proj.weight": (keys, c.hidden_size),
        "self_attn.v_proj.weight": (keys, c.hidden_size),
        "self_attn.o_proj.weight": (c.hidden_size, queries),
        "self_attn.q_norm.weight": (c.head_dim,),
        "self_attn.k_norm.weight": (c.head_dim,),
    }


def block_tensors(c: Config, mixer: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A decoder layer around the tensors of its mixer."""
    return {
        "input_layernorm.weight": (c.hidden_size,),
        **mixer,
        "post_attention_layernorm.weight": (c.hidden_size,),
        "mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
    }


def mtp_tensors(c: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of the multi-token prediction block, which this file does not run."""
    layer = block_tensors(c, attention_tensors(c))
    return {
        "mtp.fc.weight": (c.hidden_size, 2 * c.hidden_size),
        **{f"mtp.layers.0.{name}": shape for name, shape in layer.items()},
        "mtp.pre_fc_norm_embedding.weight": (c.hidden_size,),
        "mtp.pre_fc_norm_hidden.weight": (c.hidden_size,),
        "mtp.norm.weight": (c.hidden_size,),
    }


PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")


def canonical_name(name: str) -> str:
    """A checkpoint's name for a text tensor without the prefix its writer chose."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those of the index, or the only one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    (only,) = folder.glob("*.safetensors")
    return [only]


def load_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint folder, widened to float32, under the file's own names."""
    tensors = {}
    for path in shard_files(folder):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            tensors[name] = widen(entry["dtype"], entry["data"]).reshape(entry["shape"])
    return tensors


def widen(dtype: str, data: bytes) -> np.ndarray:
    """Stored numbers as float32. BF16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


# ------------------------------------------------------------------------------ primitives


def linear(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y = x w^T. x: [tokens, in], w: [out, in]."""
    return x @ w.T


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), never forming the exponential of a positive number."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """ln(1 + e^x); beyond 20 it is x itself."""
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Zero-centred RMSNorm over the last axis: the stored weight means 1 + w.

    All norms of the decoder but one (`gated_rms_norm`) are of this kind.
    """
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * (1 + w)


def gated_rms_norm(x: np.ndarray, z: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm with a plain weight, times silu(z). Only `linear_attn.norm` is of this kind."""
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
    return y * w * silu(z)


def l2_norm(x: np.ndarray) -> np.ndarray:
    """x / sqrt(sum x^2 + 1e-6) over the last axis: eps joins the sum, inside the root."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + x.dtype.type(1e-6))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def mlp(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """SwiGLU: down(silu(gate x) * up x)."""
    return linear(silu(linear(x, gate)) * linear(x, up), down)


# ------------------------------------------------------------------------------------ rope


def inverse_frequencies(theta: float, rotary_dim: int, yarn: Yarn | None = None) -> np.ndarray:
    """f_i = theta^(-2i / rotary_dim), float32 [rotary_dim / 2].

    The exponent, the power and the reciprocal are each rounded to float32: at position
    200,000 a last bit of f_1 is worth 0.01 radian.

    YaRN keeps what turns often within the original context, divides by its factor what hardly
    turns once, and blends in between; every step in float32 as well.
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    if yarn is None:
        return np.float32(1) / power
    low, high = yarn_range(theta, rotary_dim, yarn)
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    stretched = 1 / (np.float32(yarn.factor) * power)
    return stretched * (1 - kept) + 1 / power * kept


def yarn_range(theta: float, rotary_dim: int, yarn: Yarn) -> tuple[float, float]:
    """Indices of the last frequency that YaRN keeps and of the first that it divides.

    The frequency of index d ln(n / 2 pi r) / (2 ln theta) turns r times in n positions.
    """

    def index(turns: float) -> float:
        turn = yarn.original_max_position_embeddings / (2 * np.pi * turns)
        return rotary_dim * np.log(turn) / (2 * np.log(theta))

    low = max(np.floor(index(yarn.beta_fast)), 0)
    high = min(np.ceil(index(yarn.beta_slow)), rotary_dim - 1)
    return low, high if low != high else high + 0.001


def mrope_axes(mrope_section: tuple[int, int, int], n_frequencies: int) -> np.ndarray:
    """Which position, 0 time, 1 height or 2 width, drives each frequency: T H W T H W ...

    Height and width own every third frequency as far as their sections reach; time has the
    rest.
    """
    i = np.arange(n_frequencies)
    axes = np.zeros(n_frequencies, dtype=np.int64)
    axes[(i % 3 == 1) & (i < 3 * mrope_section[1])] = 1
    axes[(i % 3 == 2) & (i < 3 * mrope_section[2])] = 2
    return axes


def rope_tables(
    positions: np.ndarray,
    frequencies: np.ndarray,
    mrope_section: tuple[int, int, int],
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angles, float64 [tokens, rotary_dim / 2].

    positions: [3, tokens], time, height, width; for text all three are the token's index.
    The angle is the float32 product of position and frequency; its cos and sin are taken
    accurately. Both halves of that sentence matter at far positions. YaRN multiplies both by
    `scale`.
    """
    axes = mrope_axes(mrope_section, len(frequencies))
    angles = positions.astype(np.float32)[axes].T * frequencies.astype(np.float32)
    angles = angles.astype(np.float64)
    return scale * np.cos(angles), scale * np.sin(angles)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate pairs (i, i + half) of the leading 2 * half dims; the others pass through.

    x: [tokens, heads, head_dim]; cos, sin: [tokens, half].
    """
    half = cos.shape[-1]
    c, s = cos[:, None, :].astype(x.dtype), sin[:, None, :].astype(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=-1)


# ------------------------------------------------------------------------- gated delta net


def conv1d_silu(x: np.ndarray, w: np.ndarray, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Causal depthwise convolution, then SiLU.

    x: [tokens, channels]; w: [channels, kernel], the last tap meets the current token;
    tail: [channels, kernel - 1], the inputs before x, oldest first.
    Returns y [tokens, channels] and the new tail.
    """
    kernel = w.shape[1]
    rows = np.concatenate([tail.T, x])  # [kernel - 1 + tokens, channels]
    y = sum(rows[j : j + len(x)] * w[:, j] for j in range(kernel))
    return silu(y), rows[len(rows) - (kernel - 1) :].T.copy()


def gates(
    a: np.ndarray, b: np.ndarray, a_log: np.ndarray, dt_bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log decay g = -e^A_log softplus(a + dt_bias) <= 0, and write strength beta = sigmoid(b)."""
    return -np.exp(a_log) * softplus(a + dt_bias), sigmoid(b)


def delta_rule(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray, s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gated delta rule (arXiv:2412.06464), token by token.

    q, k: [tokens, h_k, d_k], normalised and q scaled; v: [tokens, h_v, d_v];
    g, beta: [tokens, h_v]; s: [h_v, d_k, d_v]. Returns y [tokens, h_v, d_v] and the new s.
    Value head h uses key head h // (h_v / h_k).
    """
    shared = v.shape[1] // k.shape[1]
    q, k = np.repeat(q, shared, axis=1), np.repeat(k, shared, axis=1)
    y = np.empty_like(v)
    for t in range(len(v)):
        s = s * np.exp(g[t])[:, None, None]  # decay first
        predicted = np.einsum("hkv,hk->hv", s, k[t])  # what the decayed state says
        error = beta[t][:, None] * (v[t] - predicted)
        s = s + k[t][:, :, None] * error[:, None, :]
        y[t] = np.einsum("hkv,hk->hv", s, q[t])  # read after the write
    return y, s


def delta_rule_chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    beta: np.ndarray,
    s: np.ndarray,
    chunk: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """The same function as `delta_rule`, a chunk of tokens at a time.

    Inside a chunk each token's error depends on the earlier ones through a unit lower
    triangular system; solving it turns the recurrence into matrix products:

        G = cumsum(g),  D_ij = e^(G_i - G_j) for j <= i      (never e^-G alone: it overflows)
        A = strictly lower part of  beta_i (k_i . k_j) D_ij
        N = (I + A)^-1 (beta V - beta e^G K s)               the error rows
        y = e^G Q s + lower(Q K^T * D) N
        s <- e^G_last s + (e^(G_last - G) K)^T N

    G is summed in float64: behind a token with g = -1000, a difference of two float32 sums has
    no more than four good digits.
    """
    shared = v.shape[1] // k.shape[1]
    s, y = s.copy(), np.empty_like(v)
    for begin in range(0, len(v), chunk):
        part = slice(begin, begin + chunk)
        for h in range(v.shape[1]):
            kh, qh, vh = k[part, h // shared], q[part, h // shared], v[part, h]
            b = beta[part, h][:, None]
            total = np.cumsum(g[part, h], dtype=np.float64)
            lower = np.tril(np.ones((len(total), len(total)), dtype=bool))
            gap = np.where(lower, total[:, None] - total[None, :], -np.inf)
            decay = np.exp(gap).astype(v.dtype)  # [i, j], the last row is decay to the end
            since_start = np.exp(total)[:, None].astype(v.dtype)
            system = np.eye(len(total), dtype=v.dtype) + np.tril(b * (kh @ kh.T) * decay, -1)
            errors = np.linalg.solve(system, b * vh - (b * since_start * kh) @ s[h])
            y[part, h] = since_start * (qh @ s[h]) + (qh @ kh.T * decay) @ errors
            s[h] = since_start[-1] * s[h] + (decay[-1][:, None] * kh).T @ errors
    return y, s


# -------------------------------------------------------------------------- full attention


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of the newest tokens over the whole cache.

    q: [tokens, h_q, head_dim], the last `tokens` of the n positions; keys, values:
    [h_kv, n, head_dim]. Query head h reads key/value head h // (h_q / h_kv). Scores are
    scaled by head_dim^-1/2. Returns [tokens, h_q, head_dim].
    """
    tokens, h_q, head_dim = q.shape
    h_kv, n, _ = keys.shape
    visible = np.arange(n)[None, :] <= np.arange(n - tokens, n)[:, None]  # [tokens, n]
    y = np.empty_like(q)
    for h in range(h_q):
        kv = h // (h_q // h_kv)
        scores = q[:, h] @ keys[kv].T * q.dtype.type(head_dim**-0.5)
        y[:, h] = softmax(np.where(visible, scores, -np.inf)) @ values[kv]
    return y


# ----------------------------------------------------------------------------------- model


@dataclass
class State:
    """Everything one timeline of tokens needs to go on.

    A linear layer holds "conv" [conv_dim, kernel - 1], the last inputs of the convolution,
    oldest first, and "recurrent" [h_v, d_k, d_v]; a full layer "key" and "value"
    [h_kv, n_tokens, head_dim], keys after norm and rotation. Zeros are the exact start.
    """

    layers: list[dict[str, np.ndarray]]
    n_tokens: int = 0

    def copy(self) -> State:
        return State([{k: v.copy() for k, v in one.items()} for one in self.layers], self.n_tokens)


@dataclass
class Reference:
    """A model: config and weights, under names without a prefix."""

    config: Config
    weights: dict[str, np.ndarray]
    dtype: type = np.float32
    chunk: int | None = None  # None: recurrent delta rule; else the chunked form
    frequencies: np.ndarray = field(init=False)
    rope_scale: float = field(init=False)

    def __post_init__(self) -> None:
        for name, shape in text_tensors(self.config).items():
            if self.weights[name].shape != shape:
                raise ValueError(f"{name}: shape {self.weights[name].shape}, expected {shape}")
        self.weights = {
            name: self.weights[name].astype(self.dtype) for name in text_tensors(self.config)
        }
        c = self.config
        self.frequencies = inverse_frequencies(c.rope_theta, c.rotary_dim, c.yarn)
        self.rope_scale = 1.0 if c.yarn is None else c.yarn.scale

    @staticmethod
    def load(folder: str | Path, dtype: type = np.float32, chunk: int | None = None) -> Reference:
        folder = Path(folder)
        config = Config.from_dict(json.loads((folder / "config.json").read_text()))
        tensors = {canonical_name(name): t for name, t in load_tensors(folder).items()}
        return Reference(config, tensors, dtype, chunk)

    def start(self) -> State:
        c = self.config
        linear_layer = {
            "conv": (c.conv_dim, c.linear_conv_kernel_dim - 1),
            "recurrent": (
                c.linear_num_value_heads,
                c.linear_key_head_dim,
                c.linear_value_head_dim,
            ),
        }
        cache = (c.num_key_value_heads, 0, c.head_dim)
        full_layer = {"key": cache, "value": cache}
        return State(
            [
                {
                    name: np.zeros(shape, self.dtype)
                    for name, shape in (
                        linear_layer if kind == "linear_attention" else full_layer
                    ).items()
                }
                for kind in c.layer_types
            ]
        )

    def feed(
        self,
        state: State,
        tokens,
        positions: np.ndarray | None = None,
        trace: dict[str, np.ndarray] | None = None,
        rows: int | None = None,
    ) -> np.ndarray:
        """Run tokens through the decoder; `state` moves on.

        Returns the rows after the final norm, [tokens, hidden], or only the last `rows` of them:
        if the last layer is a full one, the others cost it no more than their keys and values.
        `positions` [3, tokens] replaces the running index in the rotation only. Intermediate
        values go to `trace`.
        """
        c, w = self.config, self.weights
        tokens = np.asarray(tokens, dtype=np.int64)
        if positions is None:
            index = np.arange(state.n_tokens, state.n_tokens + len(tokens))
            positions = np.stack([index] * 3)
        cos, sin = rope_tables(positions, self.frequencies, c.mrope_section, self.rope_scale)

        note = Notes(trace)
        x = w["embed_tokens.weight"][tokens]  # no scaling
        note(
            embed=x,
            rope_cos=np.concatenate([cos, cos], -1),
            rope_sin=np.concatenate([sin, sin], -1),
        )
        for i, kind in enumerate(c.layer_types):
            p, note = f"layers.{i}.", Notes(trace, f"layer.{i}.")
            n = rms_norm(x, w[p + "input_layernorm.weight"], c.rms_norm_eps)
            if kind == "linear_attention":
                y = self.gated_delta_net(n, p + "linear_attn.", state.layers[i], note)
            else:
                last = rows if i == c.num_hidden_layers - 1 else None
                y = self.attention(n, p + "self_attn.", state.layers[i], cos, sin, note, last)
            x = x[-len(y) :] + y
            m = rms_norm(x, w[p + "post_attention_layernorm.weight"], c.rms_norm_eps)
            f = mlp(m, *(w[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
            x = x + f
            note(input_layernorm=n, mixer=y, post_attention_layernorm=m, mlp=f, output=x)
        state.n_tokens += len(tokens)
        if rows is not None:
            x = x[-rows:]
        x = rms_norm(x, w["norm.weight"], c.rms_norm_eps)
        Notes(trace)(final_norm=x)
        return x

    def gated_delta_net(
        self, x: np.ndarray, p: str, state: dict[str, np.ndarray], note: Notes
    ) -> np.ndarray:
        """The mixer of a linear layer. x, y: [tokens, hidden]; p: prefix of its weights."""
        c, w = self.config, self.weights
        h_k, d_k = c.linear_num_key_heads, c.linear_key_head_dim
        h_v, d_v = c.linear_num_value_heads, c.linear_value_head_dim
        qkv = linear(x, w[p + "in_proj_qkv.weight"])
        z = linear(x, w[p + "in_proj_z.weight"])
        b = linear(x, w[p + "in_proj_b.weight"])
        a = linear(x, w[p + "in_proj_a.weight"])
        mixed, state["conv"] = conv1d_silu(qkv, w[p + "conv1d.weight"][:, 0], state["conv"])
        q, k, v = np.split(mixed, [h_k * d_k, 2 * h_k * d_k], axis=-1)
        q, k, v = q.reshape(-1, h_k, d_k), k.reshape(-1, h_k, d_k), v.reshape(-1, h_v, d_v)
        g, beta = gates(a, b, w[p + "A_log"], w[p + "dt_bias"])

        rule = delta_rule if self.chunk is None else delta_rule_chunked
        extra = {} if self.chunk is None else {"chunk": self.chunk}
        scaled_q = l2_norm(q) * self.dtype(d_k**-0.5)  # q alone is scaled
        y, state["recurrent"] = rule(scaled_q, l2_norm(k), v, g, beta, state["recurrent"], **extra)
        normed = gated_rms_norm(y, z.reshape(-1, h_v, d_v), w[p + "norm.weight"], c.rms_norm_eps)
        note(in_proj_qkv=qkv, in_proj_z=z, in_proj_b=b, in_proj_a=a, conv_silu=mixed)
        note(q=q, k=k, v=v, g=g, beta=beta, delta_out=y, gated_norm=normed.reshape(-1, d_v))
        return linear(normed.reshape(-1, h_v * d_v), w[p + "out_proj.weight"])

    def attention(
        self,
        x: np.ndarray,
        p: str,
        state: dict[str, np.ndarray],
        cos: np.ndarray,
        sin: np.ndarray,
        note: Notes,
        rows: int | None = None,
    ) -> np.ndarray:
        """The mixer of a full layer: gated grouped-query attention. x, y: [tokens, hidden].

        With `rows` only the last rows of y, [rows, hidden].
        """
        c, w = self.config, self.weights
        h_q, h_kv, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        first = 0 if rows is None else len(x) - rows
        q_proj = linear(x[first:], w[p + "q_proj.weight"])
        k_proj = linear(x, w[p + "k_proj.weight"])
        v_proj = linear(x, w[p + "v_proj.weight"])
        q, gate = np.split(q_proj.reshape(-1, h_q, 2 * d), 2, axis=-1)  # per head: query, gate
        q_norm = rms_norm(q, w[p + "q_norm.weight"], c.rms_norm_eps)
        k_norm = rms_norm(k_proj.reshape(-1, h_kv, d), w[p + "k_norm.weight"], c.rms_norm_eps)
        q_rope = rotate(q_norm, cos[first:], sin[first:])
        k_rope = rotate(k_norm, cos, sin)
        v = v_proj.reshape(-1, h_kv, d)
        state["key"] = np.concatenate([state["key"], k_rope.transpose(1, 0, 2)], axis=1)
        state["value"] = np.concatenate([state["value"], v.transpose(1, 0, 2)], axis=1)
        y = attend(q_rope, state["key"], state["value"])
        gated = (y * sigmoid(gate)).reshape(-1, h_q * d)  # sigmoid here, SiLU in linear layers
        note(q_proj=q_proj, k_proj=k_proj, v_proj=v_proj, q_norm=q_norm, k_norm=k_norm)
        note(q_rope=q_rope, k_rope=k_rope, attn_out=y, attn_gated=gated)
        return linear(gated, w[p + "o_proj.weight"])

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits of rows that left the final norm."""
        tied = self.config.tie_word_embeddings
        return linear(hidden, self.weights["embed_tokens.weight" if tied else "lm_head.weight"])

    def logits(self, tokens, positions: np.ndarray | None = None) -> np.ndarray:
        """Logits of every token of a fresh timeline, [tokens, vocab]."""
        return self.head(self.feed(self.start(), tokens, positions))

    def greedy(self, prompt, count: int, state: State | None = None) -> list[int]:
        """The `count` most likely tokens after `prompt`, one at a time from the cache."""
        state = self.start() if state is None else state
        tokens: list[int] = []
        new = list(prompt)
        for _ in range(count):
            row = self.head(self.feed(state, new)[-1:])[0]
            tokens.append(int(np.argmax(row)))
            new = tokens[-1:]
        return tokens

    def trace(self, tokens, state: State | None = None) -> dict[str, np.ndarray]:
        """Every intermediate value of one feed, by name."""
        trace: dict[str, np.ndarray] = {}
        hidden = self.feed(self.start() if state is None else state, tokens, trace=trace)
        trace["logits"] = self.head(hidden)
        return trace


class Notes:
    """Writes values under a prefix into a trace, or nowhere."""

    def __init__(self, trace: dict[str, np.ndarray] | None, prefix: str = "") -> None:
        self.trace, self.prefix = trace, prefix

    def __call__(self, **values: np.ndarray) -> None:
        if self.trace is not None:
            self.trace.update({self.prefix + name: value for name, value in values.items()})
