"""The single-pass methods of the study against their formulas, written out for one study."""

from __future__ import annotations

import reference
import torch
from families import family
from single_pass import image_maps
from test_matex import pairs
from torch import Tensor

from matex_pl.attribution import Matex


def layers_of_one(name: str = "square") -> tuple[list[reference.Layer], Tensor, Tensor, Tensor]:
    """Layers, score, image and direction of the first pair, in float64, by the slow towers."""
    clip = family(name, torch.float64)
    images, tokens, _ = pairs(clip)
    direction = clip.encode_text(tokens[:1]).detach()
    image = images[0].requires_grad_()
    embedding, layers, _ = reference.encode_image(clip, image)
    return layers, (embedding * direction[0]).sum(), image, direction


def test_chefer_rollout_saliency_and_attention() -> None:
    clip = family("square", torch.float64)
    layers, score, image, direction = layers_of_one()
    maps = image_maps(clip, image.detach()[None], direction)
    tokens = len(layers[0].attention[0])
    mixed, product = torch.eye(tokens, dtype=torch.float64), torch.eye(tokens, dtype=torch.float64)
    for layer in layers:
        gradients = torch.autograd.grad(score, layer.attention, retain_graph=True)
        pairs_of_heads = zip(layer.attention, gradients, strict=True)
        last = sum((a * g).relu() for a, g in pairs_of_heads) / len(layer.attention)
        mixed = mixed + last @ mixed
        mean = sum(layer.attention) / len(layer.attention) + torch.eye(tokens, dtype=torch.float64)
        product = mean / mean.sum(1, keepdim=True) @ product
    expected = {
        "Chefer, all blocks": mixed[0, 1:],
        "Chefer, last block": last[0, 1:],
        "rollout (Abnar and Zuidema)": product[0, 1:],
        "attention of the last block": (sum(layers[-1].attention) / len(layers[-1].attention))[0, 1:],
    }
    for name, wanted in expected.items():
        torch.testing.assert_close(maps[name][0].flatten(), wanted.detach())
    pixels = torch.autograd.grad(score, image)[0].abs().amax(0)
    torch.testing.assert_close(maps["saliency"][0], pixels)


def test_grad_eclip_is_matex_with_one_loosened_block() -> None:
    clip = family("square", torch.float64)
    images, tokens, phrases = pairs(clip)
    parts = Matex(grad_layers=1, spatial_weight="loosened").attribute(clip, images, tokens, phrases).parts
    maps = image_maps(clip, images, clip.encode_text(tokens).detach())
    torch.testing.assert_close(maps["Grad-ECLIP"], parts["grad"])


def test_every_method_gives_a_raster_per_image() -> None:
    clip = family("native")
    images, tokens, _ = pairs(clip)
    for name, found in image_maps(clip, images, clip.encode_text(tokens).detach()).items():
        assert found.shape == (len(images), *(clip.image_size if name == "saliency" else clip.grid))
        assert not found.requires_grad
        assert (found.flatten(1).std(1) > 0).all()
