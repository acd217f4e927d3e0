"""The probes of a set, on features that are on disk."""

import numpy as np

from data.errors import DataError
from engine.evaluation.probe.attentive import attentive
from engine.evaluation.probe.knn import knn
from engine.evaluation.probe.linear import lbfgs, sgd
from engine.evaluation.sets.layouts import Part
from engine.evaluation.sets.listing import Listing
from engine.evaluation.suite.features import Features
from models.towers.heads import Read

PROBES = ("linear", "sgd", "knn", "attentive")


def probe_features(
    names: tuple[str, ...], read: Read, listing: Listing, test: Features, train: Features
) -> dict[str, float]:
    """probe_NAME_top1 of linear, sgd and knn; the features are in memory while they are fitted.

    read: pooled, the features before the projection; or features, the embeddings.
    """
    assert listing.train is not None
    column = "pooled" if read == "pooled" else "images"
    (fitted, labels), (scored, truth) = (
        _arrays(part, features, column) for part, features in ((listing.train, train), (listing.test, test))
    )
    _check(listing, labels)
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


def probe_tokens(listing: Listing, test: Features, train: Features) -> dict[str, float]:
    """probe_attentive_top1; of the tokens a batch at a time is in memory."""
    assert listing.train is not None and listing.train.labels is not None and listing.test.labels is not None
    rows, scored = train.scored.numpy(), test.scored.numpy()
    labels = listing.train.labels[rows]
    _check(listing, labels)
    predicted = attentive(train.rows("tokens"), rows, labels, test.rows("tokens"), scored, len(listing.classes))
    return {"probe_attentive_top1": float((predicted == listing.test.labels[scored]).mean())}


def _check(listing: Listing, labels: np.ndarray) -> None:
    if len(np.unique(labels)) < 2:
        raise DataError(f"{listing.folder}: the train part holds one class, a probe needs two")


def _arrays(part: Part, features: Features, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(features, labels) of the pictures that could be read."""
    assert part.labels is not None
    rows = features.scored.numpy()
    return features.rows(column)[slice(0, part.count)].numpy()[rows], part.labels[rows]
