"""Small diffusion transformers of random weights, with the layer names of Flux, Chroma, Flux.2, Qwen-Image, Z-Image, Lumina 2 and Krea 2.

Each is written once, in its authors' layers. In diffusers' layout the same weights stand under diffusers' names, fused layers split, so
that both layouts give the same picture. Which names and which rows: Forge Neo's backend/nn and diffusers' loaders/single_file_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CHANNELS, TEXT, EMBEDDING = 16, 8, 12, 8
TOKENS, WORDS = 6, 4


@dataclass(frozen=True)
class Layer:
    """shape: (out, in) of a linear layer, (width,) of a norm. other: diffusers' layers, that share its rows in order, with their numbers.

    swapped: diffusers has its two halves in the other order.
    """

    shape: tuple[int, ...]
    other: dict[str, int]
    swapped: bool = False


Table = dict[str, Layer]
Call = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Small:
    """A family's small model. run: (call a layer, image tokens, embedding of the time, text) -> image tokens."""

    table: Table
    run: Callable[[Call, Tensor, Tensor, Tensor], Tensor]

    def model(self, layout: str = "authors", seed: int = 0) -> SmallModel:
        return SmallModel(self, layout, seed)


class Norm(nn.Module):
    """An RMS norm, which PyTorch has from 2.4 on."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class SmallModel(nn.Module):
    """forward(image (N, TOKENS, CHANNELS), time (N,), text (N, WORDS, TEXT)) -> (N, TOKENS, CHANNELS)."""

    def __init__(self, small: Small, layout: str, seed: int):
        super().__init__()
        self.small, self.layout = small, layout
        generator = torch.Generator().manual_seed(seed)
        for name, layer in small.table.items():
            if len(layer.shape) == 1:
                for path in [name] if layout == "authors" else layer.other:
                    self._add(path, Norm(layer.shape[0]))
                continue
            weight = torch.randn(layer.shape, generator=generator) / layer.shape[1] ** 0.5
            for path, rows in self.shares(name, weight).items():
                linear = nn.Linear(layer.shape[1], rows.shape[0])
                linear.weight.data, linear.bias.data = rows.clone(), torch.zeros(rows.shape[0])
                self._add(path, linear)
        self.eval().requires_grad_(False)

    def _add(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *steps, last = path.split(".")
        for step in steps:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent._modules[step]  # type: ignore[assignment]
        parent.add_module(last, module)

    def shares(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        """Rows of an authors' layer, by this layout's layers."""
        return {name: rows} if self.layout == "authors" else split(self.small.table[name], rows)

    def forward(self, image: Tensor, time: Tensor, text: Tensor) -> Tensor:
        frequencies = torch.arange(1, EMBEDDING + 1, dtype=image.dtype)
        return self.small.run(self._call, image, torch.sin(time[:, None] * frequencies), text)

    def _call(self, name: str, x: Tensor) -> Tensor:
        layer = self.small.table[name]
        if self.layout == "authors":
            return self.get_submodule(name)(x)
        y = torch.cat([self.get_submodule(path)(x) for path in layer.other], -1)
        return torch.cat(list(reversed(y.chunk(2, -1))), -1) if layer.swapped else y


def split(layer: Layer, rows: Tensor) -> dict[str, Tensor]:
    """Rows of an authors' layer, by diffusers' layers."""
    if layer.swapped:
        rows = torch.cat(list(reversed(rows.chunk(2))))
    return dict(zip(layer.other, rows.split(list(layer.other.values())), strict=True))


def linear(out: int, into: int, other: str | dict[str, int], swapped: bool = False) -> Layer:
    return Layer((out, into), {other: out} if isinstance(other, str) else other, swapped)


def norm(width: int, other: str) -> Layer:
    return Layer((width,), {other: width})


def attend(q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
    """Attention with heads of this width; keys and values may have fewer heads than queries."""
    q, k, v = (x.unflatten(-1, (-1, head)).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def plain(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gated(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * plain(x) + shift


HEAD = WIDTH // 2


def flux_table(modulation: bool, up: int, down: int, mlp: tuple[str, str], single: tuple[dict[str, int] | str, str]) -> Table:
    """A double and a single block. up, down: of the MLP, in widths. mlp, single: diffusers' names of its layers, of linear1 and linear2."""
    table: Table = {}
    for stream, to, q, k, v, queries, keys, ff in (
        ("img", "to_out.0", "to_q", "to_k", "to_v", "norm_q", "norm_k", "ff"),
        ("txt", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "ff_context"),
    ):
        block, there = f"double_blocks.0.{stream}", "transformer_blocks.0"
        if modulation:
            table[f"{block}_mod.lin"] = linear(6 * WIDTH, WIDTH, f"{there}.norm1{'_context' if stream == 'txt' else ''}.linear")
        table |= {
            f"{block}_attn.qkv": linear(3 * WIDTH, WIDTH, {f"{there}.attn.{x}": WIDTH for x in (q, k, v)}),
            f"{block}_attn.norm.query_norm": norm(HEAD, f"{there}.attn.{queries}"),
            f"{block}_attn.norm.key_norm": norm(HEAD, f"{there}.attn.{keys}"),
            f"{block}_attn.proj": linear(WIDTH, WIDTH, f"{there}.attn.{to}"),
            f"{block}_mlp.0": linear(up * WIDTH, WIDTH, f"{there}.{ff}.{mlp[0]}"),
            f"{block}_mlp.2": linear(WIDTH, down * WIDTH, f"{there}.{ff}.{mlp[1]}"),
        }
    there = "single_transformer_blocks.0"
    linear1 = single[0] if isinstance(single[0], str) else {f"{there}.{name}": rows for name, rows in single[0].items()}
    if modulation:
        table["single_blocks.0.modulation.lin"] = linear(3 * WIDTH, WIDTH, f"{there}.norm.linear")
    return table | {
        "single_blocks.0.linear1": linear((3 + up) * WIDTH, WIDTH, linear1),
        "single_blocks.0.linear2": linear(WIDTH, (1 + down) * WIDTH, f"{there}.{single[1]}"),
        "single_blocks.0.norm.query_norm": norm(HEAD, f"{there}.attn.norm_q"),
        "single_blocks.0.norm.key_norm": norm(HEAD, f"{there}.attn.norm_k"),
        "img_in": linear(WIDTH, CHANNELS, "x_embedder"),
        "txt_in": linear(WIDTH, TEXT, "context_embedder"),
        "final_layer.linear": linear(CHANNELS, WIDTH, "proj_out"),
    }


