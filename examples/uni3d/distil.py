"""Distils a small point transformer into the space of a CLIP, from Uni3D's files, and names held-out shapes with it.

    python -m examples.uni3d.distil FOLDER [--steps 200]

The form of Uni3D (arXiv 2310.06773) at toy size: groups of neighbours around farthest points, a mini-PointNet, a
transformer with a class token, a linear layer to the teacher's width; contrastive losses of a cloud with the embeddings
of its caption and of one of its ten views. A batch holds every name once at most. Writes FOLDER/result.json.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

CENTRES, NEIGHBOURS, WIDTH, DEPTH = 32, 16, 96, 3
BATCH, RATE, SEED = 64, 1e-3, 0


class PointTransformer(nn.Module):
    """Groups [B, CENTRES, NEIGHBOURS, 6] around centres [B, CENTRES, 3] -> embeddings [B, D], not normalised."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.near = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 128))
        self.of_group = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, WIDTH))
        self.place = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, groups: Tensor, centres: Tensor) -> Tensor:
        """Embeddings [B, D]."""
        points = self.near(groups)
        whole = points.amax(dim=2, keepdim=True).expand_as(points)
        tokens = self.of_group(torch.cat([whole, points], dim=-1)).amax(dim=2) + self.place(centres)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.out(self.norm(self.blocks(tokens)[:, 0]))


@dataclass
class Clouds:
    """Grouped clouds with what they are called."""

    groups: Tensor
    """float32 [N, CENTRES, NEIGHBOURS, 6]: places from the centre, colours."""
    centres: Tensor
    """float32 [N, CENTRES, 3]."""
    names: list[str]
    texts: Tensor
    """float32 [N, D]."""
    views: Tensor | None = None
    """float32 [N, 10, D]; None where no view belongs to them."""


def read_clouds(root: Path, paths: list[str], images: list[list[str]] | None) -> Clouds:
    """From the files of examples/uni3d/layout.py, which this recipe wrote itself, as Uni3D reads them.

    root: the folder of Ensembled_embedding.yaml; paths, images: below the roots that it names, images without .npy.
    """
    roots = yaml.safe_load((root / "Ensembled_embedding.yaml").read_text(encoding="utf-8"))
    base = root.parent
    contents = [np.load(base / roots["PC_PATH_ROOT"] / path, allow_pickle=True).item() for path in paths]
    xyz = torch.from_numpy(np.stack([content["xyz"] for content in contents]))
    xyz = xyz - xyz.mean(dim=1, keepdim=True)
    xyz = xyz / xyz.norm(dim=2).amax(dim=1)[:, None, None]
    groups, centres = grouped(xyz, torch.from_numpy(np.stack([content["rgb"] for content in contents])))
    folder, views = base / roots["IMAGE_PATH_ROOT"], None
    if images is not None:
        views = torch.from_numpy(np.stack([[np.load(folder / f"{view}.npy") for view in own] for own in images]))
    texts = torch.from_numpy(np.stack([content["text"][0] for content in contents]))
    return Clouds(groups, centres, [content["blip_caption"] for content in contents], texts, views)


def grouped(xyz: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours around points that are chosen farthest first. xyz, rgb: [N, points, 3]."""
    rows = torch.arange(len(xyz))
    chosen = torch.zeros(len(xyz), CENTRES, dtype=torch.int64)
    distance = torch.full(xyz.shape[:2], torch.inf)
    for at in range(1, CENTRES):
        last = xyz[rows, chosen[:, at - 1]]
        distance = torch.minimum(distance, (xyz - last[:, None]).square().sum(dim=2))
        chosen[:, at] = distance.argmax(dim=1)
    centres = xyz[rows[:, None], chosen]
    near = torch.cdist(centres, xyz).topk(NEIGHBOURS, dim=2, largest=False).indices
    take = rows[:, None, None]
    return torch.cat([xyz[take, near] - centres[:, :, None], rgb[take, near]], dim=-1), centres


def turned(clouds: Clouds, rows: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Groups and centres of `rows`, each cloud turned around its axis and scaled a little."""
    angle = 2 * math.pi * torch.rand(len(rows), generator=draw)
    scale = 0.9 + 0.2 * torch.rand(len(rows), generator=draw)
    turn = torch.zeros(len(rows), 3, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 0, 1], turn[:, 1, 0], turn[:, 2, 2] = angle.sin(), -angle.sin(), 1.0
    turn = turn * scale[:, None, None]
    places = torch.einsum("bgnd,bde->bgne", clouds.groups[rows][..., :3], turn)
    return torch.cat([places, clouds.groups[rows][..., 3:]], dim=-1), clouds.centres[rows] @ turn


def train(clouds: Clouds, steps: int) -> PointTransformer:
    """The point transformer after `steps` steps."""
    torch.manual_seed(SEED)
    draw = torch.Generator().manual_seed(SEED)
    assert clouds.views is not None
    model = PointTransformer(clouds.texts.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    of_name: dict[str, list[int]] = {}
    for row, name in enumerate(clouds.names):
        of_name.setdefault(name, []).append(row)
    for step in range(steps):
        order = torch.randperm(len(of_name), generator=draw)[:BATCH].tolist()
        members = [list(of_name.values())[at] for at in order]
        rows = torch.tensor([own[int(torch.randint(len(own), (1,), generator=draw))] for own in members])
        found = F.normalize(model(*turned(clouds, rows, draw)), dim=1)
        view = torch.randint(clouds.views.shape[1], (len(rows),), generator=draw)
        loss = torch.zeros(())
        for teacher in (clouds.texts[rows], clouds.views[rows, view]):
            logits = model.log_scale.clamp(0, math.log(100)).exp() * found @ F.normalize(teacher, dim=1).T
            own = torch.arange(len(rows))
            loss = loss + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def top1(model: PointTransformer, clouds: Clouds, names: list[str], texts: Tensor) -> float:
    """Share of clouds whose name's embedding is the nearest of all names'."""
    found = F.normalize(model(clouds.groups, clouds.centres), dim=1) @ F.normalize(texts, dim=1).T
    return sum(names[best] == own for best, own in zip(found.argmax(dim=1).tolist(), clouds.names, strict=True)) / len(
        clouds.names
    )


def main() -> None:
    """Train, name, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    root = arguments.folder / "uni3d" / "data"
    listed, images = (json.loads((root / name).read_text(encoding="utf-8")) for name in ("train.json", "images.json"))
    known = read_clouds(root, list(listed.values()), [images[key] for key in listed])
    held_out = sorted(f"heldout/{path.name}" for path in (root / "clouds" / "heldout").glob("*.npy"))
    new = read_clouds(root, held_out, None)
    with np.load(root / "names.npz", allow_pickle=False) as candidates:
        names, texts = candidates["names"].tolist(), torch.from_numpy(candidates["embeddings"])
    model = train(known, arguments.steps)
    share, chance = top1(model, new, names, texts), 1 / len(names)
    result = {
        "held_out_top1": share, "chance": chance, "times_chance": share / chance, "held_out_shapes": len(new.names),
        "trained_top1": top1(model, known, names, texts), "names": len(names), "steps": arguments.steps,
    }  # fmt: skip
    (arguments.folder / "result.json").write_text(json.dumps(result, indent=1))
    print(
        f"{100 * share:.1f} % of {len(new.names)} held-out shapes get their name among {len(names)} "
        f"(chance {100 * chance:.1f} %), {100 * result['trained_top1']:.1f} % of those it learnt from"
    )


if __name__ == "__main__":
    main()
