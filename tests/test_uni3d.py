"""Uni3D's files as its public code reads them (docs/uni3d.md), and the recipe that distils a point transformer."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from examples.uni3d import shapes
from examples.uni3d.distil import CENTRES, NEIGHBOURS, PointTransformer, grouped, read_clouds, top1
from examples.uni3d.layout import VIEWS, write_cloud, write_tables, write_views

ROOT = Path(__file__).parents[1]
WIDTH, IDS = 24, ("a", "b_2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two clouds of 40 points and their views, under data/ as Uni3D's working directory has it."""
    root, draw = tmp_path / "data", np.random.default_rng(0)
    root.mkdir()
    keys = [f"{identity}_{view}" for identity in IDS for view in reversed(range(VIEWS))]
    views = write_views(root, keys, np.arange(len(keys) * WIDTH, dtype=np.float64).reshape(-1, WIDTH))
    for identity in IDS:
        xyz, rgb = draw.random((2, 40, 3))
        write_cloud(root / "clouds" / f"{identity}.npy", xyz, rgb, f"the {identity}", draw.random(WIDTH))
    write_tables(root, {identity: f"{identity}.npy" for identity in IDS}, views)
    return root


def test_names_and_shapes_are_those_of_the_public_code(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    config = yaml.safe_load(Path("data/Ensembled_embedding.yaml").read_text())
    assert config["NAME"] == "Ensembled_embedding" and config["PC_PATH_LIVS"] == config["PC_PATH"]
    clouds, images, kept = (
        json.loads(Path(config[key]).read_text()) for key in ("PC_PATH", "IMAGE_PATH", "GPT_FILTER")
    )
    assert list(clouds) == list(images) == list(kept) == list(IDS)
    for number, (identity, path) in enumerate(clouds.items()):
        cloud = np.load(config["PC_PATH_ROOT"] + path, allow_pickle=True).item()
        for name in ("xyz", "rgb"):
            assert (cloud[name].shape, cloud[name].dtype) == ((40, 3), np.float32)
        for vector in (cloud["text"][0], cloud["retrieval_text"][0], cloud["blip_caption;"], cloud["msft_caption;"]):
            assert (vector.shape, vector.dtype) == ((WIDTH,), np.float32)
        assert len(cloud["blip_caption"]) > 0 and len(cloud["msft_caption"]) > 0
        assert kept[identity]["flag"] != "N"
        for view in range(10):
            vector = np.load(config["IMAGE_PATH_ROOT"] + images[identity][view] + ".npy")
            assert (vector.shape, vector.dtype) == ((WIDTH,), np.float32)
            assert vector[0] == WIDTH * (10 * number + 9 - view)  # keys came in another order


def test_a_view_too_few_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x has views \[0, 2\]: Uni3D draws from 0 to 9"):
        write_views(tmp_path, ["x_0", "x_2"], np.zeros((2, 4)))


def test_the_recipe_reads_them_back(data: Path) -> None:
    images = json.loads((data / "images.json").read_text())
    clouds = read_clouds(data, [f"{identity}.npy" for identity in IDS], [images[identity] for identity in IDS])
    assert clouds.groups.shape == (2, CENTRES, NEIGHBOURS, 6) and clouds.names == ["the a", "the b_2"]
    assert clouds.views is not None and clouds.views.shape == (2, 10, WIDTH)
    model = PointTransformer(WIDTH).eval()
    assert model(clouds.groups, clouds.centres).shape == (2, WIDTH)
    with torch.no_grad():
        right = model(clouds.groups, clouds.centres)
    assert top1(model, clouds, clouds.names, right) == 1.0
    assert top1(model, clouds, clouds.names[::-1], right) == 0.0


def test_neighbours_are_the_nearest_and_centres_far_apart() -> None:
    xyz = torch.rand(3, 60, 3, generator=torch.Generator().manual_seed(0))
    groups, centres = grouped(xyz, xyz)
    assert all(len({tuple(row) for row in own.tolist()}) == CENTRES for own in centres)
    near = (groups[1, 4, :, :3] + centres[1, 4]).tolist()
    wanted = xyz[1][(xyz[1] - centres[1, 4]).norm(dim=1).argsort()[:NEIGHBOURS]]
    assert np.allclose(sorted(near), sorted(wanted.tolist()), atol=1e-6)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_have_unit_normals_and_are_seen(shape: str) -> None:
    points, normals, rgb = shapes.instance(shape, "red", np.random.default_rng(1))
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5) and np.abs(points).max() < 1.4
    seen = np.asarray(shapes.render(points, normals, rgb, 3)).astype(int)
    assert 0.03 < (seen[..., 0] - seen[..., 1] > 30).mean() < 0.6


@pytest.mark.slow
def test_held_out_shapes_get_their_names() -> None:
    run = subprocess.run(["bash", "examples/uni3d/run.sh"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((ROOT / "runs" / "uni3d" / "result.json").read_text())["times_chance"] > 10
