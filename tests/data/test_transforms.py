"""Windows are stateless and lawful; evaluation crops and normalisation are exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.pixels.decode import PillowDecoder
from data.pixels.transforms import PIXEL_NORMS, RandomResizedCrop, Window, eval_transform, normalise
from models.config import ModelConfig, ModelConfigError, VisionConfig
from tests.data.shard_factory import encode, picture


def _crop(seed: int = 0, low: float = 0.2, *, flip: bool = False) -> RandomResizedCrop:
    return RandomResizedCrop(seed=seed, size=32, scale=(low, 1.0), flip=flip)


def _windows(transform: RandomResizedCrop, width: int = 500, height: int = 375) -> list[Window]:
    return [transform.window(position, width, height) for position in range(400)]


def test_windows_depend_on_seed_and_position_alone() -> None:
    windows = _windows(_crop())
    assert [_crop().window(position, 500, 375) for position in reversed(range(400))] == windows[::-1]
    assert len({window.box for window in windows}) == 400
    assert _windows(_crop(seed=1)) != windows


_SIZES = {position: (40 + 7 * position % 500, 30 + 11 * position % 400) for position in range(98, 302)}
# As they were drawn one by one, before they were drawn together: a resumed run sees the same windows.
_KNOWN = [
    ((7, 10, 222, 264), True),
    ((71, 2, 177, 92), True),
    ((7, 98, 146, 262), True),
    ((3, 65, 241, 290), True),
]


def test_windows_drawn_together_are_those_drawn_alone() -> None:
    together, alone = (_crop(low=0.05, flip=True) for _ in range(2))
    together.expect(np.arange(100, 300))
    windows = [together.window(position, *size) for position, size in _SIZES.items()]
    assert windows == [alone.window(position, *size) for position, size in _SIZES.items()]
    assert [(window.box, window.flip) for window in windows[:4]] == _KNOWN


def test_windows_obey_scale_ratio_and_image() -> None:
    boxes = np.array([window.box for window in _windows(_crop())])
    assert (boxes >= 0).all() and (boxes[:, 2] <= 500).all() and (boxes[:, 3] <= 375).all()
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = widths * heights / (500 * 375), widths / heights
    assert share.min() > 0.19 and share.max() <= 1 and share.max() - share.min() > 0.6
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    assert boxes[:, 0].min() == 0 and boxes[:, 1].min() == 0  # the corner can be reached


@pytest.mark.parametrize(("width", "height", "box"), [(1000, 9, (494, 0, 506, 9)), (9, 1000, (0, 494, 9, 506))])
def test_extreme_aspects_fall_back_to_the_centre(width: int, height: int, box: tuple[int, ...]) -> None:
    assert _crop(low=0.9).window(0, width, height).box == box


def test_flip_is_half_and_independent_of_the_crop() -> None:
    flipped = _windows(_crop(flip=True))
    assert 150 < sum(window.flip for window in flipped) < 250
    assert [window.box for window in flipped] == [window.box for window in _windows(_crop())]
    widths = np.array([window.box[2] - window.box[0] for window in flipped])
    assert abs(np.corrcoef(widths, [window.flip for window in flipped])[0, 1]) < 0.15


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.5), (0.5, 1.5)])
def test_a_wrong_scale_is_an_error(scale: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="crop_scale is"):
        RandomResizedCrop(seed=0, size=32, scale=scale, flip=False)


def _evaluated(name: str, image: Image.Image, size: int) -> np.ndarray:
    window = eval_transform(name, size=size).window(0, *image.size)
    return PillowDecoder(max_pixels=10**6).decode(encode(image), window).transpose(1, 2, 0)


@pytest.mark.parametrize(("width", "height"), [(100, 75), (75, 100), (61, 37), (48, 48), (20, 31), (300, 48)])
def test_centre_crop_is_resize_then_cut(width: int, height: int) -> None:
    image, size = picture(1, width, height), 48
    shortest = min(width, height)
    resized = image.resize((size * width // shortest, size * height // shortest), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    expected = np.asarray(resized.crop((left, top, left + size, top + size)))
    assert np.array_equal(_evaluated("crop", image, size), expected)


def test_squash_is_a_plain_resize() -> None:
    image = picture(2, 100, 60)
    expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(_evaluated("squash", image, 48), expected)


def test_an_unknown_evaluation_transform_is_an_error() -> None:
    with pytest.raises(DataError, match="'middle' is unknown: choose one of"):
        eval_transform("middle", size=8)


def test_normalise_is_the_definition_of_the_fixtures() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 8, 8), dtype=np.uint8)
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    images = torch.from_numpy(pixels)
    result = normalise(images, torch.float32)
    assert np.abs(result.numpy() - (pixels / 255 - mean) / std).max() < 1e-6
    assert normalise(images, torch.bfloat16).equal(result.bfloat16())
    assert np.array_equal(images.numpy(), pixels)


@pytest.mark.parametrize("name", PIXEL_NORMS)
def test_every_family_sees_pictures_by_its_own_mean_and_deviation(name: str) -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in PIXEL_NORMS[name])
    assert torch.allclose(normalise(images, torch.float32, name), (images / 255 - mean) / std, atol=1e-6)
    ModelConfig(vision=replace(VisionConfig(), pixel_norm=name)).check()


def test_pictures_by_no_known_mean_are_refused() -> None:
    with pytest.raises(ModelConfigError, match=r"model\.vision\.pixel_norm"):
        ModelConfig(vision=replace(VisionConfig(), pixel_norm="mine")).check()
