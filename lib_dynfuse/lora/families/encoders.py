"""Text encoders that families share, by the names that transformers gives to their layers."""

from __future__ import annotations

import re

from .family import Encoder

_CLIP = re.compile(
    r"text_model_encoder_layers_\d+_(?:self_attn_(?:q|k|v|out)_proj|mlp_fc[12]|layer_norm[12])|text_projection|"
    r"text_model_(?:final_layer_norm|embeddings_(?:token|position)_embedding)"
)
_CLIP_NORMS = re.compile(r"text_model_(?:encoder_layers_\d+_layer_norm[12]|final_layer_norm)")

CLIP_L = Encoder("CLIP-L", _CLIP, _CLIP_NORMS)
CLIP_G = Encoder("CLIP-G", _CLIP, _CLIP_NORMS)
CLIP_H = Encoder("OpenCLIP-H", _CLIP, _CLIP_NORMS)
T5 = Encoder(
    "T5",
    re.compile(
        r"encoder_block_\d+_layer_[01]_(?:SelfAttention_(?:q|k|v|o|relative_attention_bias)|DenseReluDense_(?:wi|wi_0|wi_1|wo)|layer_norm)|"
        r"encoder_final_layer_norm|shared"
    ),
    re.compile(r"encoder_(?:block_\d+_layer_[01]|final)_layer_norm"),
)
GEMMA2 = Encoder(
    "Gemma 2",
    re.compile(r"(?:model_)?layers_\d+_(?:self_attn_[qkvo]_proj|mlp_(?:gate|up|down)_proj)"),
    re.compile(r"(?:model_)?(?:layers_\d+_(?:(?:input|post_attention)_layernorm|(?:pre|post)_feedforward_layernorm)|norm)"),
)

__all__ = ["CLIP_G", "CLIP_H", "CLIP_L", "GEMMA2", "T5"]
