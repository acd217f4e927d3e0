"""A suite of sets on a checkpoint: results as files and a page."""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.format.disk import MANIFEST
from engine.checkpoint.format.errors import CheckpointError
from engine.checkpoint.format.lock import RunLock
from engine.evaluation.embedder import Embedder
from engine.evaluation.probe.run import PROBES
from engine.evaluation.ranking import tiles
from engine.evaluation.session import Session, load
from engine.evaluation.sets.layouts import Part
from engine.evaluation.sets.spec import Suite, load_suite
from engine.evaluation.suite.features import Features, FileRows
from engine.evaluation.suite.page import render
from engine.evaluation.suite.plan import Plan, Towers
from engine.evaluation.suite.results import Results
from engine.evaluation.suite.run import TABLES, SuiteRun
from engine.evaluation.suite.score import Captions
from engine.evaluation.text_files import write_whole
from engine.parallel.agree import everyone
from tools.cli import table
from tools.embed.outputs import has_parquet, open_table

_ROWS = 4096
"""Rows that are written at once."""
__all__ = ["PROBES", "score_suite"]


def score_suite(arguments: argparse.Namespace, session: Session) -> None:
    """Check, score, write. Collective over the mesh."""
    suite = load_suite(arguments.suite)
    with _alone_in(arguments.out, session):
        _score_suite(suite, arguments, session)


@contextmanager
def _alone_in(out: Path, session: Session) -> Iterator[None]:
    """No other evaluation writes there: ranks may outlive a launcher that was killed. CheckpointError on every rank."""
    lock, error = None, None
    if session.is_first:
        try:
            lock = RunLock(out, named="--out")
        except CheckpointError as problem:
            error = str(problem)
    if (error := everyone(error, session.mesh.world)[0]) is not None:
        raise CheckpointError(error)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _score_suite(suite: Suite, arguments: argparse.Namespace, session: Session) -> None:
    towers = LazyTowers(arguments, session)
    plan = Plan(
        root=arguments.data,
        transforms=("squash", "crop") if arguments.transform == "both" else (arguments.transform,),
        frames=tuple(dict.fromkeys(arguments.frames)),
        any_size=arguments.any_size,
        readers=arguments.readers,
        probes=tuple(dict.fromkeys(arguments.probe)),
        probe_features="features" if arguments.probe_features == "embeddings" else "pooled",
        keep_features=arguments.save_features,
    )
    run = SuiteRun(suite, towers.describe(), plan)
    began = time.perf_counter()
    results = run.run(arguments.out, towers.identity)
    results.about = {
        "checkpoint": str(session.checkpoint.folder),
        "checkpoint_hash": towers.identity,
        "layout": session.mesh.layout,
        "precision": session.config.train.precision,
        "image_size": session.config.model.vision.image_size,
        **({"probe_features": arguments.probe_features} if arguments.probe else {}),
        "evaluation_seconds": round(time.perf_counter() - began, 1),
    }
    if arguments.save_features:
        _save_features(run)
    if session.is_first:
        results.write(arguments.out)
        write_whole(arguments.out / "index.html", render(results))
        _print(results, arguments.out)


