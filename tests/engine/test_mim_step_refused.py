"""What means nothing to masked-feature distillation is refused before any process group exists, in one line."""

import dataclasses
from pathlib import Path

import pytest

from engine.config.read import Config, ConfigError, check_layout, check_vocabulary, resolve, to_dict
from tests.engine.mim_jobs import MODEL, TEACHER, Layout, mim_config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("objective=jepa", r"objective is 'jepa': choose contrastive or mim"),
        ("objective=contrastive", r"mim\.teacher has no effect with objective=contrastive"),
        ("mim.teacher=null", r"needs mim\.teacher: a CLIP checkpoint"),
        ("mim.teacher_precision=fp16", r"teacher_precision is 'fp16': choose fp32 or bf16"),
        ("mim.patch_gradient_scale=2", r"patch_gradient_scale is 2\.0: it must be at most 1"),
        ("mim.masked_patches=17", r"17 masked patches: a 4 x 4 grid allows 1 to 16"),
        ("mim.min_aspect=0", r"min_aspect is 0\.0: it must be at least 1e-06"),
        ("mim.teacher_model.vision.patch_size=8", r"student sees 4 x 4 patches .*teacher 7 x 7.*image_size=98"),
        ("mim.teacher_model.vision.patch_size=9", r"mim\.teacher_model: model\.vision\.image_size"),
        ("mim.teacher_model.fp8=current", r"teacher_model\.fp8 is current: the teacher's passes have any number"),
        ("mim.teacher_model.attention=flash", r"mim\.teacher_model: model\.attention=flash .* bf16 only, not fp32"),
        ("train.patch_dropout=0.5", r"masks patches and drops none, set it to 0"),
        ("train.keep_activations=1", r"keep_activations=1 has no effect.*1F1B keeps the activations.*remove it"),
        ("train.activation_budget_gb=1", r"activation_budget_gb=1\.0 has no effect.*1F1B"),
        ("train.logit_scale=null", r"logit_scale=None has no effect.*sees no captions"),
        ("train.loss=sigmoid", r"train\.loss=sigmoid has no effect"),
        ("train.text_micro_batch_size=4", r"text_micro_batch_size=4 has no effect"),
        ("optim.lr_text=0.1", r"optim\.lr_text=0\.1 has no effect"),
        ("optim.layer_decay_text=1", r"layer_decay_text=1\.0 has no effect"),
        ("init.text=elsewhere", r"init\.text=elsewhere has no effect"),
        ("checkpoint={keep_best: t2i_top1, every_steps: 1}", r"keep_best is t2i_top1, which this job .*no captions"),
        ("data.frames=2", r"data\.frames 2 needs objective=contrastive"),
    ],
)
def test_a_setting_is_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        mim_config(Layout(), option)
    assert "\n" not in str(refusal.value)


def test_a_file_does_not_say_its_model_and_a_folder_may_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights\.safetensors is not a checkpoint or run folder.*teacher_model"):
        mim_config(Layout(), teacher_model=None)
    with pytest.raises(ConfigError, match=r"mim\.teacher: .*is neither a checkpoint"):
        mim_config(Layout(), teacher=str(tmp_path), teacher_model=None)


def test_defaults_of_the_other_objective_need_not_be_unset() -> None:
    tree = {"objective": "mim", "model": "18b", "data": {"shards": ["-"]}}
    config = resolve(tree | {"mim": {"teacher": "e14-plus.pt", "teacher_model": "e14-plus"}}, [])
    assert (config.train.patch_dropout, config.mim.masked_patches) == (0.0, 105)
    assert config.mim.teacher_model is not None and config.mim.teacher_model.embed_dim == 1024
    check_vocabulary(dataclasses.replace(config, model=MODEL))


def test_a_resolved_config_resolves_to_itself() -> None:
    config = mim_config(Layout())
    assert resolve(to_dict(config), []) == config


def test_a_batch_may_be_smaller_than_the_ranks_and_virtual_stages_need_groups() -> None:
    assert check_layout(_of(batch=2, pipeline=4, micro_batch=1), 4) == 1
    with pytest.raises(ConfigError, match=r"groups of parallel\.pipeline 2 micro-batches, but a replica has 1"):
        check_layout(_of(batch=4, pipeline=2, micro_batch=4, options=("parallel.virtual=2",)), 2)


def _of(**layout) -> Config:
    return mim_config(Layout(**layout), teacher=TEACHER["teacher"])
