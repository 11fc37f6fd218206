"""Small models with real layer names, LoRA files for them, and the fusion written out in float64."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import nn

from lib_dynfuse.lora import read_lora

BLOCK = "input_blocks.1.1.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn1.to_out.0"]
FEED_FORWARD = [f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"]
CONVOLUTION = "input_blocks.3.0.op"
WIDTH = 16


class Nested(nn.Module):
    """Layers under dotted names, run one after another; forward returns every layer's output by name."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.order = list(layers)
        for name, layer in layers.items():
            parent: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent._modules[step]
            parent.add_module(last, layer)

    def forward(self, x):
        return {name: self.get_submodule(name)(x) for name in self.order}


def tokens_model(names=(*ATTENTION, *FEED_FORWARD), width=WIDTH, seed=0):
    """Every layer a square linear one that sees the same tokens, so that a layer's reference needs no other layer."""
    torch.manual_seed(seed)
    return Nested({name: nn.Linear(width, width) for name in names}).eval().requires_grad_(False)


def lora_file(path, model, names, *, rank=4, scale=0.3, seed=0, alpha=None, prefix="lora_unet_"):
    """A kohya file on some layers of a model, read back. Conv layers get conv factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        weight = model.get_submodule(name).weight
        key = prefix + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        tensors[f"{key}.lora_up.weight"] = scale * torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, str(path))
    return read_lora(path)


def delta_weights(path, names):
    """dW per layer in float64, straight from the file by the definition (alpha / rank) B A."""
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    result = {}
    for name in names:
        key = "lora_unet_" + name.replace(".", "_")
        down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
        alpha = tensors.get(f"{key}.alpha")
        scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
        result[name] = scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return result


def kl(y0, d):
    """KL(softmax(y0 + d) || softmax(y0)), mean over tokens: (N, T, C) float64 -> (N,)."""
    log_p, log_q = torch.log_softmax(y0, -1), torch.log_softmax(y0 + d, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean(-1)
