"""Which sample a member belongs to: the rule of data/shards/grouping.py, and that no member is lost."""

import tarfile
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.grouping import UNUSED, Found, Place, group
from data.shards.index import ShardIndex, build_index
from data.shards.members import LEFT_OUT, Member

# name of each sample -> (picture or frames, caption, further texts) as member names
SAMPLE = tuple[list[str], str | None, list[str]]


def _grouped(*names: str) -> tuple[dict[str, SAMPLE], Counter[str]]:
    samples, unused = group(Member(name=name, offset=at, size=1) for at, name in enumerate(names))
    return {key: _names(found) for key, found in samples.items()}, unused


def _names(found: Found) -> SAMPLE:
    pictures = [found.places[Place.IMAGE]] if Place.IMAGE in found.places else []
    pictures += [found.frames[number] for number in sorted(found.frames)]
    caption = found.places.get(Place.CAPTION)
    return [picture.name for picture in pictures], caption.name if caption else None, sorted(found.texts)


@pytest.mark.parametrize("key", ["photo", "img_7 v2.0 (clean)", "photo.v2", "22.05", "f.g/a.b", "..", ".hidden", "a/b"])
@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "mp4", "heic"])
def test_a_picture_and_its_caption_are_one_sample_whatever_the_dots(key: str, suffix: str) -> None:
    samples, unused = _grouped(f"{key}.{suffix}", f"{key}.txt", f"{key}.json")
    assert samples == {key: ([f"{key}.{suffix}"], f"{key}.txt", [])} and not unused


@pytest.mark.parametrize("names", [("22.05.png", "22.06.png"), ("a.v1.jpg", "a.v2.jpg"), ("9.99.jpg",), ("1.1.mp4",)])
def test_pictures_alone_are_samples_of_their_own(names: tuple[str, ...]) -> None:
    samples, unused = _grouped(*names)
    assert samples == {name.rpartition(".")[0]: ([name], None, []) for name in names} and not unused


@pytest.mark.parametrize("extra", [("k.txt",), ("k.json",), ()])
def test_numbered_pictures_are_frames(extra: tuple[str, ...]) -> None:
    samples, unused = _grouped("k.002.jpg", "k.000.jpg", "k.001.PNG", *extra)
    caption = "k.txt" if "k.txt" in extra else None
    assert samples == {"k": (["k.000.jpg", "k.001.PNG", "k.002.jpg"], caption, [])} and not unused


def test_a_gap_is_no_clip_without_a_text_and_texts_of_its_own_make_a_picture() -> None:
    assert set(_grouped("k.000.jpg", "k.002.jpg")[0]) == {"k.000", "k.002"}
    assert set(_grouped("k.000.jpg", "k.002.jpg", "k.txt")[0]) == {"k"}
    samples, _ = _grouped("5.00.jpg", "5.01.jpg", "5.02.jpg", "5.02.txt")
    assert set(samples) == {"5.00", "5.01", "5.02"}  # prices, not frames


def test_further_members_go_to_the_sample_before_their_dot() -> None:
    samples, unused = _grouped("x.jpg", "x.txt", "x.syn.txt", "x.Caption2.TXT", "x.meta.json", "x.seg.png", "x.png")
    assert samples == {"x": (["x.jpg"], "x.txt", ["caption2.txt", "meta.json", "syn.txt"])}
    assert unused == {"further_picture": 1, "second_member": 1}


def test_texts_without_a_picture_are_one_sample() -> None:
    assert _grouped("x.a.b.txt", "x.a.txt", "x.txt")[0] == {"x": ([], "x.txt", ["a.b.txt", "a.txt"])}
    assert _grouped("x.jpg", "x.seg.png", "x.seg.note.txt")[0] == {"x": (["x.jpg"], None, ["seg.note.txt"])}


def test_a_picture_that_can_be_decoded_goes_first() -> None:
    samples, unused = _grouped("x.heic", "x.jpg", "x.txt")
    assert samples["x"][0] == ["x.jpg"] and unused == {"second_member": 1}


def test_other_members_are_counted() -> None:
    samples, unused = _grouped("x.jpg", "x.cls", "README", "._x.jpg", "__MACOSX/x.jpg", "v1.jpg/readme", "a.")
    assert set(samples) == {"x"} and unused == {"other_suffix": 4, "not_data": 2}


