"""Decoding with NVIDIA DALI: one pipeline, on the GPU (`mixed`) where there is one, else on the CPU.

DALI takes what it decodes as Pillow does: whole JPEGs in grey or RGB whose window is cut before the resize.
Everything else (PNG with transparency, CMYK, 16-bit, GIF, the centre crop of evaluation, a JPEG without its
end marker) goes to Pillow, so that the policy of data/pixels/decode/base.py holds for every sample. One image that
DALI cannot decode fails the whole run of a pipeline: that batch is decoded by Pillow again, image by image,
and counted.

nvidia-dali is the extra `dali` (built for CUDA 13; nvidia-dali-cuda120 serves CUDA 12); nothing else imports it.
"""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.errors import DataError, Rejected
from data.pixels.decode.base import Decoder, Job
from data.pixels.decode.pillow import PillowDecoder
from data.pixels.transforms import Window

_MOST_IMAGES = 64  # of one pipeline run: decoded images of a run are held at full size
_JPEG_END = b"\xff\xd9"
OLDEST, NEWEST = "2.3", "2.4"
"""Versions of DALI that this was written for, both included."""
CURE = "pip install 'nvidia-dali-cuda130>=2.3,<2.5'"

_log = logging.getLogger(__name__)


class DaliDecoder(Decoder):
    """See the module text. The pipeline is built at the first batch, in the process that decodes."""

    def __init__(self, *, max_pixels: int, device: torch.device, threads: int = 1) -> None:
        """device: "cpu", or the CUDA device of the training process. Raises DataError without DALI."""
        self.device = device
        self.fallbacks = 0
        """Pipeline runs that failed and were decoded by Pillow."""
        self._pillow = PillowDecoder(max_pixels=max_pixels)
        self._dali = _import_dali()
        self._threads = threads
        self._pipeline: Any = None
        self._side = 0

    def size(self, encoded: bytes) -> tuple[int, int]:
        return self._pillow.size(encoded)

    def decode(self, encoded: bytes, window: Window) -> np.ndarray:
        out = torch.empty(1, 3, window.size, window.size, dtype=torch.uint8, device=self.device)
        (rejected,) = self.decode_many([(encoded, window)], out)
        if rejected is not None:
            raise rejected
        return out[0].cpu().numpy()

    def decode_many(self, jobs: Sequence[Job], out: torch.Tensor) -> list[Rejected | None]:
        problems: list[Rejected | None] = [None] * len(jobs)
        suited = [number for number, job in enumerate(jobs) if self._suits(*job)]
        for start in range(0, len(suited), _MOST_IMAGES):
            numbers = suited[start : start + _MOST_IMAGES]
            if not self._run([jobs[number] for number in numbers], numbers, out):
                self.fallbacks += 1
                suited[start : start + _MOST_IMAGES] = [-1] * len(numbers)
        for number in set(range(len(jobs))) - set(suited):
            problems[number] = self._pillow.decode_into(jobs[number], out[number])
        return problems

    def _suits(self, encoded: bytes, window: Window) -> bool:
        if not window.crop_first or not encoded.endswith(_JPEG_END):
            return False
        try:
            image = self._pillow.open(encoded)
        except Rejected:
            return False
        return image.format == "JPEG" and image.mode in ("RGB", "L")

    def _run(self, jobs: Sequence[Job], numbers: list[int], out: torch.Tensor) -> bool:
        """Decode the jobs into out[numbers]; False if DALI refused one of them."""
        side = jobs[0][1].size
        if self._pipeline is None or self._side != side:
            self._pipeline, self._side = self._build(side), side
        boxes = [[int(edge) for edge in window.box] for _, window in jobs]
        feed = {
            "encoded": [np.frombuffer(encoded, dtype=np.uint8) for encoded, _ in jobs],
            "start": [np.array([top, left], dtype=np.int32) for left, top, _, _ in boxes],
            "shape": [np.array([bottom - top, right - left], dtype=np.int32) for left, top, right, bottom in boxes],
            "mirror": [np.array(window.flip, dtype=np.int32) for _, window in jobs],
        }
        for name, values in feed.items():
            self._pipeline.feed_input(name, values)
        try:
            (pixels,) = self._pipeline.run()
        except RuntimeError as error:
            _log.warning("DALI refused one of %d images, Pillow takes them (%s)", len(jobs), _one_line(error))
            self._pipeline = None  # a pipeline is not valid any more after an error
            return False
        out[numbers] = torch.from_dlpack(pixels.as_tensor())
        return True

    def _build(self, side: int) -> Any:
        on_gpu = self.device.type == "cuda"
        fn, types = self._dali.fn, self._dali.types
        pipeline = self._dali.Pipeline(
            batch_size=_MOST_IMAGES,
            num_threads=self._threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            crops = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axis_names="HW",
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            resized = fn.resize(crops, size=(side, side), interp_type=types.INTERP_CUBIC, antialias=True)
            pipeline.set_outputs(
                fn.crop_mirror_normalize(resized, mirror=mirror, dtype=types.UINT8, output_layout="CHW", std=[1.0])
            )
        pipeline.build()
        return pipeline


def _import_dali() -> Any:
    try:
        from nvidia import dali
    except ImportError as error:
        raise DataError(
            f"data.decoder=dali needs NVIDIA DALI ({error}): pip install 'eva-megatron[dali]', or set "
            "data.decoder=pillow"
        ) from error
    here = f"NVIDIA DALI {dali.__version__} is here, but data.decoder=dali is for {OLDEST} to {NEWEST}"
    if _numbers(dali.__version__) < _numbers(OLDEST):
        raise DataError(f"{here}: {CURE}, or set data.decoder=pillow")
    if _numbers(dali.__version__) > _numbers(NEWEST) and os.environ.get("RANK", "0") == "0":
        _log.warning("%s, newer than anything this was run with; should it fail: %s", here, CURE)
    return dali


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
