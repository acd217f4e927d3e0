"""Entries of train.distill: frozen CLIPs that teach the one in training (docs/distillation.md)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config.errors import ConfigError, require, require_within
from models.config import ModelConfig, ModelConfigError
from models.kernel_checks import check_kernels
from models.sizes import Limits

if TYPE_CHECKING:
    from engine.config.schema import Config

LOSSES = ("feature", "interactive", "relational")
"""Settings of a teacher that are weights of losses."""
_LIMITS: Limits = {**dict.fromkeys(LOSSES, (0, 1e6)), "logit_scale": (1, 1e6)}


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A frozen CLIP, what it teaches and with which weight (docs/distillation.md)."""

    path: str = ""
    """Checkpoint or run folder of a CLIP, or a file in the authors' layout (tools.convert makes both)."""
    model: ModelConfig | None = None
    """Model of the teacher (a preset's name, or a mapping); null: what its checkpoint says. A file does not say it."""
    precision: str | None = None
    """fp32 | bf16; null: train.precision."""
    feature: float = 1.0
    """Weight of the squared distance of student's and teacher's embeddings, of both towers; wants the teacher's width.
    """
    interactive: float = 1.0
    """Weight of train.loss between the student's images and the teacher's captions, and the other way round; wants the
    teacher's width.
    """
    relational: float = 0.0
    """Weight of the divergence (KL) of the student's softmax over the global batch from the teacher's, row by row and
    column by column; any width.
    """
    logit_scale: float = 100.0
    """Scale of the teacher's similarities in the relational loss; those of published CLIPs are about 100."""

    @property
    def needs_width(self) -> bool:
        """Whether its embeddings are compared with the student's, and not with its own only."""
        return self.feature > 0 or self.interactive > 0


def check_distill(config: "Config") -> None:
    """Raise ConfigError for a teacher that cannot teach this student."""
    for number, teacher in enumerate(config.train.distill):
        key = f"train.distill[{number}]"
        require(bool(teacher.path), f"{key}.path is empty: name a CLIP's checkpoint, or a file in the authors' layout")
        assert teacher.model is not None, "the config was not resolved"
        _check_numbers(teacher, key)
        _check_model(config, teacher, teacher.model, key)
        _check_captions(config, teacher.model, key)
        own, theirs = config.model.embed_dim, teacher.model.embed_dim
        require(
            own == theirs or not teacher.needs_width,
            f"{key}: its embeddings have {theirs} numbers, the student's {own}: set model.embed_dim={theirs} (the "
            f"student's projection is the map between widths), or {key}.feature=0, {key}.interactive=0 and a "
            f"{key}.relational, which compares no embeddings",
        )


def _check_numbers(teacher: TeacherConfig, key: str) -> None:
    require_within(key, teacher, _LIMITS)
    require(
        any(getattr(teacher, name) for name in LOSSES),
        f"{key} teaches nothing: one of {', '.join(LOSSES)} must be above 0",
    )
    require(
        teacher.precision in (None, "fp32", "bf16"),
        f"{key}.precision is {teacher.precision!r}: choose fp32 or bf16, or null for train.precision",
    )


def _check_model(config: "Config", teacher: TeacherConfig, model: ModelConfig, key: str) -> None:
    require(
        model.fp8 == "none",
        f"{key}.model.fp8 is {model.fp8}: a teacher's passes have any number of images, fp8 wants multiples",
    )
    precision = teacher.precision or config.train.precision
    try:
        model.check()
        check_kernels(
            model,
            precision=precision,
            packed_tokens=model.vision.kept_tokens(0.0),
            tensor=1,
            sequence_parallel=False,
        )
    except ModelConfigError as error:
        raise ConfigError(f"{key}.model: {error}") from None


def _check_captions(config: "Config", model: ModelConfig, key: str) -> None:
    """The teacher reads the student's tokens: same ids, and as many as it was trained on where it reads them all."""
    own, theirs = config.model.text, model.text
    require(
        own.vocab_size == theirs.vocab_size,
        f"{key} knows {theirs.vocab_size} token ids, the student {own.vocab_size}: both read the captions of one "
        "data.tokenizer, take a teacher of the same",
    )
    same = own.context_length == theirs.context_length
    require(
        same or (theirs.pool == "end" and theirs.causal and own.context_length < theirs.context_length),
        f"{key} reads captions of {theirs.context_length} tokens (pool={theirs.pool}), the student's "
        f"model.text.context_length is {own.context_length}: set it to {theirs.context_length}",
    )
