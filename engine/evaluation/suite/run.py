"""Runs a suite on the towers of a checkpoint, at any layout: check all, then set by set, going on after a kill."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import Tensor

from data.errors import DataError
from engine.evaluation.embedder import Embedder
from engine.evaluation.inputs import SampleInput
from engine.evaluation.sets.layouts import Part
from engine.evaluation.sets.listing import Listing
from engine.evaluation.sets.pictures import sample_factory
from engine.evaluation.sets.spec import Suite
from engine.evaluation.suite.check import can_be_probed, list_all
from engine.evaluation.suite.features import Features, FileRows, embed_part
from engine.evaluation.suite.plan import Plan, Towers
from engine.evaluation.suite.results import Results, Row
from engine.evaluation.suite.score import (
    Captions,
    distinct_captions,
    score_associations,
    score_classification,
    score_multilabel,
    score_retrieval,
)
from engine.evaluation.suite.texts import DistinctClasses, TextCache
from engine.evaluation.text_files import write_whole
from engine.evaluation.vocabulary import tokenizer_of
from engine.parallel.agree import everyone
from models.towers.heads import Read

TABLES = (".parquet", ".npz")
"""Endings of the files that features are kept in for people, beside their folder."""


class SuiteRun:
    """One suite on one model."""

    def __init__(self, suite: Suite, towers: Towers, plan: Plan):
        """Lists and checks every set that is there, before any forward.

        Collective over the mesh; raises DataError on every rank, in one line for all that is wrong.
        """
        self.suite, self.towers, self.plan = suite, towers, plan
        self.world = towers.mesh.world
        found = list_all(suite, plan, towers.config) if self.world.rank == 0 else None
        listings, self.missing, problems = everyone(found, self.world)[0]
        if problems:
            raise DataError("; ".join(problems))
        self.listings: list[Listing] = listings

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
        if self.world.rank == 0 and self.plan.keep_features:
            for table in self._tables(listing, transform, frames):  # of other weights or another set
                table.unlink()
        probed = self.plan.probes and can_be_probed(listing)
        features = self._features(listing, "test", transform, frames, self._read(listing))
        measures = self._measures(listing, features, embedder)
        if probed:
            measures |= self._probed(listing, transform, frames, features)
        row = self._on_first(lambda: self._row(listing, transform, frames, features, measures))
        if self.world.rank == 0:
            path = self._path(listing, transform, frames)
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = {"fingerprint": self._row_fingerprint(listing, transform, frames), "row": vars(row)}
            write_whole(path, json.dumps(stored))
        self._finish_features(features)
        return row

    def _read(self, listing: Listing) -> Read:
        wants = can_be_probed(listing) and set(self.plan.probes) - {"attentive"}
        return self.plan.probe_features if wants else "features"

    def _probed(self, listing: Listing, transform: str, frames: int, test: Features) -> dict[str, float]:
        from engine.evaluation.probe.run import probe_features, probe_tokens  # need scikit-learn

        measures: dict[str, float] = {}
        names = tuple(name for name in self.plan.probes if name != "attentive")
        if names:
            train = self._features(listing, "train", transform, frames, self._read(listing))
            measures = self._on_first(lambda: probe_features(names, self.plan.probe_features, listing, test, train))
            if self.world.rank == 0:
                train.discard()
        if "attentive" in self.plan.probes:
            fitted = self._features(listing, "train", transform, frames, "tokens")
            scored = self._features(listing, "test", transform, frames, "tokens")
            measures |= self._on_first(lambda: probe_tokens(listing, scored, fitted))
            for part in (fitted, scored):
                if self.world.rank == 0:
                    part.discard()
        return measures

    def _measures(self, listing: Listing, features: Features, embedder: Embedder) -> dict[str, float]:
        if listing.spec.scored_as in ("retrieval", "association"):
            captions, text = self.captions(listing, embedder)
            if questions := listing.test.questions:
                return self._on_first(lambda: score_associations(questions, features, captions, text))
            return self._on_first(lambda: score_retrieval(features, features.rows(), captions, text))
        classes = self._classes(listing)
        weights = self._texts().classes(embedder, classes)
        measure = score_multilabel if listing.spec.scored_as == "multilabel" else score_classification
        return self._on_first(lambda: measure(listing, features, features.rows(), classes, weights))

    def _features(self, listing: Listing, split: str, transform: str, frames: int, read: Read) -> Features:
        part = listing.test if split == "test" else listing.train
        assert part is not None
        embedder = self.towers.embedder(frames)
        folder = self._features_folder(listing, split, transform, frames)
        if read == "tokens":
            folder = folder.with_name(f"{folder.name}.tokens")
        fingerprint = self._fingerprint(part, transform, frames, read) if self.world.rank == 0 else ""
        factory = sample_factory(part, self.towers.config, transform=transform, frames=frames)
        mesh, dtype, device = self.towers.mesh, self.towers.dtype, self.towers.device
        norm = self.towers.config.model.vision.pixel_norm
        source = SampleInput(factory, mesh, dtype, device, pixel_norm=norm, readers=self.plan.readers)
        what = [transform, *([f"× {frames} frames"] if listing.spec.is_video else [])]
        what += [f"({split})"] if split != "test" else []
        name = " ".join([listing.spec.title, *what, *(["tokens"] if read == "tokens" else [])])
        size = self.towers.block_size(embedder, read)
        return embed_part(embedder, source, size, Features(folder=folder, fingerprint=fingerprint), name, read)

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
            samples=listing.test.size,
            left_out=features.left_out.count + without,
            reasons=dict(reasons),
            remark=" ".join(filter(None, (listing.remark, self._not_probed(listing)))),
        )

    def _not_probed(self, listing: Listing) -> str:
        missing = self.plan.probes and listing.spec.scored_as == "classification" and listing.train is None
        return "Not probed: there is no train part." if missing else ""

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
        kept = [*self._tables(listing, transform, frames), self._features_folder(listing, "test", transform, frames)]
        has_features = not self.plan.keep_features or any(place.exists() for place in kept)
        if self.world.rank == 0 and path.is_file() and has_features:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["fingerprint"] == self._row_fingerprint(listing, transform, frames):
                row = Row(**stored["row"])
        return everyone(row, self.world)[0]

    def kept(self) -> Iterator[tuple[Listing, Features, Embedder]]:
        """The features of every set that are no table yet, with Plan.keep_features, after `run`. Collective over the
        mesh.
        """
        for listing in self.listings:
            for transform, frames in self._variants(listing):
                if everyone(bool(self._tables(listing, transform, frames)), self.world)[0]:
                    continue
                embedder = self.towers.embedder(frames)
                yield listing, self._features(listing, "test", transform, frames, self._read(listing)), embedder

    def class_weights(self, listing: Listing, embedder: Embedder) -> Tensor:
        """fp32 [classes, D] by label; from the cache after `run`. Collective over the mesh."""
        classes = self._classes(listing)
        return self._texts().classes(embedder, classes)[classes.numbers]

    def captions(self, listing: Listing, embedder: Embedder) -> tuple[Captions, FileRows]:
        """The different captions of a set and their embeddings, in a file that the first rank may read; from the cache
        after `run`. Collective over the mesh.
        """
        tokenizer = tokenizer_of(self.towers.config.model.text, self.towers.config.data)
        captions = distinct_captions(listing, tokenizer)
        return captions, self._texts().captions(embedder, captions.texts, tokenizer, captions.identity)

    def _classes(self, listing: Listing) -> DistinctClasses:
        tokenizer = tokenizer_of(self.towers.config.model.text, self.towers.config.data)
        return DistinctClasses(listing.classes, listing.templates, tokenizer)

    def _texts(self) -> TextCache:
        return TextCache(self.out / "texts", self.identity, self.world)

    def _features_folder(self, listing: Listing, split: str, transform: str, frames: int) -> Path:
        return self.out / "features" / f"{_name(listing)}.{split}.{transform}.{frames}"

    def _tables(self, listing: Listing, transform: str, frames: int) -> list[Path]:
        """Where the features have been written for people, by an earlier run or this one: none or one."""
        folder = self._features_folder(listing, "test", transform, frames)
        named = (folder.with_name(folder.name + ending) for ending in TABLES)
        return [path for path in named if path.is_file()]

    def _path(self, listing: Listing, transform: str, frames: int) -> Path:
        return self.out / "sets" / f"{_name(listing)}.{transform}.{frames}.json"

    def _fingerprint(self, part: Part, transform: str, frames: int, read: Read) -> str:
        """Digest of what the features of a part depend on; for the first rank, which has seen the files."""
        files = [(path, *_size_and_time(path)) for path in (part.shards or part.paths)]
        return _digest(self.identity, transform, frames, read, files)

    def _row_fingerprint(self, listing: Listing, transform: str, frames: int) -> str:
        part, plan = listing.test, self.plan
        labels = None if part.labels is None else part.labels.tobytes()
        words = (part.captions, part.questions, part.groups, listing.classes, listing.templates, listing.spec.metric)
        probes = (plan.probes, plan.probe_features) if can_be_probed(listing) else ()
        return _digest(self._fingerprint(part, transform, frames, "features"), labels, words, probes)


def _digest(*told: Any) -> str:
    return blake2b(repr(told).encode(), digest_size=16).hexdigest()


def _size_and_time(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def _name(listing: Listing) -> str:
    return listing.spec.name.replace("/", "-")
