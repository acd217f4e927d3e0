"""A checkpoint, sets in every layout, and the results of their suite on one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.jobs import alone, build, job_config, save
from tests.evaluation import sets
from tests.evaluation.commands import NAMES, evaluated

SUITE = """
title: Small
sets:
  - {name: digits, classes: 10, samples: 60, reference: {squash: 20, crop: 30}}
  - {name: many, kind: multilabel, classes: 3, samples: 20}
  - {name: pairs, kind: retrieval, samples: 12}
  - {name: folders, classes: 2, samples: 6, metric: mean_per_class}
  - {name: list, classes: 2, metric: worst_group, groups: "csv:place"}
  - {name: moves, kind: video, classes: 2, samples: 4, reference: {"1": 10, "2": 20}}
  - {name: told, kind: video_retrieval, metric: mean_recall_at_1}
  - {name: winogavil, kind: association, samples: 3}
  - {name: elsewhere, classes: 7}
averages:
  - {name: Pictures, sets: [digits, folders], reference: 40}
  - {name: Gap, sets: [digits, folders], gap_to: digits}
  - {name: Clips, sets: [moves], reference: {"2": 20}}
  - {name: Nowhere, sets: [digits, elsewhere]}
"""


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with alone() as mesh:
        run = tmp_path_factory.mktemp("run")
        return save(build(job_config(run, "model.text.vocab_size=49408", "model.text.context_length=16"), mesh))


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    sets.digits_set(root, names=NAMES)
    sets.multilabel_set(root)
    sets.retrieval_set(root)
    sets.folder_set(root)
    sets.list_set(root)
    sets.video_sets(root)
    sets.association_set(root)
    (root / "suite.yaml").write_text(SUITE)
    return root


@pytest.fixture(scope="package")
def results(checkpoint: Path, data: Path) -> dict[str, Any]:
    out = data / "alone"
    assert evaluated(checkpoint, data, out, "--transform", "both", "--frames", "1", "2", "--micro-batch", "4") == 0
    return json.loads((out / "results.json").read_text())
