"""The transformer of ST-AR: LlamaGen's class-conditional GPT (arXiv 2406.06525), unchanged.

A Llama-style decoder over VQ tokens: RMSNorm, SwiGLU, 2D rotary positions, no biases. Position 0 holds the
class c (or the null class, index num_classes), position p > 0 the token x_p, and position p predicts
x_{p+1}. ST-AR (arXiv 2509.15185) trains this model with extra losses (losses.py) and adds nothing to it but
the key mask of Eq. 3. Parameter names are LlamaGen's, so its published checkpoints load strictly and its
tools read ours.

Shapes in comments: B batch, T tokens per image, C width, H heads, D head size, t positions of this
call, s positions attended to.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# ---- Configuration -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    """Structure of one model; defaults are LlamaGen's at 256 px."""
    n_layer: int
    n_head: int
    dim: int  # C
    vocab_size: int = 16384  # codes
    num_classes: int = 1000  # without the null class
    num_tokens: int = 256  # T, a square number
    dropout: float = 0.1  # of tokens, attention outputs and feed-forward outputs, in train mode
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def ffn_dim(self) -> int:
        return math.ceil(int(8 * self.dim / 3) / 256) * 256  # SwiGLU: 2/3 of 4 C, rounded up to 256

    @property
    def grid(self) -> int:
        return math.isqrt(self.num_tokens)


SIZES = {  # name: (n_layer, n_head, dim)
    "nano": (4, 3, 96),  # 0.5M parameters, with 256 codes and 12 classes
    "tiny": (6, 4, 256),  # 5.7M, with 1,024 codes and 200 classes
    "small": (12, 6, 384),  # 22M, with the same
    "B": (12, 12, 768),  # 111M; LlamaGen's table from here on
    "L": (24, 16, 1024),  # 343M
    "XL": (36, 20, 1280),  # 775M
    "XXL": (48, 24, 1536),  # 1.4B
    "3B": (24, 32, 3200),
}


# ---- Layers ------------------------------------------------------------------------------------------------

