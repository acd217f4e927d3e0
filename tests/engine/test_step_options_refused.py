"""Options of the step that cannot work together are refused before any process group exists, in one clear line."""

import pytest

from engine.config.read import Config, ConfigError, check_layout, resolve


def _resolve(*options: str) -> Config:
    """The tower has four blocks, the batch eight micro-batches of two."""
    small = ["model.preset=tiny-18b", "train.global_batch_size=16", "train.micro_batch_size=2"]
    return resolve({"data": {"shards": ["-"]}}, [*small, *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["parallel.virtual=0"], r"parallel\.virtual is 0.*at least 1"),
        (["parallel.virtual=3", "parallel.pipeline=2"], r"2 x parallel\.virtual 3 = 6 exceeds the 4 blocks"),
        (["parallel.pipeline=2", "parallel.layers=[1, 2]"], r"layers \[1, 2\].*4 blocks.*gives 3 to 2"),
        (["parallel.pipeline=2", "parallel.layers=[1, 1, 2]"], r"each of the 2 stages.*gives 4 to 3"),
        (["parallel.pipeline=2", "parallel.layers=[0, 4]"], r"each of the 2 stages at least one"),
        (["parallel.pipeline=2", "parallel.virtual=2", "parallel.layers=[2, 2]"], r"each of the 4 stages"),
        (["parallel.bucket_size=0"], r"bucket_size is 0: it must be at least 1"),
        (["train.keep_activations=-2"], r"keep_activations must be -1 \(all\), 0"),
        (["train.activation_budget_gb=1", "train.keep_activations=1"], r"replaces train\.keep_activations"),
        (["train.activation_budget_gb=1", "train.keep_activations=-1"], r"replaces train\.keep_activations"),
        (["train.activation_budget_gb=-1"], r"activation_budget_gb is -1.0: it must be at least 0"),
        (["train.recompute=some"], r"recompute is 'some': choose none, selective or full"),
        (["train.text_micro_batch_size=-1"], r"text_micro_batch_size is -1: it must be at least 0"),
        (["train.loss=hinge"], r"loss is 'hinge': choose softmax or sigmoid"),
        (["train.loss_variant=tree"], r"loss_variant is 'tree': gather or ring"),
        (["train.loss_tile=0"], r"loss_tile is 0"),
        (["train.logit_scale=0"], r"logit_scale is 0\.0: a positive number"),
    ],
)
def test_a_config_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        _resolve(*options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (2, ["parallel.pipeline=2", "parallel.virtual=2", "train.global_batch_size=6"], r"groups of.*2.*replica has 3"),
        (4, ["parallel.pipeline=4", "train.keep_activations=9"], r"keep_activations 9 exceeds the 8 micro-batches"),
        (2, ["parallel.pipeline=2", "train.offload_stash=true", "train.keep_activations=8"], r"all 8 micro-batches"),
        (4, ["train.keep_activations=3"], r"keep_activations 3 exceeds the 2 micro-batches"),
        (3, ["parallel.pipeline=2"], r"3 ranks cannot be cut.*2.*multiple of 2"),
        (8, ["train.micro_batch_size=4"], r"16 is not a multiple of DP 8 x train\.micro_batch_size 4 = 32"),
        (4, ["parallel.pipeline=4", "train.global_batch_size=2"], r"2 is smaller than the 4 ranks"),
    ],
)
def test_a_layout_is_refused(ranks: int, options: list[str], message: str) -> None:
    config = _resolve(*options)
    with pytest.raises(ConfigError, match=message) as refusal:
        check_layout(config, ranks)
    assert "\n" not in str(refusal.value)


def test_what_is_just_possible_is_accepted() -> None:
    config = _resolve("parallel.pipeline=2", "parallel.virtual=2", "parallel.layers=[1, 1, 1, 1]")
    assert check_layout(config, 4) == 2
    assert check_layout(_resolve("train.keep_activations=8"), 1) == 1
