"""Writes tests/golden/public-*: toy towers of open_clip, timm and transformers with features, loss and gradients.

Run once with open-clip-torch 3.3.0, timm 1.0.31, transformers 5.24.0 and torch 2.13.0 installed, on a CPU in float32;
nothing of this project is imported. Every parameter is overwritten with seeded noise after construction.
"""

import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from open_clip.transformer import TextTransformer
from safetensors.torch import load_file, save_file
from timm.models.eva import _convert_pe
from torch import Tensor, nn

FOLDER = Path(__file__).parent
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WIDTH, HEADS, DEPTH, IMAGE, PATCH, DIM = 32, 4, 4, 28, 7, 24
TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
BATCH, END = 8, 63
FEW = 2
"""Blocks of the later toys, which are image towers with a caption tower of one block beside."""


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
    grads = {k: p.grad.contiguous() for k, p in model.named_parameters() if p.grad is not None}
    save_file(grads, folder / "grads.safetensors")
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


class WithText(nn.Module):
    """open_clip's CustomTextCLIP at toy size around an image tower, which is `visual.PREFIX`."""

    def __init__(self, tower: nn.Module, prefix: str) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.add_module(prefix, tower)
        self.text = TextTransformer(**(TEXT | {"layers": 1}), output_dim=DIM)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def timm_eva(name: str, **kwargs: Any) -> None:
    """EVA-01-CLIP g or Perception Encoder as open_clip has them."""
    sizes = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": FEW, "num_heads": HEADS}
    model = WithText(timm.models.eva.Eva(**sizes, num_classes=DIM, **kwargs), "trunk")
    noise(model)
    write(name, model, lambda pixels, ids: (model.visual.trunk(pixels), model.text(ids)), {})


