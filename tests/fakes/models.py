"""Tiny denoisers and text encoders with the real models' layer names, and LoRA files for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

WIDTH, CONTEXT, HEADS = 16, 24, 2


class Attention(nn.Module):
    def __init__(self, linear, width, context):
        super().__init__()
        self.to_q, self.to_k, self.to_v = linear(width, width), linear(context, width), linear(context, width)
        self.to_out = nn.Sequential(linear(width, width), nn.Identity())

    def forward(self, x, context):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Transformer(nn.Module):
    def __init__(self, linear, width, context):
        super().__init__()
        block = nn.Module()
        block.attn1, block.attn2 = Attention(linear, width, width), Attention(linear, width, context)
        block.ff = nn.Module()
        block.ff.net = nn.ModuleList([nn.Module(), nn.Identity(), linear(4 * width, width)])
        block.ff.net[0].proj = linear(width, 4 * width)
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x, context):
        tokens = x.flatten(2).transpose(1, 2)
        block = self.transformer_blocks[0]
        tokens = tokens + block.attn1(tokens, tokens)
        tokens = tokens + block.attn2(tokens, context)
        tokens = tokens + block.ff.net[2](F.gelu(block.ff.net[0].proj(tokens)))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """LDM names. forward(x (N, 4, h, w), timesteps (N,), context (N, tokens, CONTEXT)) -> (N, 4, h, w)."""

    def __init__(self, seed=0, linear=nn.Linear, convolution=nn.Conv2d, blocks=1):
        super().__init__()
        torch.manual_seed(seed)
        self.input_blocks = nn.ModuleList([nn.ModuleList([convolution(4, WIDTH, 3, padding=1)])])
        for _ in range(blocks):
            self.input_blocks.append(nn.ModuleList([nn.Identity(), Transformer(linear, WIDTH, CONTEXT)]))
        self.middle_block = nn.ModuleList([nn.Identity(), Transformer(linear, WIDTH, CONTEXT)])
        self.out = nn.ModuleList([nn.Identity(), nn.Identity(), convolution(WIDTH, 4, 3, padding=1)])
        self.eval().requires_grad_(False)

    def forward(self, x, timesteps=None, context=None, **kwargs):
        h = self.input_blocks[0][0](x) + timesteps.reshape(-1, 1, 1, 1) * 0.01
        for block in [*self.input_blocks[1:], self.middle_block]:
            h = block[1](h, context)
        return self.out[2](h)


class TextEncoder(nn.Module):
    """CLIP-L's names, as in transformers' CLIPTextModel. forward(texts) -> (texts, tokens, CONTEXT)."""

    def __init__(self, linear=nn.Linear, seed=7):
        super().__init__()
        torch.manual_seed(seed)
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(layer.self_attn, name, linear(CONTEXT, CONTEXT))
        layer.mlp.fc1, layer.mlp.fc2 = linear(CONTEXT, 2 * CONTEXT), linear(2 * CONTEXT, CONTEXT)
        self.transformer = nn.Module()
        self.transformer.text_model = nn.Module()
        self.transformer.text_model.encoder = nn.Module()
        self.transformer.text_model.encoder.layers = nn.ModuleList([layer])
        self.eval().requires_grad_(False)

    def forward(self, texts):
        layer = self.transformer.text_model.encoder.layers[0]
        x = torch.stack([embedded(text) for text in texts])
        attention = layer.self_attn
        weights = torch.softmax(attention.q_proj(x) @ attention.k_proj(x).transpose(1, 2) / CONTEXT**0.5, -1)
        x = x + attention.out_proj(weights @ attention.v_proj(x))
        return x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(x)))


def embedded(text, chunk=5):
    """(tokens, CONTEXT): the same for the same text, and one chunk longer for every `chunk` words more."""
    words = text.split()
    tokens = chunk * max(1, -(-len(words) // chunk))
    rows = [torch.randn(CONTEXT, generator=torch.Generator().manual_seed(sum(map(ord, word)) + i)) for i, word in enumerate(words)]
    return torch.stack(rows + [torch.zeros(CONTEXT)] * (tokens - len(rows)))


def linear_layers(model):
    """Dotted name -> weight of every layer that a LoRA may touch."""
    return {name: module.weight for name, module in model.named_modules() if getattr(module, "weight", None) is not None}


def write_lora(path, seed, unet=None, text=None, *, rank=2, scale=0.4, text_prefix="lora_te_", metadata=None):
    """A kohya file on all layers of a UNet and of a text encoder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    layers = {} if unet is None else {"lora_unet_" + name.replace(".", "_"): w for name, w in linear_layers(unet).items()}
    if text is not None:
        layers.update({text_prefix + n.removeprefix("transformer.").replace(".", "_"): w for n, w in linear_layers(text).items()})
    for key, weight in layers.items():
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        up = scale * torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2), generator=generator)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(rank))}
    save_file(tensors, str(path), metadata or {})
    return str(path)
