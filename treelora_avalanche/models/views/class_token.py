"""Output of the last block of a timm vision transformer at the class token alone."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

_BLOCKS = {
    VisionTransformer: ((Block,), (Attention,)),
    Eva: ((EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope)),
}
"""Blocks and attentions that this module computes, by the transformer that holds them."""


def has_own(vit: VisionTransformer | Eva, *methods: str) -> bool:
    """Returns whether a transformer has timm's own methods, and not those of a subclass.

    :param vit: the transformer.
    :param methods: names of methods.
    """
    own = Eva if isinstance(vit, Eva) else VisionTransformer
    return all(getattr(type(vit), name) is getattr(own, name) for name in methods)


def head_reads_class_token(vit: VisionTransformer | Eva) -> bool:
    """Returns whether the head reads the output of the last block at the class token alone.

    :param vit: the transformer.
    """
    last: Any = vit.blocks[-1]
    blocks, attentions = _BLOCKS[Eva if isinstance(vit, Eva) else VisionTransformer]
    return (
        has_own(vit, "forward_head", "pool")
        and vit.global_pool == "token"
        and vit.attn_pool is None
        and vit.cls_token is not None
        and type(last) in blocks
        and type(last.attn) in attentions
        and (isinstance(vit, Eva) or getattr(last.attn, "gate", None) is None)
    )


def class_token_of(block: nn.Module, hidden: Tensor, rope: Tensor | None = None) -> Tensor:
    """Returns the output of a block at the class token.

    Its keys and values come from all tokens; its query, and all that follows, from one.

    :param block: a block of timm, of a transformer for which :func:`head_reads_class_token` holds.
    :param hidden: ``(batch, n_tokens, dim)``, the class token first.
    :param rope: rotary position embeddings of the block, as timm passes them to it.
    :return: ``(batch, 1, dim)``.
    """
    at: Any = block  # to mypy, what a module holds may be a tensor
    token = hidden[:, :1]
    if isinstance(block, EvaBlockPostNorm):
        token = token + at.drop_path1(at.norm1(_eva_attention(at.attn, hidden, rope)))
        return token + at.drop_path2(at.norm2(at.mlp(token)))
    if isinstance(block, EvaBlock):
        mixed = _eva_attention(at.attn, at.norm1(hidden), rope)
        token = token + at.drop_path1(_scaled(at.gamma_1, mixed))
        return token + at.drop_path2(_scaled(at.gamma_2, at.mlp(at.norm2(token))))
    token = token + at.drop_path1(at.ls1(_attention(at.attn, at.norm1(hidden))))
    return token + at.drop_path2(at.ls2(at.mlp(at.norm2(token))))


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _attention(attention: Any, x: Tensor) -> Tensor:
    n, n_tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(n, n_tokens, 3, attention.num_heads, attention.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, n_heads, n_tokens, head_dim) each
    mixed = _mixed(attention, attention.q_norm(q[:, :, :1]), attention.k_norm(k), v)
    return attention.proj_drop(attention.proj(attention.norm(mixed)))  # type: ignore[no-any-return]


def _eva_attention(attention: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    q, k, v = _eva_projections(attention, x)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:  # not of the prefix tokens, of which the class token is one
        start = attention.num_prefix_tokens
        rotated = apply_rot_embed_cat(k[:, :, start:], rope, half=attention.rotate_half)
        k = torch.cat((k[:, :, :start], rotated), 2).type_as(v)
        q = q.type_as(v)
    groups = getattr(attention, "num_kv_groups", 1)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    mixed = attention.norm(_mixed(attention, q, k, v))
    if attention.gate is not None:
        mixed = mixed * attention.gate(x[:, :1]).sigmoid()
    return attention.proj_drop(attention.proj(mixed))  # type: ignore[no-any-return]


def _eva_projections(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query of the class token, keys and values of all: ``(batch, n_heads, n_tokens, head_dim)``.

    As timm computes them, which reads the weight of ``qkv`` or calls the layer.
    """

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)

    if attention.qkv is None:
        q = attention.q_proj(x[:, :1])
        return heads(q), heads(attention.k_proj(x)), heads(attention.v_proj(x))
    q_bias = getattr(attention, "q_bias", None)
    if q_bias is None:
        qkv = attention.qkv(x)
    else:
        bias = torch.cat((q_bias, attention.k_bias, attention.v_bias))
        if attention.qkv_bias_separate:
            qkv = attention.qkv(x) + bias
        else:
            qkv = F.linear(x, attention.qkv.weight, bias)
    q, k, v = map(heads, qkv.chunk(3, 2))
    return q[:, :, :1], k, v


def _mixed(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the attention of one query, ``(batch, 1, n_heads * head_dim)``."""
    # For a single query the fused attention is not faster, and in bf16 on a CPU far slower.
    scores = (attention.scale * q) @ k.mT
    mixed: Tensor = attention.attn_drop(scores.softmax(-1)) @ v
    return mixed.transpose(1, 2).flatten(2)
