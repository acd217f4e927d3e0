"""The reasons for which a sample is bad, and how many bad samples a run bears.

Nothing is skipped uncounted: a bad sample gets one of these reasons, is listed in run_dir/quarantine.jsonl
and replaced by the next sample of its source.
"""

from collections.abc import Mapping

from data.errors import DataError

REASONS = {
    "missing_image": "no image, clip or frame in the tar",
    "missing_caption": "no caption in the tar",
    "empty_image": "zero bytes",
    "not_an_image": "no format that is decoded here (an HTML page named .jpg)",
    "truncated_image": "the file ends early",
    "undecodable_image": "damaged in another way",
    "too_many_pixels": "more than data.max_pixels",
    "undecodable_clip": "a video file that cannot be decoded",
    "clip_too_long": "a video file of more than 36,000 frames",
    "frame_sizes_differ": "a clip or frame folder with frames of several sizes",
    "empty_caption": "nothing left after cleaning",
    "caption_too_long": "more than 16 KiB",
    "caption_not_utf8": "bytes that are not UTF-8",
    "truncated_shard": "the tar ends within the member",
    "no_features": "the picture could not be read when data.features were made",
    "member_too_large": "a member of more than 1 GiB",
}
READS_BEFORE_JUDGING = 1_000


def judge_bad_fraction(bad_by_reason: Mapping[str, int], *, reads: int, limit: float) -> None:
    """Raises DataError when more than `limit` of the reads were bad, from the 1,000th read on (before that, a
    handful of samples would decide).
    """
    bad = sum(bad_by_reason.values())
    if reads >= READS_BEFORE_JUDGING and bad > limit * reads:
        raise DataError(
            f"{bad} of {reads} samples were bad ({describe(bad_by_reason)}), more than data.max_bad_fraction={limit}: "
            "repair the shards or raise the limit"
        )


def describe(bad_by_reason: Mapping[str, int]) -> str:
    """Counts in words, the most frequent first."""
    ordered = sorted(bad_by_reason.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason} {count}" for reason, count in ordered)
