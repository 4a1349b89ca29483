"""The weights that training begins with, and the changes that make ComfyUI's Flux trainable."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import types
from typing import Any

import torch
from torch import Tensor, nn

from .prompt import ANCHOR_PAIRS, ANCHOR_X_AT, AXIS_DIM


def init_weights(flux: Any, seed: int) -> None:
    """Fill an uninitialised Flux: Xavier, modulations at zero (adaLN-zero), a head start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in flux.named_parameters():
        zeroed = ".lin." in f".{name}" or name.startswith("final_layer.")
        with torch.no_grad():
            if "_norm." in name:
                parameter.fill_(1.0)
            elif zeroed or name.endswith(".bias"):
                parameter.zero_()
            else:
                limit = math.sqrt(6.0 / sum(parameter.shape))
                parameter.uniform_(-limit, limit, generator=generator)
    _init_pass_through(flux)
    _init_anchor_heads(flux)


@torch.no_grad()
def _init_pass_through(flux: Any) -> None:
    """Start with the output equal to the input: most of a velocity is the noise itself.

    Input and output share one orthonormal basis. The input's bias, orthogonal to it and large,
    keeps the final layer norm from dividing each token by its own length.
    """
    generator = torch.Generator().manual_seed(2)
    width = flux.img_in.weight.shape[1]
    basis = torch.empty(flux.hidden_size, width + 2)
    nn.init.orthogonal_(basis, generator=generator)
    # A layer norm takes the mean away, so nothing may lie along the constant vector.
    basis[:, 0] = 1.0
    basis = torch.linalg.qr(basis)[0]
    steady, image = basis[:, 1], basis[:, 2:]
    flux.img_in.weight.copy_(image)
    flux.img_in.bias.copy_(steady * math.sqrt(flux.hidden_size))
    typical = math.sqrt((flux.hidden_size + width) / flux.hidden_size)
    flux.final_layer.linear.weight.copy_(image.T * typical)


@torch.no_grad()
def _init_anchor_heads(flux: Any) -> None:
    """Start head 0 of every double block as a finder of places (see ``prompt``).

    An image token's query begins nearly constant in the anchors' rotary pairs and a text token's
    key copies its anchor there, so that after rotary embedding their product is the cosine of
    their distance, summed over the anchor's frequencies. It is a starting point only: training
    may change all of it.
    """
    width = 2 * len(ANCHOR_PAIRS)
    # Semi-orthogonal, so that a part of a token can be read off its projection.
    nn.init.orthogonal_(flux.txt_in.weight, gain=2.0, generator=torch.Generator().manual_seed(1))
    for channel in range(2 * width):
        flux.txt_in.weight[channel] = 0.0
        flux.txt_in.weight[channel, ANCHOR_X_AT + channel] = 1.5
    head_dim = flux.hidden_size // flux.num_heads
    time_dims = flux.params.axes_dim[0]
    head = slice(0, head_dim)
    keys = slice(flux.hidden_size, flux.hidden_size + head_dim)
    for block in flux.double_blocks:
        image, text = block.img_attn.qkv, block.txt_attn.qkv
        image.weight[head] *= 0.3
        text.weight[keys] *= 0.3
        for axis, channel in ((1, 0), (0, width)):
            for index, pair in enumerate(ANCHOR_PAIRS):
                at = time_dims + axis * AXIS_DIM + 2 * pair
                image.bias[at] = 3.0
                for part in (0, 1):
                    text.weight[keys][at + part] = 0.0
                    text.weight[keys][at + part, channel + 2 * index + part] = 3.0
        # Rotary position never turns the first dimensions: a constant there keeps image keys out.
        image.weight[keys] = 0.0
        image.bias[0], image.bias[keys][0] = 1.5, -1.0
        for mod in (block.img_mod, block.txt_mod):
            mod.lin.bias.view(6, -1)[[2, 5]] = 0.5
    for block in flux.single_blocks:
        block.modulation.lin.bias.view(3, -1)[2] = 0.5


def plain_attention(
    func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
) -> Tensor:
    """Exact attention in two matrix products: q, k, v [B, H, N, D] → [B, N, H·D].

    Forwards and backwards on a CPU it takes half the time of torch's fused attention.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out = scores.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def attention_options(device: torch.device) -> dict[str, Any]:
    """``transformer_options`` that make a training step fastest on this device."""
    return {"optimized_attention_override": plain_attention} if device.type == "cpu" else {}


class _OutOfPlace(ast.NodeTransformer):
    """Turns ``name += value`` into ``name = name + value``."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.target, ast.Name):
            return node
        read = ast.Name(node.target.id, ast.Load())
        value = ast.BinOp(read, node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)


def add_out_of_place(flux: Any) -> None:
    """Make the blocks' residual additions differentiable, on these instances alone.

    ComfyUI's blocks add in place to tensors that a backward pass still needs. Torch's own remedy
    (``allow_mutation_on_saved_tensors``) copies them and slows every operation down.
    """
    forwards: dict[type, Any] = {}
    for block in (*flux.double_blocks, *flux.single_blocks):
        kind = type(block)
        if kind not in forwards:
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
            tree = ast.fix_missing_locations(_OutOfPlace().visit(tree))
            scope: dict[str, Any] = {}
            exec(compile(tree, inspect.getfile(kind), "exec"), kind.forward.__globals__, scope)
            forwards[kind] = scope["forward"]
        block.forward = types.MethodType(forwards[kind], block)
