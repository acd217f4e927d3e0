"""Runs a suite on the towers of a checkpoint, at any layout: check all, then set by set, going on after a kill."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from engine.config.read import Config
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import READERS, SampleInput
from engine.evaluation.sets.listing import Listing, Part, list_set
from engine.evaluation.sets.pictures import sample_factory
from engine.evaluation.sets.spec import Suite
from engine.evaluation.suite.features import Features, embed_part
from engine.evaluation.suite.results import Results, Row
from engine.evaluation.suite.score import (
    distinct_captions,
    score_classification,
    score_multilabel,
    score_retrieval,
)
from engine.evaluation.suite.texts import DistinctClasses, TextCache
from engine.evaluation.text_files import write_whole
from engine.evaluation.vocabulary import tokenizer_of
from engine.parallel.agree import everyone
from engine.parallel.mesh import Mesh

_LOOKED_AT = 16
"""Pictures of a set, evenly spread, of which one at least must be readable before anything is run."""


@dataclass(frozen=True, kw_only=True)
class Towers:
    """The model that is evaluated."""

    config: Config
    mesh: Mesh
    dtype: torch.dtype
    device: torch.device
    embedder: Callable[[int], Embedder]
    """For clips of so many frames (1: pictures)."""

    def block_size(self, embedder: Embedder) -> int:
        """Samples of one block: enough micro-batches for every replica to fill the pipeline."""
        units = max(1, embedder.micro_batch // embedder.frames)
        return units * self.mesh.data.size * 4 * self.mesh.pipeline.size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a suite is run."""

    root: Path
    transforms: tuple[str, ...] = ("squash",)
    frames: tuple[int, ...] = (1,)
    """Frames of clips; pictures are pictures."""
    any_size: bool = False
    readers: int = READERS
    probes: tuple[str, ...] = ()
    """linear, sgd, knn."""
    keep_features: bool = False


