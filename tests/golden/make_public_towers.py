"""Writes tests/golden/public-*: toy towers of open_clip, timm and transformers with features, loss and gradients.

Run once with open-clip-torch 3.3.0, timm 1.0.31, transformers 5.24.0 and torch 2.13.0 installed, on a CPU in float32;
nothing of this project is imported. Every parameter is overwritten with seeded noise after construction.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WIDTH, HEADS, DEPTH, IMAGE, PATCH, DIM = 32, 4, 4, 28, 7, 24
TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
BATCH, END = 8, 63


def noise(module: nn.Module) -> None:
    """Seeded values everywhere: no norm weight is 1 and no bias 0; the temperature keeps its value."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=generator)
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        with torch.no_grad():
            parameter.copy_(1 + 0.2 * values if is_gain else 0.15 * values)
        if name.endswith("logit_scale"):
            parameter.data.fill_(2.0)
        if name.endswith("logit_bias"):
            parameter.data.fill_(-3.0)


def batch() -> tuple[Tensor, Tensor]:
    """uint8 pictures [B, 3, h, w]; ids [B, L] with the highest id at the end of each caption."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, IMAGE, IMAGE), generator=generator, dtype=torch.uint8)
    ids = torch.randint(1, END, (BATCH, TEXT["context_length"]), generator=generator)
    for row, length in enumerate(torch.randint(4, TEXT["context_length"], (BATCH,), generator=generator).tolist()):
        ids[row, length], ids[row, length + 1 :] = END, 0
    return images, ids


def softmax(logits: Tensor) -> Tensor:
    """CLIP's loss."""
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid(logits: Tensor) -> Tensor:
    """SigLIP's loss."""
    return -F.logsigmoid(logits * (2 * torch.eye(len(logits)) - 1)).sum() / len(logits)


def write(
    name: str, model: nn.Module, encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], config: dict[str, Any]
) -> None:
    """Write a folder; encode: normalised pixels and ids -> features before L2 normalisation."""
    images, ids = batch()
    pixels = (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    image, text = encode(pixels, ids)
    logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    bias = getattr(model, "logit_bias", None)
    loss = softmax(logits) if bias is None else sigmoid(logits + bias)
    loss.backward()
    folder = FOLDER / f"public-{name}"
    folder.mkdir(exist_ok=True)
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    save_file({k: p.grad.contiguous() for k, p in model.named_parameters()}, folder / "grads.safetensors")
    io = {"images_u8": images, "text": ids, "image_features": image, "text_features": text, "loss": loss}
    save_file({key: value.detach().contiguous() for key, value in io.items()}, folder / "io.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def open_clip_vit(name: str, quick_gelu: bool) -> None:
    """open_clip's own ViT."""
    vision = {"image_size": IMAGE, "layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
    config: dict[str, Any] = {"embed_dim": DIM, "vision_cfg": vision | {"mlp_ratio": 3.0}, "text_cfg": TEXT}
    if quick_gelu:
        config["quick_gelu"] = True
    else:
        config["vision_cfg"] |= {"pool_type": "avg", "act_kwargs": {"approximate": "tanh"}}
    model = open_clip.model.CLIP(**config)
    noise(model)
    write(name, model, lambda pixels, ids: (model.encode_image(pixels), model.encode_text(ids)), config)


def transformers_config(kind: str) -> dict[str, Any]:
    """config.json of a toy."""
    sizes = {"intermediate_size": 3 * WIDTH, "num_attention_heads": HEADS, "attn_implementation": "eager"}
    vision = sizes | {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "image_size": IMAGE, "patch_size": PATCH,
    }  # fmt: skip
    text = sizes | {
        "hidden_size": TEXT["width"], "num_hidden_layers": TEXT["layers"], "vocab_size": TEXT["vocab_size"],
        "max_position_embeddings": TEXT["context_length"], "eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0,
        "intermediate_size": 4 * TEXT["width"],
    }  # fmt: skip
    return {"vision_config": vision, "text_config": text} | ({"projection_dim": DIM} if kind == "clip" else {})


def of_transformers(kind: str) -> None:
    """CLIPModel or SiglipModel."""
    classes = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }
    config_class, model_class = classes[kind]
    config = config_class(**transformers_config(kind))
    model = model_class(config).eval()
    noise(model)

    def encode(pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = model(pixel_values=pixels, input_ids=ids)  # its embeddings are normalised
        return out.image_embeds, out.text_embeds

    write(f"transformers-{kind}", model, encode, {"architectures": [model_class.__name__]} | config.to_dict())


class TimmSiglip(nn.Module):
    """open_clip's CustomTextCLIP of SigLIP at toy size: its timm models are known by name, and no name is a toy."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.trunk = timm.models.vision_transformer.VisionTransformer(
            img_size=IMAGE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=3, num_classes=0,
            class_token=False, global_pool="map",
        )  # fmt: skip
        norm = lambda width: nn.LayerNorm(width, eps=1e-6)  # noqa: E731
        self.text = TextTransformer(
            **TEXT, output_dim=WIDTH, no_causal_mask=True, pool_type="last", proj_bias=True, norm_layer=norm
        )
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))


def timm_siglip() -> None:
    """SigLIP as open_clip has it."""
    model = TimmSiglip()
    noise(model)
    write("timm-siglip", model, lambda pixels, ids: (model.visual.trunk(pixels), model.text(ids)), {})


if __name__ == "__main__":
    open_clip_vit("open-clip-vit", quick_gelu=True)
    open_clip_vit("open-clip-mean", quick_gelu=False)
    of_transformers("clip")
    of_transformers("siglip")
    timm_siglip()