def perception_encoder(name: str, *, class_token: bool) -> None:
    """L has a class token and a grid one line off, G neither; its MLP is wider than 4, its pool's is not."""
    timm_eva(
        name, global_pool="map", attn_type="rope", use_pre_transformer_norm=True, use_rot_pos_emb=True, mlp_ratio=3,
        ref_feat_shape=(5, 5), rope_grid_offset=float(class_token), rope_grid_indexing="xy", attn_pool_num_heads=2,
        attn_pool_mlp_ratio=2, class_token=class_token, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip


def own_names_of_perception_encoder() -> None:
    """The toy without class token under the names of Meta's code: what timm's conversion reads as that toy."""
    theirs = load_file(FOLDER / "public-timm-pe-g/weights.safetensors")
    trunk = {k.removeprefix("visual.trunk."): v for k, v in theirs.items() if k.startswith("visual.trunk.")}
    blocks = {
        "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "blocks.": "transformer.resblocks.", "norm_pre": "ln_pre",
        "norm.": "ln_post.", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
    }  # fmt: skip
    pool = {"latent": "probe", "proj": "attn.out_proj", "norm": "layernorm", "fc1": "c_fc", "fc2": "c_proj"}
    own = {key.removeprefix("text."): value for key, value in theirs.items() if not key.startswith("visual.")}
    for leaf in ("weight", "bias"):
        q, kv = trunk.pop(f"attn_pool.q.{leaf}"), trunk.pop(f"attn_pool.kv.{leaf}")
        own[f"visual.attn_pool.attn.in_proj_{leaf}"] = torch.cat([q, kv])
    own["visual.proj"] = trunk.pop("head.weight").T.contiguous()
    trunk.pop("head.bias")  # which Meta's code has not
    for key, value in trunk.items():
        for old, new in (pool if key.startswith("attn_pool.") else blocks).items():
            key = key.replace(old, new)
        own[f"visual.{key}"] = value[0] if key == "positional_embedding" else value
    read = _convert_pe(own, nn.Module())
    again = {f"visual.trunk.{key}": value for key, value in read.items()}
    assert again.keys() == {key for key in theirs if key.startswith("visual.trunk.")}
    assert all(again[key].equal(theirs[key]) for key in again if key != "visual.trunk.head.bias")
    folder = FOLDER / "public-own-pe"
    folder.mkdir(exist_ok=True)
    save_file(own, folder / "weights.safetensors")


def split(name: str, renamed: Callable[[str], str]) -> None:
    """Keep an image tower's tensors in `weights` and `grads`, as they are published, and the others in `rest_*`."""
    folder = FOLDER / f"public-{name}"
    for file in ("weights", "grads"):
        tensors = load_file(folder / f"{file}.safetensors")
        tower = {
            renamed(k.removeprefix("visual.tower.")): v for k, v in tensors.items() if k.startswith("visual.tower")
        }
        rest = {key: value for key, value in tensors.items() if not key.startswith("visual.tower.")}
        save_file(tower, folder / f"{file}.safetensors")
        save_file(rest, folder / f"rest_{file}.safetensors")


class Projected(WithText):
    """An image tower of transformers with a projection of its class token."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__(tower, "tower")
        self.visual.head = nn.Linear(WIDTH, DIM, bias=False)

    def encode(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both."""
        return self.visual.head(self.visual.tower(pixels).last_hidden_state[:, 0]), self.text(ids)


def dinov3() -> None:
    """transformers' DINOv3ViTModel with the 7B's parts; saved by itself, it drops `model.` from its blocks' names."""
    config = transformers.DINOv3ViTConfig(
        hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=FEW, num_attention_heads=HEADS, image_size=IMAGE,
        patch_size=PATCH, use_gated_mlp=True, hidden_act="silu", num_register_tokens=3, query_bias=False,
        value_bias=False, layerscale_value=0.5,
    )  # fmt: skip
    model = Projected(transformers.DINOv3ViTModel(config)).eval()
    noise(model)
    write("transformers-dinov3", model, model.encode, {"architectures": ["DINOv3ViTModel"]} | config.to_dict())
    split("transformers-dinov3", lambda key: key.removeprefix("model."))


def internvit() -> None:
    """transformers' InternVLVisionModel with the 6B's parts, under the names of InternViT's folders."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": FEW, "num_attention_heads": HEADS}
    sizes |= {"image_size": IMAGE, "patch_size": PATCH, "layer_norm_eps": 1e-6}
    config = transformers.InternVLVisionConfig(
        **sizes, use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=True, attn_implementation="eager"
    )
    model = Projected(transformers.models.internvl.InternVLVisionModel(config)).eval()
    noise(model)
    own = {"model_type": "intern_vit_6b", "initializer_factor": 0.1, "qkv_bias": False, "qk_normalization": True}
    write("transformers-internvit", model, model.encode, own | {"norm_type": "rms_norm"} | sizes)
    names = {
        "embeddings.cls_token": "embeddings.class_embedding", "patch_embeddings.projection": "patch_embedding",
        "position_embeddings": "position_embedding", "encoder.layer.": "encoder.layers.", "lambda_": "ls",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.projection_layer": "attn.proj",
        "attention.": "attn.",
    }  # fmt: skip

    def renamed(key: str) -> str:
        for old, new in names.items():
            key = key.replace(old, new)
        return key

    split("transformers-internvit", renamed)
    for file in ("weights", "grads"):
        path = FOLDER / f"public-transformers-internvit/{file}.safetensors"
        tensors = load_file(path)
        for i in range(FEW):
            parts = [tensors.pop(f"encoder.layers.{i}.attn.{kind}_proj.weight") for kind in "qkv"]
            tensors[f"encoder.layers.{i}.attn.qkv.weight"] = torch.cat(parts)
        save_file(tensors, path)


if __name__ == "__main__":
    open_clip_vit("open-clip-vit", quick_gelu=True)
    open_clip_vit("open-clip-mean", quick_gelu=False)
    of_transformers("clip")
    of_transformers("siglip")
    timm_siglip()
    timm_eva("timm-eva01", global_pool="token", mlp_ratio=3, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    perception_encoder("timm-pe-l", class_token=True)
    perception_encoder("timm-pe-g", class_token=False)
    own_names_of_perception_encoder()
    dinov3()
    internvit()
