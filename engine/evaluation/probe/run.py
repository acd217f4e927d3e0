"""The probes of a set, on features that are on disk."""

import numpy as np

from data.errors import DataError
from engine.evaluation.probe.knn import knn
from engine.evaluation.probe.linear import lbfgs, sgd
from engine.evaluation.sets.listing import Listing, Part
from engine.evaluation.suite.features import Features

PROBES = ("linear", "sgd", "knn")


def probe(names: tuple[str, ...], listing: Listing, test: Features, train: Features, width: int) -> dict[str, float]:
    """probe_NAME_top1 of each; features are the L2-normalised embeddings, in memory while they are fitted."""
    assert listing.train is not None
    fitted, labels = _arrays(listing.train, train, width)
    scored, truth = _arrays(listing.test, test, width)
    if len(np.unique(labels)) < 2:
        raise DataError(f"{listing.folder}: the train part holds one class, a probe needs two")
    classes = len(listing.classes)
    measures: dict[str, float] = {}
    for name in names:
        if name == "linear":
            predicted, strength = lbfgs(fitted, labels, scored)
            measures["probe_linear_c"] = strength
        else:
            predicted = (sgd if name == "sgd" else knn)(fitted, labels, scored, classes)
        measures[f"probe_{name}_top1"] = float((predicted == truth).mean())
    return measures


def _arrays(part: Part, features: Features, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(features, labels) of the pictures that could be read."""
    assert part.labels is not None
    rows = features.scored.numpy()
    return features.rows(width)[slice(0, part.count)].numpy()[rows], part.labels[rows]
