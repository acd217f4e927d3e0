"""Kept outputs of products on one process: the same gradients to the bit, the formula's bytes, no product twice."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.phases import first_phase
from engine.config.read import Config, ConfigError, ParallelConfig, check_layout, resolve
from engine.objectives.mim.step import MimStep
from engine.parallel.launch import job
from engine.pipeline.clock import Phases
from engine.pipeline.outputs import KeptOutputs
from engine.trainer import Trainer
from models.tensors.kept import LEVELS, choose_levels
from tests.engine.mim_jobs import Layout, mim_config, pictures_of_step
from tests.engine.test_waits import clips_or_pictures
from tests.gather import backward_only, contrastive_step, whole_gradients
from tests.golden import local_batch

MODELS = {
    "18b-fp32": ("model.preset=tiny-18b", "train.precision=fp32"),
    "18b-bf16": ("model.preset=tiny-18b", "train.precision=bf16"),
    "e14-fp32": ("model.preset=tiny-e14", "train.precision=fp32"),
    "siglip-fp32": (
        "model.preset=tiny-e14",
        "model.vision.pool=attention",
        "model.vision.class_token=false",
        "model.vision.mlp=gelu_tanh",
        "model.text.mlp_hidden=40",
        "model.text.causal=false",
        "model.text.pool=last",
    ),
    "b16-bf16": ("model.preset=tiny-b16", "train.precision=bf16", "model.vision.width=64"),
    "clips-fp32": ("model.preset=tiny-18b", "data.frames=2", "train.patch_dropout=0.5"),
}


def contrastive(model: str, *options: str) -> Config:
    """Eight pairs in four micro-batches."""
    sizes = ("train.global_batch_size=8", "train.micro_batch_size=2", "model.text.depth=2", "train.logit_scale=20")
    return resolve({"data": {"shards": ["-"]}}, [*MODELS[model], *sizes, *options])


def gradients(config: Config) -> tuple[dict[str, torch.Tensor], int]:
    """Whole gradients of a batch, and the bytes that were kept at the loss."""
    with job(ParallelConfig()) as (mesh, device):
        trainer = Trainer(first_phase(config), mesh, device)
        step = contrastive_step(trainer)
        kept = []

        def loss(*rows: torch.Tensor) -> Any:
            kept.append(sum(outputs.kept_bytes for outputs in (*step.work.outputs, step.captions.outputs)))
            return step.loss(*rows)

        batch = local_batch(*clips_or_pictures(config, 0), mesh)
        end = config.model.text.vocab_size - 1
        batch.tokens.clamp_(max=end - 1)[:, -1] = end  # captions that fill the context: the formula counts whole ones
        backward_only(step, batch, loss)
        assert not any(outputs.kept_bytes for outputs in (*step.work.outputs, step.captions.outputs))
        return whole_gradients(trainer), kept[0]


ALL_LEVELS = list(LEVELS)[1:]
FAST_LEVELS = dict.fromkeys(MODELS, ALL_LEVELS[-1:]) | {"18b-fp32": ALL_LEVELS, "b16-bf16": ALL_LEVELS}


@pytest.mark.parametrize(
    ("model", "levels"),
    [
        *FAST_LEVELS.items(),
        *(
            pytest.param(model, ALL_LEVELS[:-1], marks=pytest.mark.slow)
            for model in ("18b-bf16", "e14-fp32", "siglip-fp32")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_every_level_gives_the_gradients_of_a_repeated_product(model: str, levels: list[str]) -> None:
    expected, nothing = gradients(contrastive(model))
    assert nothing == 0
    for level in levels:
        found, kept = gradients(contrastive(model, f"train.keep_outputs={level}"))
        different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
        assert not different, f"{level}: {different}"
        assert kept == formula(contrastive(model), level), level


def formula(config: Config, level: str) -> int:
    """Bytes at the loss by the documented sum: widths in elements a row, last blocks by what their heads read."""
    vision, text, train = config.model.vision, config.model.text, config.train
    item = 4 if train.precision == "fp32" else 2
    gates = 2 if vision.mlp == "swiglu" else 1
    total = 0
    images = 8 * config.data.frames
    tokens_of_images = images * vision.kept_tokens(train.patch_dropout)
    for width, hidden, blocks, tokens, pooled in (
        (
            vision.width,
            gates * vision.mlp_hidden,
            vision.depth,
            tokens_of_images,
            images if vision.pool == "class" else tokens_of_images,
        ),
        (text.width, text.hidden, text.depth, 8 * text.context_length, 8),
    ):
        widths = {"fc2": width, "proj": width, "qkv": 3 * width, "fc1": hidden}
        for kind in LEVELS[level]:
            total += widths[kind] * ((blocks - 1) * tokens + (tokens if kind == "qkv" else pooled)) * item
    return total


class _Products(TorchDispatchMode):
    """Counts matrix products by the phase of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.counts[self.phase] += 1
        return func(*args, **(kwargs or {}))

    def phases(self) -> Phases:
        """A clock that says which phase it is."""
        counter = self

        class Telling(Phases):
            @contextmanager
            def time(self, name: str, unit: Any = None) -> Iterator[None]:
                before, counter.phase = counter.phase, name
                try:
                    yield
                finally:
                    counter.phase = before

        return Telling()


