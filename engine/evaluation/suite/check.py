"""All that can be wrong with the sets of a suite, found before any forward."""

import numpy as np

from data.errors import DataError
from engine.config.read import Config
from engine.evaluation.sets.listing import Listing, list_set
from engine.evaluation.sets.pictures import sample_factory
from engine.evaluation.sets.spec import Suite
from engine.evaluation.suite.plan import Plan

_LOOKED_AT = 16
"""Pictures of a set, evenly spread, of which one at least must be readable before anything is run."""


def list_all(suite: Suite, plan: Plan, config: Config) -> tuple[list[Listing], dict[str, str], list[str]]:
    """(sets that are there and in order, those that are not there and why, one line for each that is wrong)."""
    listings, missing, problems = [], {}, []
    if not plan.root.is_dir():
        return [], {}, [f"--data {plan.root} is no folder"]
    for spec in suite.sets:
        try:
            listing = list_set(plan.root, spec, train=bool(plan.probes), any_size=plan.any_size)
            if listing is None:
                missing[spec.name] = f"no folder wds_{spec.name} or {spec.name} in {plan.root}"
                continue
            _look_at_pictures(listing, plan, config)
            listings.append(listing)
        except (DataError, OSError) as error:
            problems.append(str(error))
    if plan.probes and listings and not problems and not any(can_be_probed(listing) for listing in listings):
        problems.append(f"--probe is fitted on the train part of a set of classes: no set in {plan.root} has one")
    if not listings and not problems:
        problems.append(
            f"{plan.root} holds none of the {len(suite.sets)} sets of {suite.name}: each is a folder wds_NAME or NAME "
            f"there (docs/evaluation_sets.md), with NAME one of {', '.join(missing)}"
        )
    return listings, missing, problems


def can_be_probed(listing: Listing) -> bool:
    """Whether there are pictures with one label each to fit a probe on."""
    return listing.train is not None and listing.spec.scored_as == "classification"


def _look_at_pictures(listing: Listing, plan: Plan, config: Config) -> None:
    frames = max(plan.frames) if listing.spec.is_video else 1
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
    first = bad[0] if bad else "it holds none"
    raise DataError(f"{listing.folder}: none of the {len(wanted)} pictures looked at can be read ({first})")
