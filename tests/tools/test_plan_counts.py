"""Planner formulas against the counts of the real models and the published cost of the 18B."""

import pytest

from engine.config import preset_model
from tests.models.test_counts import REAL
from tools.planning import counts


@pytest.mark.parametrize("preset", REAL)
def test_parameters_to_the_unit(preset: str) -> None:
    model = preset_model(preset)
    assert (counts.vision_parameters(model), counts.text_parameters(model)) == REAL[preset][:2]


@pytest.mark.parametrize(
    ("preset", "dropout", "vision", "training", "executed"),
    [("18b", 0.5, 4.563, 13.98, 18.64), ("18b", 0.0, 9.121, 27.66, 36.88), ("18b-336", 0.0, 20.66, 62.3, 83.0)],
)
def test_tflops_of_a_pair(preset: str, dropout: float, vision: float, training: float, executed: float) -> None:
    model = preset_model(preset)
    forward = counts.vision_forward_flops(model, model.vision.kept_tokens(dropout))
    assert forward / 1e12 == pytest.approx(vision, rel=1e-3)
    assert counts.text_forward_flops(model) / 1e12 == pytest.approx(0.098, abs=1e-3)
    assert counts.training_flops(model, dropout) / 1e12 == pytest.approx(training, rel=1e-3)
    assert counts.executed_flops(model, dropout) / 1e12 == pytest.approx(executed, rel=1e-3)


def test_kept_activations_are_not_replayed() -> None:
    model = preset_model("18b")
    assert counts.executed_flops(model, 0.5, kept_share=1.0) == counts.training_flops(model, 0.5)
