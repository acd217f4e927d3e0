"""Coloured shapes as point clouds, pictures of them from ten sides, and their names.

    python -m examples.uni3d.shapes FOLDER [--instances 4]

Writes FOLDER/shards/train/*.tar (a picture a view, `ID_VIEW.png` with the name as `.txt`), FOLDER/shards/names.tar (the
96 names alone) and FOLDER/clouds/{train,heldout}/ID.npz (`xyz` and `rgb` float32 [POINTS, 3], `name`). Of every shape
two colours are held out: no picture, caption or cloud of those 24 combinations is trained on.
"""

import argparse
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards.write import write_shard

POINTS, DENSE, SIDE, VIEWS = 512, 6000, 48, 10
COLOURS = {
    "red": (0.85, 0.1, 0.1), "green": (0.1, 0.7, 0.15), "blue": (0.1, 0.2, 0.9), "yellow": (0.95, 0.85, 0.1),
    "purple": (0.6, 0.1, 0.75), "orange": (0.95, 0.5, 0.05), "white": (0.95, 0.95, 0.95), "black": (0.12, 0.12, 0.12),
}  # fmt: skip
Surface = tuple[np.ndarray, np.ndarray]
"""Points and normals of a surface, float64 [n, 3] each."""


def _sphere(draw: np.random.Generator, n: int) -> Surface:
    points = draw.standard_normal((n, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points * 0.8, points


def _box(draw: np.random.Generator, n: int, half: tuple[float, float, float] = (0.65, 0.65, 0.65)) -> Surface:
    size = np.array(half)
    area = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
    axis = draw.choice(3, n, p=area / area.sum())
    points = draw.uniform(-1, 1, (n, 3)) * size
    sign = draw.choice([-1.0, 1.0], n)
    normals = np.zeros((n, 3))
    normals[np.arange(n), axis] = sign
    points[np.arange(n), axis] = sign * size[axis]
    return points, normals


def _cylinder(draw: np.random.Generator, n: int) -> Surface:
    return _turned(draw, n, [(0.0, -0.8), (0.5, -0.8), (0.5, 0.8), (0.0, 0.8)])


def _cone(draw: np.random.Generator, n: int) -> Surface:
    return _turned(draw, n, [(0.0, -0.7), (0.7, -0.7), (0.0, 0.9)])


def _disc(draw: np.random.Generator, n: int) -> Surface:
    return _turned(draw, n, [(0.0, -0.06), (0.9, -0.06), (0.9, 0.06), (0.0, 0.06)])


def _hourglass(draw: np.random.Generator, n: int) -> Surface:
    return _turned(draw, n, [(0.0, -0.8), (0.65, -0.8), (0.08, 0.0), (0.65, 0.8), (0.0, 0.8)])


def _capsule(draw: np.random.Generator, n: int) -> Surface:
    points, normals = _sphere(draw, n)
    points = points * 0.5
    points[:, 2] += np.where(points[:, 2] > 0, 0.45, -0.45)
    side = draw.random(n) < 0.5
    angle, height = draw.uniform(0, 2 * math.pi, n), draw.uniform(-0.45, 0.45, n)
    around = np.stack([np.cos(angle), np.sin(angle), np.zeros(n)], axis=1)
    wall = around * 0.4
    wall[:, 2] = height
    return np.where(side[:, None], wall, points), np.where(side[:, None], around, normals)


def _turned(draw: np.random.Generator, n: int, profile: list[tuple[float, float]]) -> Surface:
    """A surface of revolution around z; profile: (radius, height) of its corners."""
    corners = np.array(profile)
    edges = np.diff(corners, axis=0)
    length = np.linalg.norm(edges, axis=1)
    area = length * (corners[:-1, 0] + corners[1:, 0])
    edge = draw.choice(len(edges), n, p=area / area.sum())
    along = draw.random(n)
    keep_round = draw.random(n)  # more area farther from the axis
    first, last = corners[edge, 0], corners[edge + 1, 0]
    along = np.where(first > last, np.minimum(along, keep_round), along)
    along = np.where(first < last, np.maximum(along, keep_round), along)
    radius, height = (corners[edge] + along[:, None] * edges[edge]).T
    angle = draw.uniform(0, 2 * math.pi, n)
    across = np.stack([edges[edge, 1], -edges[edge, 0]], axis=1) / length[edge, None]
    around = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = np.concatenate([around * radius[:, None], height[:, None]], axis=1)
    return points, np.concatenate([around * across[:, :1], across[:, 1:]], axis=1)


def _tube(centre: np.ndarray, tangent: np.ndarray, radius: float, draw: np.random.Generator) -> Surface:
    """Points around a curve. centre, tangent: float64 [n, 3]."""
    tangent = tangent / np.linalg.norm(tangent, axis=1, keepdims=True)
    aside = np.cross(tangent, np.array([0.0, 0.0, 1.0]) + 1e-3 * draw.standard_normal(3))
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    angle = draw.uniform(0, 2 * math.pi, (len(centre), 1))
    normals = np.cos(angle) * aside + np.sin(angle) * np.cross(tangent, aside)
    return centre + radius * normals, normals


def _torus(draw: np.random.Generator, n: int, turn: float = 2 * math.pi) -> Surface:
    angle = draw.uniform(0, turn, n)
    centre = 0.65 * np.stack([np.cos(angle), np.sin(angle), np.zeros(n)], axis=1)
    return _tube(centre, np.stack([-np.sin(angle), np.cos(angle), np.zeros(n)], axis=1), 0.22, draw)


def _arch(draw: np.random.Generator, n: int) -> Surface:
    points, normals = _torus(draw, n, math.pi)
    stand = lambda v: np.stack([v[:, 0], v[:, 2], v[:, 1]], axis=1)  # noqa: E731
    return stand(points) - np.array([0, 0, 0.3]), stand(normals)


def _spring(draw: np.random.Generator, n: int) -> Surface:
    angle = draw.uniform(0, 6 * math.pi, n)
    rise = 1.6 / (6 * math.pi)
    centre = np.stack([0.55 * np.cos(angle), 0.55 * np.sin(angle), rise * angle - 0.8], axis=1)
    tangent = np.stack([-0.55 * np.sin(angle), 0.55 * np.cos(angle), np.full(n, rise)], axis=1)
    return _tube(centre, tangent, 0.13, draw)


def _cross(draw: np.random.Generator, n: int) -> Surface:
    arm = draw.integers(0, 3, n)
    points, normals = _box(draw, n, (0.85, 0.2, 0.2))
    order = np.array([[0, 1, 2], [2, 0, 1], [1, 2, 0]])[arm]
    return np.take_along_axis(points, order, axis=1), np.take_along_axis(normals, order, axis=1)


def _pyramid(draw: np.random.Generator, n: int) -> Surface:
    base = [(-0.7, -0.7, -0.6), (0.7, -0.7, -0.6), (0.7, 0.7, -0.6), (-0.7, 0.7, -0.6)]
    top = (0.0, 0.0, 0.9)
    sides = [(base[i], base[(i + 1) % 4], top) for i in range(4)]
    faces = np.array([*sides, (base[0], base[2], base[1]), (base[0], base[3], base[2])])
    across = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])
    area = np.linalg.norm(across, axis=1)
    face = draw.choice(len(faces), n, p=area / area.sum())
    u, v = np.sort(draw.random((2, n)), axis=0)
    weights = np.stack([u, v - u, 1 - v], axis=1)
    return np.einsum("nk,nkd->nd", weights, faces[face]), across[face] / area[face, None]


