"""What frozen teachers add to the loss, against the full matrices in float64; and teachers that cannot teach."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.reader import Checkpoint
from engine.config.errors import ConfigError
from engine.config.phases import plan_job
from engine.config.read import Config, resolve, to_dict
from tests.checkpoint.jobs import alone, build, job_config, run_steps, save
from tests.engine.distill_reference import TEACHERS, distilled_reference, result_of, taught_by
from tests.engine.loss_reference import pairs, worst_error
from tests.golden import FOLDER

FILE = str(FOLDER / "tiny-18b" / "weights.safetensors")
ROWS, WIDTH = 13, 24


@pytest.mark.parametrize("case", TEACHERS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_float64_equals_the_full_matrices(case: str, kind: str) -> None:
    image, text = pairs(ROWS, WIDTH, noise=1.0)
    taught = taught_by(TEACHERS[case], ROWS, WIDTH)
    rows = torch.arange(ROWS)
    for tile, copies in product((1, 3, 64), (None, torch.stack([rows % 4, rows // 2], dim=1))):
        where: dict[str, Any] = {"group": None, "tile": tile, "variant": "gather", "row_counts": [ROWS]}
        result = result_of(kind, image, text, taught, where | {"copies": copies})
        assert worst_error(result, distilled_reference(kind, image, text, taught, copies)) < 1e-13
        assert sum(result.terms.values()) == pytest.approx(result.loss)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    image, text = (rows.float() for rows in pairs(ROWS, WIDTH))
    teacher = TEACHERS["relational"][0]
    (taught,) = taught_by([teacher], ROWS, WIDTH)
    same = type(taught)(
        teacher=type(teacher)(path="a", interactive=0, relational=1, logit_scale=12), image=image, text=text
    )
    where: dict[str, Any] = {"group": None, "tile": None, "variant": "gather", "row_counts": None, "copies": None}
    result, alone = (result_of("softmax", image, text, teachers, where) for teachers in ([same], []))
    assert result.terms["distill_feature"] == 0 and abs(result.terms["distill_relational"]) < 1e-6
    torch.testing.assert_close(result.grad_image, alone.grad_image)
    assert list(alone.terms) == ["contrastive_loss"]


# --- configs ----------------------------------------------------------------------------------------------------------


def _job(*teachers: dict[str, Any], **sections: Any) -> Config:
    tree = {"model": "tiny-18b", "data": {"shards": ["-"]}, "train": {"distill": list(teachers)}}
    return resolve(tree | sections, [])


TEACHER = {"path": FILE, "model": "tiny-18b"}
OF_WIDTH_16 = {"preset": "tiny-18b", "embed_dim": 16}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"model": "tiny-18b"}, r"train\.distill\[0\]\.path is empty"),
    "no model": ({"path": FILE}, r"not a checkpoint or run folder: .* name its model in train\.distill\[0\]\.model"),
    "no such preset": (TEACHER | {"model": "tiny-19b"}, "'tiny-19b' is not a preset"),
    "another width": (TEACHER | {"model": OF_WIDTH_16}, "have 16 numbers, the student's 32: set model.embed_dim=16"),
    "other ids": (TEACHER | {"model": "tiny-e14"}, "knows 320 token ids, the student 512"),
    "shorter captions": (
        TEACHER | {"model": {"preset": "tiny-18b", "text": {"context_length": 12}}},
        r"reads captions of 12 tokens \(pool=end\), the student's model.text.context_length is 16",
    ),
    "reads all places": (
        TEACHER | {"model": {"preset": "tiny-18b", "text": {"context_length": 20, "pool": "last"}}},
        r"reads captions of 20 tokens \(pool=last\)",
    ),
    "nothing": (TEACHER | {"feature": 0, "interactive": 0}, "teaches nothing"),
    "below 0": (TEACHER | {"relational": -1}, r"train\.distill\[0\]\.relational is -1\.0: it must be at least 0"),
    "a temperature": (TEACHER | {"logit_scale": 0.01}, r"logit_scale is 0\.01: it must be at least 1"),
    "precision": (TEACHER | {"precision": "fp16"}, "choose fp32 or bf16"),
    "fp8": (TEACHER | {"model": {"preset": "tiny-18b", "fp8": "hybrid"}}, "fp8 wants multiples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_cannot_teach_is_refused_in_one_line(case: str) -> None:
    entry, says = REFUSED[case]
    with pytest.raises(ConfigError, match=says) as refused:
        _job(entry)
    assert "\n" not in str(refused.value)


def test_teachers_of_other_widths_and_longer_captions_teach_what_they_can() -> None:
    relations = TEACHER | {"model": OF_WIDTH_16, "feature": 0, "interactive": 0, "relational": 1}
    longer = TEACHER | {"model": {"preset": "tiny-18b", "text": {"context_length": 20}}}
    config = _job(relations, longer)
    assert [teacher.model.embed_dim for teacher in config.train.distill if teacher.model] == [16, 32]
    assert resolve(to_dict(config), []) == config


def test_phases_have_teachers_of_their_own_and_a_student_of_masks_none() -> None:
    phases = [{"name": "taught", "steps": 3, "train": {"distill": [TEACHER]}}, {"name": "alone", "steps": 3}]
    job = plan_job(_job(phases=phases, checkpoint={"every_steps": 3}))
    assert [len(phase.config.train.distill) for phase in job.phases] == [1, 0]
    with pytest.raises(ConfigError, match=r"train\.distill=.* has no effect with objective=mim"):
        _job(
            TEACHER,
            objective="mim",
            mim={"teacher": FILE, "teacher_model": "tiny-18b"},
            train={"distill": [TEACHER], "patch_dropout": 0},
        )


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_taught_run_goes_on_to_the_bit_and_says_what_changed(tmp_path: Path) -> None:
    """The teacher is a run folder, which says its model itself; nothing of it is in the checkpoint."""
    with alone() as mesh:
        save(build(job_config(tmp_path / "teacher"), mesh))

        def taught(run: str, *overrides: str) -> Config:
            teacher = f"train.distill=[{{path: {tmp_path}/teacher, relational: 1}}]"
            return job_config(tmp_path / run, teacher, *overrides)

        whole = run_steps(build(taught("whole"), mesh), 4)
        first = build(taught("parts"), mesh)
        losses = run_steps(first, 2)
        folder = save(first)
        assert {name.split("/")[1].split(".")[0] for name in Checkpoint(folder).manifest.tensors} == {
            "vision", "text", "logit_scale",
        }  # fmt: skip
        resumed = taught("other", f"checkpoint.resume={folder}")
        assert losses + run_steps(build(resumed, mesh), 2) == whole
        changes = f"checkpoint.resume={folder}", f"train.distill=[{{path: {tmp_path}/teacher, feature: 3}}]"
        with pytest.raises(CheckpointError, match=r"train\.distill\.0\.feature 1\.0 → 3\.0; .*relational 1\.0 → 0\.0"):
            build(job_config(tmp_path / "third", *changes), mesh)