def flux_blocks(call: Call, image: Tensor, text: Tensor, mods: dict[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """mods: "img", "txt": (N, 1, 6 WIDTH), "single": (N, 1, 3 WIDTH). Returns (N, TOKENS, WIDTH)."""
    streams = {"img": call("img_in", image), "txt": call("txt_in", text)}
    parts = {name: mods[name].chunk(6, -1) for name in streams}
    projected = {}
    for name, x in streams.items():
        block = f"double_blocks.0.{name}_attn"
        q, k, v = call(f"{block}.qkv", modulated(x, *parts[name][:2])).chunk(3, -1)
        q, k = (call(f"{block}.norm.{kind}_norm", y.unflatten(-1, (-1, HEAD))).flatten(-2) for kind, y in (("query", q), ("key", k)))
        projected[name] = q, k, v
    joint = attend(*(torch.cat([projected["txt"][n], projected["img"][n]], 1) for n in range(3)), HEAD)
    attended = {"txt": joint[:, :WORDS], "img": joint[:, WORDS:]}
    for name, x in streams.items():
        _, _, gate, shift, scale, gate_mlp = parts[name]
        x = x + gate * call(f"double_blocks.0.{name}_attn.proj", attended[name])
        inner = act(call(f"double_blocks.0.{name}_mlp.0", modulated(x, shift, scale)))
        streams[name] = x + gate_mlp * call(f"double_blocks.0.{name}_mlp.2", inner)
    x = torch.cat([streams["txt"], streams["img"]], 1)
    shift, scale, gate = mods["single"].chunk(3, -1)
    q, k, v, mlp = call("single_blocks.0.linear1", modulated(x, shift, scale)).split(
        [WIDTH] * 3 + [4 * WIDTH if act is gelu else 6 * WIDTH], -1
    )
    q, k = (call(f"single_blocks.0.norm.{kind}_norm", y.unflatten(-1, (-1, HEAD))).flatten(-2) for kind, y in (("query", q), ("key", k)))
    x = x + gate * call("single_blocks.0.linear2", torch.cat([attend(q, k, v, HEAD), act(mlp)], -1))
    return x[:, WORDS:]


def two_layers(call: Call, name: str, x: Tensor) -> Tensor:
    return call(f"{name}.out_layer", F.silu(call(f"{name}.in_layer", x)))


def adaptive(call: Call, x: Tensor, vector: Tensor) -> Tensor:
    """Flux' last modulation: (shift, scale)."""
    return modulated(x, *call("final_layer.adaLN_modulation.1", F.silu(vector)).unsqueeze(1).chunk(2, -1))


def flux_run(call: Call, image: Tensor, time: Tensor, text: Tensor) -> Tensor:
    vector = two_layers(call, "time_in", time)
    mods = {name: call(f"double_blocks.0.{name}_mod.lin", F.silu(vector)).unsqueeze(1) for name in ("img", "txt")}
    mods["single"] = call("single_blocks.0.modulation.lin", F.silu(vector)).unsqueeze(1)
    return call("final_layer.linear", adaptive(call, flux_blocks(call, image, text, mods, gelu), vector))


def chroma_run(call: Call, image: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """One row per modulation: 3 of the single block, 6 of each stream of the double block, 2 of the last layer."""
    numbers = torch.arange(17, dtype=image.dtype)[None, :, None]
    rows = call("distilled_guidance_layer.in_proj", torch.cat([time[:, None].expand(-1, 17, -1), torch.sin(numbers + time[:, None])], -1))
    rows = rows + two_layers(call, "distilled_guidance_layer.layers.0", call("distilled_guidance_layer.norms.0", rows))
    rows = call("distilled_guidance_layer.out_proj", rows)
    single, img, txt, last = (part.flatten(1).unsqueeze(1) for part in rows.split([3, 6, 6, 2], 1))
    x = flux_blocks(call, image, text, {"single": single, "img": img, "txt": txt}, gelu)
    return call("final_layer.linear", modulated(x, *last.chunk(2, -1)))


def flux2_run(call: Call, image: Tensor, time: Tensor, text: Tensor) -> Tensor:
    vector = two_layers(call, "time_in", time)
    names = {"img": "double_stream_modulation_img", "txt": "double_stream_modulation_txt", "single": "single_stream_modulation"}
    mods = {name: call(f"{layer}.lin", F.silu(vector)).unsqueeze(1) for name, layer in names.items()}
    return call("final_layer.linear", adaptive(call, flux_blocks(call, image, text, mods, gated), vector))


_ENDS = {"final_layer.adaLN_modulation.1": linear(2 * WIDTH, WIDTH, "norm_out.linear", swapped=True)}
_SPLIT1 = {"attn.to_q": WIDTH, "attn.to_k": WIDTH, "attn.to_v": WIDTH, "proj_mlp": 4 * WIDTH}
FLUX = Small(
    flux_table(True, 4, 4, ("net.0.proj", "net.2"), (_SPLIT1, "proj_out"))
    | {
        "time_in.in_layer": linear(WIDTH, EMBEDDING, "time_text_embed.timestep_embedder.linear_1"),
        "time_in.out_layer": linear(WIDTH, WIDTH, "time_text_embed.timestep_embedder.linear_2"),
    }
    | _ENDS,
    flux_run,
)
CHROMA = Small(
    flux_table(False, 4, 4, ("net.0.proj", "net.2"), (_SPLIT1, "proj_out"))
    | {
        "distilled_guidance_layer.in_proj": linear(20, 2 * EMBEDDING, "distilled_guidance_layer.in_proj"),
        "distilled_guidance_layer.layers.0.in_layer": linear(20, 20, "distilled_guidance_layer.layers.0.linear_1"),
        "distilled_guidance_layer.layers.0.out_layer": linear(20, 20, "distilled_guidance_layer.layers.0.linear_2"),
        "distilled_guidance_layer.norms.0": norm(20, "distilled_guidance_layer.norms.0"),
        "distilled_guidance_layer.out_proj": linear(WIDTH, 20, "distilled_guidance_layer.out_proj"),
    },
    chroma_run,
)
FLUX2 = Small(
    flux_table(False, 6, 3, ("linear_in", "linear_out"), ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "attn.to_out"))
    | {
        "time_in.in_layer": linear(WIDTH, EMBEDDING, "time_guidance_embed.timestep_embedder.linear_1"),
        "time_in.out_layer": linear(WIDTH, WIDTH, "time_guidance_embed.timestep_embedder.linear_2"),
        "double_stream_modulation_img.lin": linear(6 * WIDTH, WIDTH, "double_stream_modulation_img.linear"),
        "double_stream_modulation_txt.lin": linear(6 * WIDTH, WIDTH, "double_stream_modulation_txt.linear"),
        "single_stream_modulation.lin": linear(3 * WIDTH, WIDTH, "single_stream_modulation.linear"),
    }
    | _ENDS,
    flux2_run,
)


def qwen_table() -> Table:
    block = "transformer_blocks.0"
    shapes: dict[str, tuple[int, ...]] = {
        "img_in": (WIDTH, CHANNELS),
        "txt_norm": (TEXT,),
        "txt_in": (WIDTH, TEXT),
        "time_text_embed.timestep_embedder.linear_1": (WIDTH, EMBEDDING),
        "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
        **{f"{block}.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
        **{f"{block}.attn.add_{x}_proj": (WIDTH, WIDTH) for x in "qkv"},
        **{f"{block}.attn.norm_{name}": (HEAD,) for name in ("q", "k", "added_q", "added_k")},
        **{f"{block}.{stream}_mod.1": (6 * WIDTH, WIDTH) for stream in ("img", "txt")},
        **{f"{block}.{stream}_mlp.net.0.proj": (4 * WIDTH, WIDTH) for stream in ("img", "txt")},
        **{f"{block}.{stream}_mlp.net.2": (WIDTH, 4 * WIDTH) for stream in ("img", "txt")},
        "norm_out.linear": (2 * WIDTH, WIDTH),
        "proj_out": (CHANNELS, WIDTH),
    }
    return {name: Layer(shape, {name: shape[0]}) for name, shape in shapes.items()}


def qwen_run(call: Call, image: Tensor, time: Tensor, text: Tensor) -> Tensor:
    embedder, block = "time_text_embed.timestep_embedder", "transformer_blocks.0"
    vector = F.silu(call(f"{embedder}.linear_2", F.silu(call(f"{embedder}.linear_1", time))))
    streams = {"img": call("img_in", image), "txt": call("txt_in", call("txt_norm", text))}
    parts = {name: call(f"{block}.{name}_mod.1", vector).unsqueeze(1).chunk(6, -1) for name in streams}
    names = {
        "img": ("to_q", "to_k", "to_v", "norm_q", "norm_k"),
        "txt": ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"),
    }
    projected = {}
    for name, x in streams.items():
        y = modulated(x, *parts[name][:2])
        q, k, v = (call(f"{block}.attn.{layer}", y) for layer in names[name][:3])
        q, k = (call(f"{block}.attn.{layer}", z.unflatten(-1, (-1, HEAD))).flatten(-2) for layer, z in zip(names[name][3:], (q, k)))
        projected[name] = q, k, v
    joint = attend(*(torch.cat([projected["txt"][n], projected["img"][n]], 1) for n in range(3)), HEAD)
    attended = {"txt": call(f"{block}.attn.to_add_out", joint[:, :WORDS]), "img": call(f"{block}.attn.to_out.0", joint[:, WORDS:])}
    for name, x in streams.items():
        _, _, gate, shift, scale, gate_mlp = parts[name]
        x = x + gate * attended[name]
        inner = gelu(call(f"{block}.{name}_mlp.net.0.proj", modulated(x, shift, scale)))
        streams[name] = x + gate_mlp * call(f"{block}.{name}_mlp.net.2", inner)
    scale, shift = call("norm_out.linear", vector).unsqueeze(1).chunk(2, -1)
    # The text of the last block reaches no output in the real model either; here it is added, so that each of its layers counts.
    return call("proj_out", modulated(streams["img"], shift, scale) + streams["txt"].mean(1, keepdim=True))


QWEN_IMAGE = Small(qwen_table(), qwen_run)

LUMINA_WIDTH, LUMINA_HEAD = 24, 8


def lumina_table(keys: int, feed_forward: int, modulation: str, other: Callable[[str, bool], str], attention: str) -> Table:
    """A layer and a refining block of each kind. keys: rows of the keys. other: diffusers' name of a layer inside a block."""
    width, table = LUMINA_WIDTH, {}
    for stack in ("context_refiner", "noise_refiner", "layers"):
        block, modulated_block = f"{stack}.0", stack != "context_refiner"
        rows = {f"{block}.{attention}.to_q": width, f"{block}.{attention}.to_k": keys, f"{block}.{attention}.to_v": keys}
        shapes: dict[str, tuple[int, ...]] = {
            "attention.out": (width, width),
            "attention.q_norm": (LUMINA_HEAD,),
            "attention.k_norm": (LUMINA_HEAD,),
            "feed_forward.w1": (feed_forward, width),
            "feed_forward.w2": (width, feed_forward),
            "feed_forward.w3": (feed_forward, width),
            **{name: (width,) for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
            **({modulation: (4 * width, EMBEDDING)} if modulated_block else {}),
        }
        table[f"{block}.attention.qkv"] = linear(width + 2 * keys, width, rows)
        for name, shape in shapes.items():
            table[f"{block}.{name}"] = Layer(shape, {f"{block}.{other(name, modulated_block)}": shape[0]})
    return table


def lumina_run(modulation: str) -> Callable[[Call, Tensor, Tensor, Tensor], Tensor]:
    def block(call: Call, name: str, x: Tensor, vector: Tensor | None) -> Tensor:
        parts = (0.0, 1.0, 0.0, 1.0) if vector is None else call(f"{name}.{modulation}", vector).unsqueeze(1).chunk(4, -1)
        scale, gate, scale_mlp, gate_mlp = parts
        fused = call(f"{name}.attention.qkv", call(f"{name}.attention_norm1", x) * (1 + scale))
        keys = (fused.shape[-1] - LUMINA_WIDTH) // 2
        q, k, v = fused.split([LUMINA_WIDTH, keys, keys], -1)
        q, k = (call(f"{name}.attention.{n}_norm", y.unflatten(-1, (-1, LUMINA_HEAD))).flatten(-2) for n, y in (("q", q), ("k", k)))
        x = x + gate * call(f"{name}.attention_norm2", call(f"{name}.attention.out", attend(q, k, v, LUMINA_HEAD)))
        y = call(f"{name}.ffn_norm1", x) * (1 + scale_mlp)
        y = call(f"{name}.feed_forward.w2", F.silu(call(f"{name}.feed_forward.w1", y)) * call(f"{name}.feed_forward.w3", y))
        return x + gate_mlp * call(f"{name}.ffn_norm2", y)

    def run(call: Call, image: Tensor, time: Tensor, text: Tensor) -> Tensor:
        vector = call("t_embedder.mlp.2", F.silu(call("t_embedder.mlp.0", time)))
        caption = block(call, "context_refiner.0", call("cap_embedder.1", call("cap_embedder.0", text)), None)
        noise = block(call, "noise_refiner.0", call("x_embedder", image), vector)
        x = block(call, "layers.0", torch.cat([caption, noise], 1), vector)[:, WORDS:]
        scale = call("final_layer.adaLN_modulation.1", F.silu(vector)).unsqueeze(1)
        return call("final_layer.linear", plain(x) * (1 + scale))

    return run


def lumina_ends(names: dict[str, str]) -> Table:
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder": (LUMINA_WIDTH, CHANNELS),
        "t_embedder.mlp.0": (EMBEDDING, EMBEDDING),
        "t_embedder.mlp.2": (EMBEDDING, EMBEDDING),
        "cap_embedder.0": (TEXT,),
        "cap_embedder.1": (LUMINA_WIDTH, TEXT),
        "final_layer.linear": (CHANNELS, LUMINA_WIDTH),
        "final_layer.adaLN_modulation.1": (LUMINA_WIDTH, EMBEDDING),
    }
    return {name: Layer(shape, {names.get(name, name): shape[0]}) for name, shape in shapes.items()}


def z_name(name: str, modulated_block: bool) -> str:
    return name.replace("q_norm", "norm_q").replace("k_norm", "norm_k").replace("attention.out", "attention.to_out.0")


def lumina_name(name: str, modulated_block: bool) -> str:
    known = {
        "attention.out": "attn.to_out.0",
        "attention.q_norm": "attn.norm_q",
        "attention.k_norm": "attn.norm_k",
        "attention_norm1": "norm1.norm" if modulated_block else "norm1",
        "attention_norm2": "norm2",
        "adaLN_modulation.1": "norm1.linear",
    }
    return known.get(name, name.replace(".w", ".linear_"))


_Z_ENDS = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
_LUMINA_ENDS = {
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.linear": "norm_out.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
}


def _lumina(keys: int) -> Small:
    table = lumina_table(keys, 4 * LUMINA_WIDTH, "adaLN_modulation.1", lumina_name, "attn")
    return Small(table | lumina_ends(_LUMINA_ENDS), lumina_run("adaLN_modulation.1"))


Z_IMAGE = Small(
    lumina_table(LUMINA_WIDTH, LUMINA_WIDTH * 8 // 3, "adaLN_modulation.0", z_name, "attention") | lumina_ends(_Z_ENDS),
    lumina_run("adaLN_modulation.0"),
)
LUMINA2 = _lumina(LUMINA_HEAD)
"""Three heads of queries to one of keys and one of values, as in the published model."""
LUMINA_OF_EQUAL_HEADS = _lumina(LUMINA_WIDTH)
"""As many heads of keys as of queries, which no published model has."""

KREA_WIDTH, KREA_HEAD, KREA_TEXT, KREA_TEXT_LAYERS, KREA_TEXT_HEAD = 24, 6, 6, 2, 3
_KREA_INSIDE = {
    **{f"attn.w{letter}": f"attn.to_{letter}" for letter in "qkv"},
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    **{f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")},
}


def krea_block(name: str, other: str, width: int, keys: int, middle: int) -> Table:
    """keys: rows of the keys. middle: width of the gated MLP's."""
    shapes = dict.fromkeys(_KREA_INSIDE, (width, width)) | dict.fromkeys(("attn.wk", "attn.wv"), (keys, width))
    shapes |= {"mlp.gate": (middle, width), "mlp.up": (middle, width), "mlp.down": (width, middle)}
    return {f"{name}.{layer}": linear(*shape, f"{other}.{_KREA_INSIDE[layer]}") for layer, shape in shapes.items()}


def krea_run(call: Call, image: Tensor, time: Tensor, text: Tensor) -> Tensor:
    def attention(name: str, x: Tensor, head: int) -> Tensor:
        q, k, v, gate = (call(f"{name}.attn.{layer}", x) for layer in ("wq", "wk", "wv", "gate"))
        return call(f"{name}.attn.wo", attend(q, k, v, head) * torch.sigmoid(gate))

    def mlp(name: str, x: Tensor) -> Tensor:
        return call(f"{name}.mlp.down", F.silu(call(f"{name}.mlp.gate", x)) * call(f"{name}.mlp.up", x))

    def text_block(name: str, x: Tensor) -> Tensor:
        x = x + attention(name, plain(x), KREA_TEXT_HEAD)
        return x + mlp(name, plain(x))

    # Each word's text layers are mixed among themselves, before the words see each other.
    words = text.unflatten(-1, (KREA_TEXT_LAYERS, KREA_TEXT)).flatten(0, 1)
    words = text_block("txtfusion.layerwise_blocks.0", words).unflatten(0, (-1, WORDS)).transpose(-1, -2)
    words = text_block("txtfusion.refiner_blocks.0", call("txtfusion.projector", words).squeeze(-1))
    words = call("txtmlp.3", gelu(call("txtmlp.1", plain(words))))
    vector = call("tmlp.2", gelu(call("tmlp.0", time)))
    scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = call("tproj.1", gelu(vector)).unsqueeze(1).chunk(6, -1)
    x = torch.cat([words, call("first", image)], 1)
    x = x + gate * attention("blocks.0", modulated(x, shift, scale), KREA_HEAD)
    x = x + gate_mlp * mlp("blocks.0", modulated(x, shift_mlp, scale_mlp))
    return call("last.linear", plain(x)[:, WORDS:])


KREA2 = Small(
    krea_block("txtfusion.layerwise_blocks.0", "text_fusion.layerwise_blocks.0", KREA_TEXT, KREA_TEXT, 16)
    | krea_block("txtfusion.refiner_blocks.0", "text_fusion.refiner_blocks.0", KREA_TEXT, KREA_TEXT, 16)
    | krea_block("blocks.0", "transformer_blocks.0", KREA_WIDTH, KREA_HEAD, KREA_WIDTH * 8 // 3)
    | {
        "first": linear(KREA_WIDTH, CHANNELS, "img_in"),
        "tmlp.0": linear(KREA_WIDTH, EMBEDDING, "time_embed.linear_1"),
        "tmlp.2": linear(KREA_WIDTH, KREA_WIDTH, "time_embed.linear_2"),
        "tproj.1": linear(6 * KREA_WIDTH, KREA_WIDTH, "time_mod_proj"),
        "txtfusion.projector": linear(1, KREA_TEXT_LAYERS, "text_fusion.projector"),
        "txtmlp.1": linear(KREA_WIDTH, KREA_TEXT, "txt_in.linear_1"),
        "txtmlp.3": linear(KREA_WIDTH, KREA_WIDTH, "txt_in.linear_2"),
        "last.linear": linear(CHANNELS, KREA_WIDTH, "final_layer.linear"),
    },
    krea_run,
)
"""Four heads of queries to one of keys and one of values, as in the published model."""

SMALL = {
    "Flux": FLUX,
    "Chroma": CHROMA,
    "Flux.2": FLUX2,
    "Qwen-Image": QWEN_IMAGE,
    "Z-Image": Z_IMAGE,
    "Lumina 2": LUMINA2,
    "Lumina of equal heads": LUMINA_OF_EQUAL_HEADS,
    "Krea 2": KREA2,
}