SHAPES: dict[str, Callable[[np.random.Generator, int], Surface]] = {
    "cube": _box, "sphere": _sphere, "cylinder": _cylinder, "cone": _cone, "torus": _torus, "pyramid": _pyramid,
    "capsule": _capsule, "disc": _disc, "cross": _cross, "spring": _spring, "arch": _arch, "hourglass": _hourglass,
}  # fmt: skip
NAMES = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS]


def is_held_out(shape: str, colour: str) -> bool:
    """Two colours of every shape, every colour with three shapes."""
    return (list(COLOURS).index(colour) - 2 * list(SHAPES).index(shape)) % len(COLOURS) < 2


def instance(shape: str, colour: str, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points, normals, colours) float32 [DENSE, 3] of one shape: its own proportions, turn and shade."""
    points, normals = SHAPES[shape](draw, DENSE)
    points = points * draw.uniform(0.85, 1.15, 3)
    turn = _turn_z(draw.uniform(0, 2 * math.pi))
    rgb = np.clip(np.array(COLOURS[colour]) * draw.uniform(0.85, 1.1) + draw.normal(0, 0.02, (DENSE, 3)), 0, 1)
    return (points @ turn).astype(np.float32), (normals @ turn).astype(np.float32), rgb.astype(np.float32)


def render(points: np.ndarray, normals: np.ndarray, rgb: np.ndarray, view: int) -> Image.Image:
    """A picture SIDE x SIDE from azimuth 36 degrees x view and 25 degrees above, on grey, lit from the left."""
    up = math.radians(25)
    tilt = np.array([[1, 0, 0], [0, math.sin(up), math.cos(up)], [0, -math.cos(up), math.sin(up)]])
    turn = _turn_z(2 * math.pi * view / VIEWS) @ tilt.T
    seen, facing = points @ turn, normals @ turn
    light = np.clip(facing @ np.array([-0.4, 0.5, 0.77]), 0, 1)
    shaded = np.clip(rgb * (0.45 + 0.6 * light[:, None]), 0, 1)
    places = ((seen[:, :2] * [1, -1] / 1.3 + 1) * SIDE / 2).astype(int)
    nearest_last = np.argsort(seen[:, 2])
    image = np.full((SIDE + 1, SIDE + 1, 3), 0.5)
    x, y = np.clip(places[nearest_last], 0, SIDE - 1).T
    for right, down in ((0, 0), (0, 1), (1, 0), (1, 1)):  # a point covers 2 x 2 pixels; of equal places the last stays
        image[y + down, x + right] = shaded[nearest_last]
    return Image.fromarray((255 * image[:SIDE, :SIDE]).astype(np.uint8))


def _turn_z(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]])


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instances", type=int, default=4, help="of every combination of shape and colour")
    arguments = parser.parse_args()
    root: Path = arguments.folder
    for place in ("shards/train", "clouds/train", "clouds/heldout"):
        (root / place).mkdir(parents=True, exist_ok=True)
    write_shard(str(root / "shards" / "names.tar"), [(f"n{n:02d}", {"txt": t.encode()}) for n, t in enumerate(NAMES)])
    samples = []
    for number, (shape, colour) in enumerate((s, c) for s in SHAPES for c in COLOURS):
        name, held_out = NAMES[number], is_held_out(shape, colour)
        for copy in range(arguments.instances):
            draw = np.random.default_rng([number, copy])
            points, normals, rgb = instance(shape, colour, draw)
            identity = f"{colour}-{shape}-{copy:02d}"
            folder = root / "clouds" / ("heldout" if held_out else "train")
            np.savez(folder / f"{identity}.npz", xyz=points[:POINTS], rgb=rgb[:POINTS], name=np.array(name))
            for view in () if held_out else range(VIEWS):
                stream = io.BytesIO()
                render(points, normals, rgb, view).save(stream, "PNG")
                samples.append((f"{identity}_{view}", {"png": stream.getvalue(), "txt": name.encode()}))
    write_shard(str(root / "shards" / "train" / "00000.tar"), samples)
    print(f"{len(samples):,} pictures, {len(NAMES)} names in {root}")


if __name__ == "__main__":
    main()