class LazyTowers:
    """The towers of a session, loaded when the first embedding is asked for: what is wrong with data is said before."""

    def __init__(self, arguments: argparse.Namespace, session: Session):
        self._arguments, self._session = arguments, session
        self._loaded: Embedder | None = None
        self._of_frames: dict[int, Embedder] = {}
        manifest = (session.checkpoint.folder / MANIFEST).read_bytes()
        told = (arguments.ema, session.config.train.precision, session.config.model.vision.image_size)
        self.identity = blake2b(manifest + repr(told).encode(), digest_size=16).hexdigest()

    def describe(self) -> Towers:
        """What a suite needs of them."""
        session = self._session
        return Towers(
            config=session.config,
            mesh=session.mesh,
            dtype=session.dtype,
            device=session.device,
            embedder=self.embedder,
        )

    def embedder(self, frames: int) -> Embedder:
        """For clips of so many frames. Collective over the mesh."""
        session, arguments = self._session, self._arguments
        if self._loaded is None:
            verify = not arguments.skip_hashes
            self._loaded = load(session, images=True, texts=True, verify_hashes=verify, ema=arguments.ema)
        if frames not in self._of_frames:
            micro_batch = session.config.train.micro_batch_size
            # Sequence parallelism cuts micro-batch x tokens, so a multiple of the tensor axis always fits.
            micro_batch += -micro_batch % math.lcm(session.mesh.tensor.size, frames)
            self._of_frames[frames] = Embedder(self._loaded.encoders, session.mesh, session.device, micro_batch, frames)
        return self._of_frames[frames]


def _save_features(run: SuiteRun) -> None:
    """OUT/features/SET….parquet (.npz without pyarrow): keys, labels, embeddings, and cosines with the classes; of a
    retrieval set also SET….captions.parquet.
    """
    for listing, features, embedder in run.kept():
        kind = listing.spec.scored_as
        weights = run.class_weights(listing, embedder) if kind == "classification" else None
        captions = run.captions(listing, embedder) if kind == "retrieval" else None
        if run.world.rank == 0:
            if captions is not None:
                _write_captions(features, *captions)
            _write_table(features, listing.test, weights)
            features.discard()


def _write_captions(features: Features, captions: Captions, text: FileRows) -> None:
    """A row for every caption of every picture: the picture's key, the caption, its embedding."""
    keys, texts = np.array(features.keys(), dtype=np.str_), np.array(captions.texts, dtype=np.str_)
    with open_table(_table(features, ".captions")) as table_file:
        for rows in tiles(len(captions.pairs), _ROWS):
            sample, number = captions.pairs[rows].T
            columns = {"keys": keys[sample], "captions": texts[number], "text_embeddings": text.pick(number).numpy()}
            table_file.write(columns)


def _table(features: Features, what: str = "") -> Path:
    ending = TABLES[0] if has_parquet() else TABLES[1]
    return features.folder.with_name(features.folder.name + what + ending)


def _write_table(features: Features, part: Part, weights: Tensor | None) -> None:
    images, keys = features.rows(), np.array(features.keys(), dtype=np.str_)
    with open_table(_table(features)) as table_file:
        for rows in tiles(len(images), _ROWS):
            embedded = images[rows]
            valid = torch.isfinite(embedded).all(dim=1).numpy()
            columns = {"keys": keys[rows], "image_valid": valid, "image_embeddings": embedded.numpy()}
            if part.labels is not None and part.labels.ndim == 1:
                columns["label"] = part.labels[rows]
            if weights is not None:
                columns["cosines"] = (embedded.double() @ weights.double().T).float().numpy()
            table_file.write(columns, {"image_embeddings": valid, "cosines": valid})


def _print(results: Results, out: Path) -> None:
    rows: list[list[object]] = [["set", "measure", "%", "reference", "samples", "left out"]]
    for entry in results.set_table():
        name = f"{entry['set']} ({entry['transform']}{f', {n} frames' if (n := entry['frames']) > 1 else ''})"
        reference = "" if entry["reference"] is None else f"{entry['reference']:.1f}"
        rows.append([name, entry["metric"], f"{entry['score']:.2f}", reference, entry["samples"], entry["left_out"]])
        for probe, share in entry["probes"].items():
            rows.append([name, probe.replace("_", " "), f"{share:.2f}", "", "", ""])
    print(table(rows))
    for average in results.average_table():
        if average["score"] is not None:
            reference = "" if average["reference"] is None else f" (reference {average['reference']:.1f})"
            print(f"  {average['name']}: {average['score']:.2f}{reference}")
    if results.missing:
        print(f"  not scored: {', '.join(results.missing)}")
    print(f"  {out / 'index.html'}")
