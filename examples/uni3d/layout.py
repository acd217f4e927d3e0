"""Features of a CLIP teacher in the files, names and shapes that Uni3D's public code reads (docs/uni3d.md).

    python -m examples.uni3d.layout FOLDER --views VIEWS.npz --texts TEXTS.npz

VIEWS and TEXTS come from tools.embed: rows `ID_VIEW` of pictures, and rows of names. FOLDER/clouds/*/ID.npz are the
clouds (`xyz`, `rgb`, `name`). Writes FOLDER/uni3d/data: Ensembled_embedding.yaml, the three JSON files that it names, a
vector `images/ID/VIEW.npy` a view, and a pickled mapping `clouds/PART/ID.npy` a cloud.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

VIEWS = 10
"""Uni3D draws one of views 0 to 9 (`picked_rotation_degrees`)."""
FILES = {
    "PC_PATH": "train.json", "PC_PATH_LIVS": "train.json", "IMAGE_PATH": "images.json", "GPT_FILTER": "filter.json",
}  # fmt: skip
"""Keys of Ensembled_embedding.yaml (the spelling of the third is Uni3D's) and the files that we name there."""


def write_cloud(path: Path, xyz: np.ndarray, rgb: np.ndarray, caption: str, embedding: np.ndarray) -> None:
    """One cloud with what its captions are embedded as.

    xyz, rgb: float32 [points, 3], rgb in 0..1, equally many points in every cloud; embedding: float32 [D], of length 1.
    The code reads `text` and `retrieval_text` as lists of vectors. Of `blip_caption` and `msft_caption` it looks only
    whether they are empty, and takes the vector from a key that ends in a semicolon; where that is missing, it takes a
    random vector of 1,024 numbers instead.
    """
    vector = embedding.astype(np.float32)
    content = {
        "xyz": xyz.astype(np.float32),
        "rgb": rgb.astype(np.float32),
        "text": [vector],
        "retrieval_text": [vector],
        "blip_caption": caption,
        "msft_caption": caption,
        "blip_caption;": vector,
        "msft_caption;": vector,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array(content, dtype=object), allow_pickle=True)


def write_tables(root: Path, clouds: Mapping[str, str], views: Mapping[str, list[str]]) -> None:
    """Ensembled_embedding.yaml and the JSON files.

    clouds: ID -> path below clouds/; views: ID -> paths below images/, without .npy.
    """
    tables = {"train.json": clouds, "images.json": views, "filter.json": {key: {"flag": "Y"} for key in clouds}}
    for name, table in tables.items():
        (root / name).write_text(json.dumps(dict(table), indent=1), encoding="utf-8")
    paths = {key: f"./{root.name}/{name}" for key, name in FILES.items()}
    roots = {"PC_PATH_ROOT": f"./{root.name}/clouds/", "IMAGE_PATH_ROOT": f"./{root.name}/images/"}
    tree = {"NAME": "Ensembled_embedding", **paths, **roots}
    (root / "Ensembled_embedding.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def write_views(root: Path, keys: list[str], embeddings: np.ndarray) -> dict[str, list[str]]:
    """images/ID/VIEW.npy, float32 [D] each, from rows `ID_VIEW`; ID -> its ten paths. Raises ValueError for a gap."""
    found: dict[str, dict[int, str]] = {}
    for key, vector in zip(keys, embeddings, strict=True):
        identity, _, view = key.rpartition("_")
        path = root / "images" / identity / f"{view}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vector.astype(np.float32), allow_pickle=False)
        found.setdefault(identity, {})[int(view)] = f"{identity}/{view}"
    for identity, views in found.items():
        if sorted(views) != list(range(VIEWS)):
            raise ValueError(f"{identity} has views {sorted(views)}: Uni3D draws from 0 to {VIEWS - 1}")
    return {identity: [views[number] for number in range(VIEWS)] for identity, views in found.items()}


def main() -> None:
    """Write FOLDER/uni3d/data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--views", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    arguments = parser.parse_args()
    root = arguments.folder / "uni3d" / "data"
    root.mkdir(parents=True, exist_ok=True)
    from examples.uni3d.shapes import NAMES

    with np.load(arguments.texts, allow_pickle=False) as texts:
        of_name = {NAMES[int(key[1:])]: row for key, row in zip(texts["keys"], texts["text_embeddings"], strict=True)}
    with np.load(arguments.views, allow_pickle=False) as embedded:
        views = write_views(root, embedded["keys"].tolist(), embedded["image_embeddings"])
    clouds = {}
    for part in ("train", "heldout"):
        for path in sorted((arguments.folder / "clouds" / part).glob("*.npz")):
            with np.load(path, allow_pickle=False) as cloud:
                name = str(cloud["name"])
                target = root / "clouds" / part / f"{path.stem}.npy"
                write_cloud(target, cloud["xyz"], cloud["rgb"], name, of_name[name])
            if part == "train":
                clouds[path.stem] = f"{part}/{path.stem}.npy"
    write_tables(root, clouds, views)
    np.savez(root / "names.npz", names=np.array(NAMES), embeddings=np.stack([of_name[name] for name in NAMES]))
    print(f"{len(clouds)} clouds with {VIEWS} views each in {root}")


if __name__ == "__main__":
    main()