def rope_table(config: ModelConfig) -> torch.Tensor:
    """Cosines and sines of the 2D rotary positions, float32 (1 + T, D/2, 2).

    The first half of the D/2 pairs turns with the row, the second with the column, at base^(-2j / (D/2)).
    LlamaGen: the class token's factors are zero, not the identity. Its query and key vanish, so every query
    gives position 0 the logit 0; only its value counts.
    """
    half = config.head_dim // 2
    frequencies = config.rope_base ** -(torch.arange(0, half, 2).float() / half)  # (D/4,)
    angles = torch.arange(config.grid).float()[:, None] * frequencies  # (grid, D/4)
    rows, columns = angles.repeat_interleave(config.grid, 0), angles.repeat(config.grid, 1)  # raster order
    turn = torch.cat([rows, columns], 1)  # (T, D/2)
    table = torch.stack([turn.cos(), turn.sin()], -1)
    return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the interleaved pairs of x (B, t, 2, H, D) by `table` (t, D/2, 2), in float32."""
    cos, sin = table[:, None, None].unbind(-1)  # (t, 1, 1, D/2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Multi-head attention.

    rope      (t, D/2, 2), the rows of `rope_table` for these positions
    allowed   (B or 1, 1, t, s) bool, which query may see which key; None, if nothing is explicit: its own and
              all before it
    extend    from keys and values of this call to those of all positions, by a cache; None: there is none
    explicit  whether to write the softmax out and to return its weights, (B, H, t, s), instead of None
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, allowed, extend, explicit):
        qkv = self.wqkv(x).unflatten(-1, (3, self.n_head, self.head_dim))  # (B, t, 3, H, D)
        q, k = rotate(qkv[:, :, :2], rope).permute(2, 0, 3, 1, 4)  # (B, H, t, D) each
        v = qkv[:, :, 2].transpose(1, 2)
        if extend is not None:
            k, v = extend(k, v)  # (B, H, s, D)
        if explicit:  # softmax(Q K^T / sqrt(D) + causal + mask) V, written out
            logits = q @ k.mT * self.head_dim ** -0.5  # (B, H, t, s)
            weights = logits.masked_fill(~allowed, -math.inf).softmax(-1)
            y = weights @ v
        else:
            weights = None
            y = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=allowed is None)
        return self.resid_dropout(self.wo(y.transpose(1, 2).flatten(2))), weights


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.dim, config.ffn_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.ffn_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class TransformerBlock(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, rope, allowed, extend, explicit):
        y, weights = self.attention(self.attention_norm(x), rope, allowed, extend, explicit)
        x = x + y
        return x + self.feed_forward(self.ffn_norm(x)), weights


# ---- The model ---------------------------------------------------------------------------------------------

class Output(NamedTuple):
    """What a forward returns; the parts that were not asked for are None or empty."""
    logits: torch.Tensor | None  # (B, t, codes) float32
    hidden: dict[int, torch.Tensor]  # {n: output of the n-th block, (B, t, C)}
    attention: list[torch.Tensor]  # per layer (B, H, t, s), rows sum to 1


class Transformer(nn.Module):
    """See the head of this file. In eval mode no dropout; nothing else depends on the mode."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.dim % (4 * config.n_head) or config.grid ** 2 != config.num_tokens:
            raise ValueError(f"width {config.dim} must be a multiple of 4 x {config.n_head} heads, and "
                             f"{config.num_tokens} tokens a square number.")
        self.config = config
        classes = nn.Embedding(config.num_classes + 1, config.dim)  # the last row is the null class
        self.cls_embedding = nn.ModuleDict({"embedding_table": classes})  # LlamaGen's name
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rope", rope_table(config), persistent=False)
        causal = torch.ones(config.num_tokens, config.num_tokens, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)
        for module in self.modules():  # LlamaGen: N(0, 0.02), a zero head: the first loss is ln(codes)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(self, tokens: torch.Tensor, classes: torch.Tensor, *, key_mask: torch.Tensor | None = None,
                layers: tuple[int, ...] = (), head: bool = True, return_attention: bool = False,
                cache=None) -> Output:
        """Run the positions of [c, x_1 ... x_n].

        tokens   (B, n) int64 with 0 <= n < T, the tokens known so far
        classes  (B,) int64, final class indices; num_classes is the null class. Nothing is dropped in here
        key_mask (B, 1 + n) bool, True where a key is hidden from every query, Eq. 3; never at position 0
        layers   blocks whose outputs to return, 1 ... n_layer
        head     whether to compute logits
        return_attention  whether to return attention weights, from the explicit path instead of the fused one
        cache    a `sample.KVCache`: positions in it are not run again, only the new ones are returned
        """
        start = cache.length if cache is not None else 0
        end = tokens.shape[1] + 1
        new = tokens[:, max(start - 1, 0):]  # position p reads token x_p, which stands at p - 1 in `tokens`
        x = self.tok_embeddings(new)  # (B, n, C), or what the cache lacks of it
        if start == 0:  # position 0 reads the class
            x = torch.cat([self.cls_embedding["embedding_table"](classes)[:, None], x], 1)  # (B, t, C)
        x = self.tok_dropout(x)

        allowed = self.causal[None, None, start:end, :end]  # (1, 1, t, s)
        if key_mask is not None:
            allowed = allowed & ~key_mask[:, None, None, :]  # (B, 1, t, s): Eq. 3
        elif start == 0 and not return_attention:
            allowed = None  # the plain triangle, for which the fused kernel needs no mask
        needed = len(self.layers) if head else max(layers, default=0)  # no head, no need to go to the end
        hidden, attention = {}, []
        for number, layer in enumerate(self.layers[:needed], 1):
            extend = partial(cache.append, number - 1) if cache is not None else None
            x, weights = layer(x, self.rope[start:end], allowed, extend, return_attention)
            if number in layers:
                hidden[number] = x
            if return_attention:
                attention.append(weights)
        if cache is not None:
            cache.length = end
        return Output(self.output(self.norm(x)).float() if head else None, hidden, attention)