@pytest.mark.parametrize("level", ["none", "fc2", "all"])
def test_a_students_recomputation_takes_them_too(level: str) -> None:
    layout = Layout(micro_batch=2, batch=4, options=("train.recompute=full", f"train.keep_outputs={level}"))
    config = mim_config(layout)
    with job(ParallelConfig()) as (mesh, device):
        trainer = Trainer(first_phase(config), mesh, device)
        step = trainer.training_step
        assert isinstance(step, MimStep)
        with _Products() as products:
            step.gradients(pictures_of_step(config, mesh, 0), products.phases())
        step.update.reduce()
        found = whole_gradients(trainer)
    plain = mim_config(Layout(micro_batch=2, batch=4))
    with job(ParallelConfig()) as (mesh, device):
        trainer = Trainer(first_phase(plain), mesh, device)
        assert isinstance(trainer.training_step, MimStep)
        trainer.training_step.gradients(pictures_of_step(plain, mesh, 0), Phases())
        trainer.training_step.update.reduce()
        expected = whole_gradients(trainer)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    blocks, micro_batches = config.model.vision.depth, 2
    # Two products for each in a backward, the patch embedding's input and nothing else without a gradient.
    backward = micro_batches * (2 * (4 * blocks + 1) + 1)
    again = {"none": 4, "fc2": 3, "all": 0}[level]
    assert products.counts["backward"] == backward + micro_batches * blocks * again


def test_a_budget_takes_what_spares_most_first() -> None:
    sizes = [dict(zip(LEVELS, (0, 2, 4, 10, 20), strict=True)), dict(zip(LEVELS, (0, 1, 2, 5, 10), strict=True))]
    assert choose_levels(0, sizes) == ["none", "none"]
    assert choose_levels(2, sizes) == ["fc2", "none"]
    assert choose_levels(3, sizes) == ["fc2", "fc2"]
    assert choose_levels(5, sizes) == ["fc2+proj", "fc2"]
    assert choose_levels(9, sizes) == ["fc2+proj", "fc2+proj+qkv"]
    assert choose_levels(30, sizes) == ["all", "all"]


def test_a_budget_is_not_exceeded() -> None:
    most = formula(contrastive("18b-fp32"), "all")
    for share in (0.0, 0.3, 0.7, 1.0):
        _, kept = gradients(contrastive("18b-fp32", f"train.outputs_budget_gb={share * most / 1e9}"))
        assert kept <= share * most
        assert kept > 0.5 * share * most or share == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("train.keep_outputs=fc1",), "train.keep_outputs is 'fc1': choose one of none, fc2"),
        (("train.keep_outputs=all", "train.outputs_budget_gb=1"), "give one of them"),
        (("train.outputs_budget_gb=-1",), "must be at least 0"),
        (("train.offload_outputs=true",), "nothing to move"),
        (("train.keep_outputs=all", "train.keep_activations=-1"), "repeated: set train.keep_activations=0, or"),
        (("train.keep_outputs=all", "train.keep_activations=4"), "all 4 micro-batches"),
        (("train.outputs_budget_gb=1", "train.keep_activations=4"), r"outputs_budget_gb=1\.0 .* all 4 micro-batches"),
        (("train.keep_outputs=all", "model.backend=transformer_engine", "train.precision=bf16"), "model.backend=local"),
    ],
)
def test_what_keeps_nothing_is_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(contrastive("18b-fp32", *options), 1)


@pytest.mark.parametrize(
    "options", [("train.keep_outputs=all",), ("train.recompute=full", "train.outputs_budget_gb=1")]
)
def test_a_student_repeats_nothing_else(options: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="1F1B"):
        mim_config(Layout(options=options))


def test_linears_that_cannot_answer_are_refused() -> None:
    with job(ParallelConfig()) as (mesh, device):
        layers = Trainer(first_phase(contrastive("18b-fp32")), mesh, device).towers.vision[0].block.layers
    layers[0].mlp.linear_fc2 = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"model\.backend=local"):
        KeptOutputs(layers, "fc2")