def test_a_name_of_many_dots_is_cheap() -> None:
    names = [f"{'.' * 50_000}{number}.txt" for number in range(20)]
    assert len(_grouped(*names)[0]) == 20


# --- no member is lost ---------------------------------------------------------------------------------------------

BORDERS = sorted(
    {base + step for base in (0, 512, 1024, 8192, 10_240, 16_384) for step in (-1, 0, 1) if base + step >= 0}
)
STEMS = ["a", "a.b", "a.b.c", "22", "22.05", "22.06", "x y.v2 (1)", "é", ".h", "l" * 99, "l" * 101, "m" * 300, "."]
ENDS = ["jpg", "PNG", "gif", "mp4", "txt", "TXT", "json", "cls", "heic", "syn.txt", "seg.png", "000.jpg", "001.jpg", ""]
NAMES = st.builds(
    lambda folder, stem, end: f"{folder}{stem}.{end}",
    st.sampled_from(["", "f/", "f.g/h/", "./", "/abs/", "../up/"]),
    st.sampled_from(STEMS),
    st.sampled_from(ENDS),
)
MEMBERS = st.lists(st.tuples(NAMES, st.sampled_from(BORDERS)), min_size=1, max_size=12)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def _content(number: int, size: int) -> bytes:
    return np.random.default_rng(number).bytes(size)


def _tar(members: list[tuple[str, int]], form: int, first: int = 0) -> bytes:
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for number, (name, size) in enumerate(members, start=first):
            member = tarfile.TarInfo(name)
            member.size = size
            try:
                tar.addfile(member, BytesIO(_content(number, size)))
            except ValueError:  # ustar has no room for the name
                member.name = f"short{number}.jpg"
                tar.addfile(member, BytesIO(_content(number, size)))
    return stream.getvalue()


def _read_all(index: ShardIndex, tar: bytes) -> list[bytes]:
    def read_at(offset: int, size: int) -> bytes:
        return tar[offset : offset + size]

    contents = []
    for sample in range(len(index)):
        spans = [index.span(sample, place) for place in Place]
        spans += [*index.frame_spans(sample), *index.text_spans(sample).values()]
        contents += [index.read(span, read_at) for span in spans if span is not None]
    return contents


def _unread(index: ShardIndex) -> int:
    return sum(index.odd.get(reason, 0) for reason in (*UNUSED, *LEFT_OUT))


@settings(max_examples=60, deadline=None)
@given(MEMBERS, FORMATS)
def test_every_member_is_read_once_or_counted(members: list[tuple[str, int]], form: int) -> None:
    tar = _tar(members, form)
    index = build_index(BytesIO(tar), "x.tar")
    contents = _read_all(index, tar)
    assert len(contents) + _unread(index) == len(members)
    whole = Counter(_content(number, size) for number, (_, size) in enumerate(members))
    assert Counter(contents) <= whole
    assert not index.truncated


@settings(max_examples=25, deadline=None)
@given(MEMBERS, MEMBERS, FORMATS, st.integers(0, 3))
def test_a_tar_behind_another_is_read_too(
    first: list[tuple[str, int]], second: list[tuple[str, int]], form: int, padding: int
) -> None:
    tar = _tar(first, form) + bytes(512 * padding) + _tar(second, form, len(first))
    index = build_index(BytesIO(tar), "x.tar")
    assert len(_read_all(index, tar)) + _unread(index) == len(first) + len(second)
    assert index.odd["behind_end_mark"] == len(second)


@settings(max_examples=40, deadline=None)
@given(MEMBERS, FORMATS, st.data())
def test_what_lies_before_damage_is_kept(members: list[tuple[str, int]], form: int, data: st.DataObject) -> None:
    tar = bytearray(_tar(members, form))
    with tarfile.open(fileobj=BytesIO(bytes(tar))) as whole:
        infos = whole.getmembers()
    at = data.draw(st.integers(0, infos[-1].offset_data + infos[-1].size))
    if data.draw(st.booleans()):
        del tar[at:]
    else:
        tar[at : at + 512] = bytes([data.draw(st.integers(0, 255))]) * 512
    before = sum(info.offset_data + info.size <= at for info in infos)
    try:
        index = build_index(BytesIO(bytes(tar)), "x.tar")
    except DataError:
        assert before == 0
        return
    assert len(_read_all(index, bytes(tar))) + _unread(index) >= before