class SuiteRun:
    """One suite on one model."""

    def __init__(self, suite: Suite, towers: Towers, plan: Plan):
        """Lists and checks every set that is there, before any forward.

        Collective over the mesh; raises DataError on every rank, in one line for all that is wrong.
        """
        self.suite, self.towers, self.plan = suite, towers, plan
        self.world = towers.mesh.world
        found = self._list_all() if self.world.rank == 0 else None
        listings, self.missing, problems = everyone(found, self.world)[0]
        if problems:
            raise DataError("; ".join(problems))
        self.listings: list[Listing] = listings
        if not listings:
            raise DataError(
                f"{plan.root} holds none of the {len(suite.sets)} sets of {suite.name}: {_first(self.missing)}"
            )

    # --- before any forward ------------------------------------------------------------------------------------------

    def _list_all(self) -> tuple[list[Listing], dict[str, str], list[str]]:
        listings, missing, problems = [], {}, []
        if not self.plan.root.is_dir():
            return [], {}, [f"--data {self.plan.root} is no folder"]
        for spec in self.suite.sets:
            try:
                listing = list_set(self.plan.root, spec, train=bool(self.plan.probes), any_size=self.plan.any_size)
                if listing is None:
                    missing[spec.name] = f"no folder wds_{spec.name} or {spec.name} in {self.plan.root}"
                    continue
                self._look_at_pictures(listing)
                listings.append(listing)
            except (DataError, OSError) as error:
                problems.append(str(error))
        return listings, missing, problems

    def _look_at_pictures(self, listing: Listing) -> None:
        config = self.towers.config
        frames = self.plan.frames[0] if listing.spec.is_video else 1
        samples = sample_factory(listing.test, config, transform="squash", frames=frames)()
        if len(samples) != listing.test.count:
            raise DataError(f"{listing.folder}: {listing.test.count} labels for {len(samples)} samples")
        wanted = np.unique(np.linspace(0, len(samples) - 1, min(_LOOKED_AT, len(samples))).astype(np.int64))
        bad = []
        for position in wanted:
            seen = samples.read_each(np.array([position]))
            if bool(seen.has_image[0]):
                return
            bad += [f"{sample.key}: {sample.reason}" for sample in seen.bad if sample.reason != "missing_caption"]
        raise DataError(f"{listing.folder}: none of the {len(wanted)} pictures looked at can be read ({_first(bad)})")

    # --- set by set --------------------------------------------------------------------------------------------------

    def run(self, out: Path, identity: str) -> Results:
        """Score every set that is there. Collective over the mesh; the results are whole on every rank.

        out: where features and what is found go. identity: a digest of the weights and the precision; what lies in
        `out` of the same weights, pictures, labels and prompts is taken up, anything else is done anew.
        """
        self.out, self.identity = out, identity
        rows = [
            self._known(listing, transform, frames) or self._score(listing, transform, frames)
            for listing in self.listings
            for transform, frames in self._variants(listing)
        ]
        return Results(suite=self.suite, about={}, rows=rows, missing=self.missing)

    def _variants(self, listing: Listing) -> list[tuple[str, int]]:
        return [(t, f) for t in self.plan.transforms for f in (self.plan.frames if listing.spec.is_video else (1,))]

    def _score(self, listing: Listing, transform: str, frames: int) -> Row:
        embedder = self.towers.embedder(frames)
        features = self._features(listing, listing.test, "test", transform, frames, embedder)
        measures = self._measures(listing, features, embedder)
        if self.plan.probes and listing.train is not None and listing.spec.scored_as == "classification":
            fitted = self._features(listing, listing.train, "train", transform, frames, embedder)
            measures = self._on_first(lambda: measures | self._probe(listing, features, fitted, embedder))
            self._finish_features(fitted)
        row = self._on_first(lambda: self._row(listing, transform, frames, features, measures))
        if self.world.rank == 0:
            path = self._path(listing, transform, frames)
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = {"fingerprint": self._fingerprint(listing, listing.test, transform, frames), "row": vars(row)}
            write_whole(path, json.dumps(stored))
        self._finish_features(features)
        return row

    def _measures(self, listing: Listing, features: Features, embedder: Embedder) -> dict[str, float]:
        width, tokenizer = (
            embedder.encoders.embed_dim,
            tokenizer_of(self.towers.config.model.text, self.towers.config.data),
        )
        cache = self._texts()
        if listing.spec.scored_as == "retrieval":
            captions = distinct_captions(listing, tokenizer)
            text = cache.captions(embedder, captions.tokens, captions.texts)
            return self._on_first(lambda: score_retrieval(features, features.rows(width), captions, text))
        classes = DistinctClasses(listing.classes, listing.templates, tokenizer)
        weights = cache.classes(embedder, classes)
        measure = score_multilabel if listing.spec.scored_as == "multilabel" else score_classification
        return self._on_first(lambda: measure(listing, features, features.rows(width), classes, weights))

    def _probe(self, listing: Listing, test: Features, train: Features, embedder: Embedder) -> dict[str, float]:
        from engine.evaluation.probe.run import probe  # needs scikit-learn

        return probe(self.plan.probes, listing, test, train, embedder.encoders.embed_dim)

    def _features(
        self, listing: Listing, part: Part, split: str, transform: str, frames: int, embedder: Embedder
    ) -> Features:
        folder = self._features_folder(listing, split, transform, frames)
        features = Features(folder=folder, fingerprint=self._fingerprint(listing, part, transform, frames))
        factory = sample_factory(part, self.towers.config, transform=transform, frames=frames)
        source = SampleInput(
            factory, self.towers.mesh, self.towers.dtype, self.towers.device, readers=self.plan.readers
        )
        label = f"{listing.spec.title} {transform}{f' × {frames} frames' if listing.spec.is_video else ''}"
        name = label if split == "test" else f"{label} ({split})"
        return embed_part(embedder, source, self.towers.block_size(embedder), features, name)

    def _finish_features(self, features: Features) -> None:
        if self.world.rank == 0 and not self.plan.keep_features:
            features.discard()

    def _row(
        self, listing: Listing, transform: str, frames: int, features: Features, measures: dict[str, float]
    ) -> Row:
        without = sum(not captions for captions in listing.test.captions)
        reasons = Counter(bad.reason for bad in features.left_out.samples) + Counter(missing_caption=without)
        return Row(
            name=listing.spec.name,
            transform=transform,
            frames=frames,
            measures=measures,
            samples=listing.test.count,
            left_out=features.left_out.count + without,
            reasons=dict(reasons),
            remark=listing.remark,
        )

    def _on_first(self, compute: Callable[[], Any]) -> Any:
        """The result of rank 0 on every rank; its DataError or ValueError is everyone's. Collective."""
        value, error = None, None
        if self.world.rank == 0:
            try:
                value = compute()
            except (DataError, ValueError) as problem:
                error = str(problem)
        value, error = everyone((value, error), self.world)[0]
        if error is not None:
            raise DataError(error)
        return value

    # --- after a kill ------------------------------------------------------------------------------------------------

    def _known(self, listing: Listing, transform: str, frames: int) -> Row | None:
        """What an earlier run has found for the same weights, pictures, labels and prompts."""
        row = None
        path = self._path(listing, transform, frames)
        lacks_features = (
            self.plan.keep_features and not self._features_folder(listing, "test", transform, frames).is_dir()
        )
        if self.world.rank == 0 and path.is_file() and not lacks_features:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["fingerprint"] == self._fingerprint(listing, listing.test, transform, frames):
                row = Row(**stored["row"])
        return everyone(row, self.world)[0]

    def kept(self) -> Iterator[tuple[Listing, Features, Embedder]]:
        """The features of every set, with Plan.keep_features, after `run`. Collective over the mesh."""
        for listing in self.listings:
            for transform, frames in self._variants(listing):
                embedder = self.towers.embedder(frames)
                yield listing, self._features(listing, listing.test, "test", transform, frames, embedder), embedder

    def class_weights(self, listing: Listing, embedder: Embedder) -> Tensor:
        """fp32 [classes, D] by label; from the cache after `run`. Collective over the mesh."""
        tokenizer = tokenizer_of(self.towers.config.model.text, self.towers.config.data)
        classes = DistinctClasses(listing.classes, listing.templates, tokenizer)
        return self._texts().classes(embedder, classes)[classes.numbers]

    def _texts(self) -> TextCache:
        return TextCache(self.out / "texts", self.identity, self.world)

    def _features_folder(self, listing: Listing, split: str, transform: str, frames: int) -> Path:
        return self.out / "features" / f"{_name(listing)}.{split}.{transform}.{frames}"

    def _path(self, listing: Listing, transform: str, frames: int) -> Path:
        return self.out / "sets" / f"{_name(listing)}.{transform}.{frames}.json"

    def _fingerprint(self, listing: Listing, part: Part, transform: str, frames: int) -> str:
        digest = blake2b(digest_size=16)
        files = [(path, Path(path).stat().st_size) for path in (part.shards or part.paths)]
        labels = b"" if part.labels is None else part.labels.tobytes()
        told = (
            self.identity,
            transform,
            frames,
            files,
            part.captions,
            part.groups,
            listing.classes,
            listing.templates,
        )
        for piece in (*told, listing.spec.metric, self.plan.probes):
            digest.update(repr(piece).encode())
        digest.update(labels)
        return digest.hexdigest()


def _name(listing: Listing) -> str:
    return listing.spec.name.replace("/", "-")


def _first(words: list[str] | dict[str, str]) -> str:
    listed = list(words.values()) if isinstance(words, dict) else words
    return listed[0] if listed else "nothing"
