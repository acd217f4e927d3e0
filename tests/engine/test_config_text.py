"""Settings are the text that people typed: the field decides what it means, in a file and on a command line alike."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.origin import model_in_words, origin
from engine.config.phases import plan_job
from engine.config.read import (
    Config,
    ConfigError,
    EvaluateConfig,
    load_config,
    load_preset,
    preset_model,
    read_given,
    resolve,
    to_dict,
)
from engine.config.text import read_text
from engine.config.tree import given_settings

GOOD = {"model": "tiny-18b", "data": {"shards": ["some.tar"]}}


def of_arguments(*overrides: str) -> Config:
    return resolve(GOOD, list(overrides))


def of_file(tmp_path: Path, text: str | bytes, *overrides: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(file, ["model=tiny-18b", *overrides])


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        of_arguments(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


WORDS = [
    "0017", "0o17", "0x1f", "0b11", "17", "-3", "+3", "4711_12", "47_1112", "471112", "1e5", "1E5", "1.50", "1.5", ".5",
    "1_0.0", "1,000", "12:30", "190:20:30", "2026-11-29", "2026-11-29T12:30:00Z", "2026-11-29 12:30:00.5", "off",
    "on", "no", "No", "yes", "Y", "n", "true", "False", "None", "none", "nan", ".nan", "inf",
    "-.inf", "=", "<<", "0", "-0", "00", "१२", "a b",
]  # fmt: skip
"""What YAML 1.1 or Python reads as something else than text, and some that it makes equal."""


def test_text_stays_what_was_typed(tmp_path: Path) -> None:
    typed = [of_arguments(f"run_dir={word}").run_dir for word in WORDS]
    assert typed == WORDS  # all different: no two jobs share a folder
    for word in WORDS:
        assert of_file(tmp_path, f"run_dir: {word}\ndata: {{shards: a.tar}}").run_dir == word
        assert of_file(tmp_path, f"run_dir: '{word}'\ndata: {{shards: a.tar}}").run_dir == word
        lists = of_file(tmp_path, f"data:\n  shards:\n  - {word}\n  - b.tar\nphases:\n- name: {word}\n  steps: 3")
        assert lists.data.shards == [word, "b.tar"] and lists.phases[0].name == word


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$~"), min_size=1).filter(str.strip))
def test_any_text_is_its_own_folder(text: str) -> None:
    config = of_arguments(f"run_dir={text}")
    assert config.run_dir == text
    stored = yaml.safe_dump({"run_dir": to_dict(config)["run_dir"]})  # as a run's config.yaml holds it
    assert read_text(stored, "") == {"run_dir": text}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.sampled_from("ab{},.1 []*?'/-"), min_size=1).filter(str.strip), min_size=2, max_size=2, unique=True
    )
)
def test_two_texts_are_two_folders(texts: list[str]) -> None:
    one, other = (of_arguments(f"run_dir={text}").run_dir for text in texts)
    assert one != other


def test_names_of_sources_and_other_texts(tmp_path: Path) -> None:
    config = of_file(
        tmp_path,
        """
        run_dir: 2026-11-29
        init: {vision: 0017, skip: [1e5, null_.*]}
        health: {on_spike: off}
        optim: {lr_vision: 1e-3, lr_text: 1_0.5e-1, warmup_steps: 1e2}
        evaluate: {templates: 'no {}', classes: '', shards: []}
        data:
          sources:
          - {name: 2024, shards: '{0..3}.tar', weight: 1}
          - {name: off, shards: [12:30, 1_1], weight: 2e0}
          mixture_schedule:
          - {at_samples: 1e3, weights: {2024: 0.5, off: 1}}
        """,
    )
    assert config.run_dir == "2026-11-29" and config.init.vision == "0017"
    assert config.init.skip == ["1e5", "null_.*"] and config.health.on_spike == "off"
    assert (config.optim.lr_vision, config.optim.lr_text, config.optim.warmup_steps) == (1e-3, 1.05, 100)
    assert config.evaluate.templates == ["no {}"]
    assert [source.name for source in config.data.sources] == ["2024", "off"]
    assert [source.shards for source in config.data.sources] == [["{0..3}.tar"], ["12:30", "1_1"]]
    (switch,) = config.data.mixture_schedule
    assert (switch.at_samples, switch.weights) == (1000, {"2024": 0.5, "off": 1.0})


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=0017", 17),
        ("train.steps=1_000", 1000),
        ("train.steps=1e5", 100_000),
        ("train.steps= 12 ", 12),
        ("train.seed=-3", -3),
        ("train.logit_scale=1e2", 100.0),
        ("optim.lr_vision=.5", 0.5),
        ("train.logit_scale=null", None),
        ("train.logit_scale=~", None),
        ("train.logit_scale=", None),
        ("init.vision=null", None),
        ("init.vision=off", "off"),
        ("init.vision=None", "None"),
        ("data.shuffle=off", False),
        ("data.shuffle=No", False),
        ("data.shuffle=0", False),
        ("data.flip=yes", True),
        ("health.on_spike=off", "off"),
        ("optim.betas=[9e-1, .95]", [0.9, 0.95]),
        ("optim.trust_max=inf", float("inf")),
        ("parallel.layers=[1, 3]", [1, 3]),
        ("log.timeline_steps=3", [3]),
        ("checkpoint.keep_best=", ""),
        ("evaluate.templates=[]", []),
    ],
)
def test_the_field_decides(override: str, value: Any) -> None:
    extra = ["parallel.pipeline=2"] if "layers" in override else []
    if override.startswith("evaluate"):
        with pytest.raises(ConfigError):  # an empty list is read, and means nothing
            of_arguments(override, "evaluate.every_steps=1", "evaluate.shards=a.tar")
        return
    config: Any = of_arguments(override, *extra)
    for part in override.partition("=")[0].split("."):
        config = getattr(config, part)
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=off", "train.steps is 'off': it takes a whole number"),
        ("train.steps=12:30", "a whole number"),
        ("train.steps=0x10", "a whole number"),
        ("train.steps=1.5", "a whole number"),
        ("train.steps=1e-3", "a whole number"),
        ("train.steps=1e999", "a whole number"),
        ("train.steps=true", "a whole number"),
        ("train.steps=१२", "a whole number"),
        ("train.steps=2026-11-29", "a whole number"),
        ("train.steps=null", "a whole number"),
        ("train.steps=", "a whole number"),
        ("train.logit_scale=None", "write null for none"),
        ("train.logit_scale=nan", "a number"),
        ("train.logit_scale=.inf", "a number"),
        ("train.logit_scale=1e999", "a number"),
        ("optim.lr_vision=1e-3x", "a number"),
        ("optim.lr_vision=[1e-3]", "a number"),
        ("data.shuffle=2", "true or false"),
        ("data.shuffle=maybe", "true or false"),
        ("model=[1]", "'[1]' is not a preset"),
        ("model=17", "'17' is not a preset"),
        ("model=", "'' is not a preset"),
        ("model={vision: 3}", "model.vision is '3'"),
        ("model={vision: [}", "not valid YAML"),
        ("model.vision=3", "model.vision is '3'"),
        ("data.sources=a.tar", "a list of mappings"),
        ("data.sources=[a.tar]", "data.sources[0] is 'a.tar'"),
        ("phases={a: 1}", "a list of mappings"),
        ("optim.betas=[0.9, off]", "optim.betas[1] is 'off'"),
        ("run_dir=", "run_dir is empty"),
        ("run_dir=runs/${JOB}", "nothing replaces ${…}"),
        ("run_dir=~/runs/a", "run_dir is '~/runs/a'"),
        ("--train.steps=3", "no - in front: train.steps=3"),
        ("+train.steps=3", "no + in front"),
    ],
)
def test_what_the_field_cannot_take_is_one_line(override: str, said: str) -> None:
    assert said in refused(override)


def test_values_of_programs_are_typed_too() -> None:
    assert resolve(GOOD | {"run_dir": Path("a/b"), "train": {"steps": 7.0}}, []).train.steps == 7
    for wrong in (datetime.date(2026, 11, 29), 1e5, True, None, ["a"], {"a": "b"}):
        with pytest.raises(ConfigError, match="run_dir"):
            resolve(GOOD | {"run_dir": wrong}, [])


@pytest.mark.parametrize(
    ("value", "shards"),
    [
        ("[/a/{0..3}.tar,/b/{00..11}.tar]", ["/a/{0..3}.tar", "/b/{00..11}.tar"]),
        ("[{a,b}/{0..3}.tar, c.tar,]", ["{a,b}/{0..3}.tar", "c.tar"]),
        ("['a, b.tar', \"c d.tar\"]", ["a, b.tar", "c d.tar"]),
        ("[it's.tar,b.tar]", ["it's.tar", "b.tar"]),
        ("{0..3}.tar", ["{0..3}.tar"]),
        ("{a,b}.tar", ["{a,b}.tar"]),
        ("[v2]/{0..3}.tar", ["[v2]/{0..3}.tar"]),
        ("[v2]/*.[t]", ["[v2]/*.[t]"]),
        ("[0-9]*.tar", ["[0-9]*.tar"]),
        ("[[ab].tar,x[0-9].tar]", ["[ab].tar", "x[0-9].tar"]),
        ("[2026-11-29,0017]", ["2026-11-29", "0017"]),
        ("a.tar,b.tar", ["a.tar,b.tar"]),
        ("s3://b/a?x=1&y={0..3}", ["s3://b/a?x=1&y={0..3}"]),
    ],
)
def test_shards_on_the_command_line(value: str, shards: list[str], tmp_path: Path) -> None:
    assert of_arguments(f"data.shards={value}").data.shards == shards
    evaluated = of_arguments(f"evaluate.shards={value}", "evaluate.every_steps=1")
    assert evaluated.evaluate.shards == shards


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"run_dir: caf\xe9\n", "not UTF-8: byte 0xe9 in line 1"),
        (b"train:\n  steps: 3\n# \xff\n", "byte 0xff in line 3"),
        ("run_dir: a\n".encode("utf-16"), "not UTF-8"),
        (b"run_dir: a\x07\n", "not valid YAML"),
        (b"train: {steps: 3, steps: 4}\n", "'steps' is given twice"),
        (b"train: {steps: 3}\ntrain: {seed: 4}\n", "'train' is given twice"),
        (b"data: {shards: [/a/{0..3}.tar, b.tar]}\n", "wants quotes"),
        (b"data:\n  shards: {0..3}.tar\n", "wants quotes"),
        (b"run_dir: null\n", "run_dir is null: it takes text"),
        (b"run_dir: !!timestamp 2026-11-29\n", "run_dir is datetime.date(2026, 11, 29): it takes text"),
        (b"run_dir: !!python/object:os.system x\n", "not valid YAML"),
        (b"a: &a [*a]\n", "not valid YAML"),
        (b"- a\n", "not a list"),
        (b"just text\n", "not 'just text'"),
        (b"data: {shards: null}\n", "data.shards is null: it takes a list"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        of_file(tmp_path, content)
    message = str(error.value)
    assert str(tmp_path / "config.yaml") in message and said in message and "\n" not in message


def test_what_a_yaml_file_may_hold(tmp_path: Path) -> None:
    marked = "\ufeffrun_dir: größe\ntrain: # nothing is set here\ndata: {shards: a.tar}\n"
    assert of_file(tmp_path, marked).run_dir == "größe"
    reused = "x: &x {steps: 3}\n"
    with pytest.raises(ConfigError, match="x is not a setting"):
        of_file(tmp_path, reused)
    shared = "data: &d {shards: a, frames: 1}\nphases: [{name: a, steps: 2, data: {<<: *d, flip: on, shards: b}}]\n"
    assert of_file(tmp_path, shared).phases[0].data == {"frames": 1, "flip": True, "shards": ["b"]}
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


# --- what was asked for is what is trained ----------------------------------------------------------------------------


FILE = """
model: {embed_dim: 96, backend: auto, vision: {image_size: 48, patch_size: 12, width: 96, post_norm: true}}
data: {shards: a.tar}
train: {steps: 450}
"""


@pytest.mark.parametrize("preset", ["b16", "18b", "tiny-e14", "l14-336"])
def test_a_preset_as_override_replaces_the_whole_model(preset: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in (FILE, FILE.replace("{embed", "{preset: tiny-18b, embed"), "data: {shards: a.tar}"):
        file.write_text(text)
        for spelt in (f"model={preset}", f"model.preset={preset}", f"model={{preset: {preset}}}"):
            assert load_config(file, [spelt]).model == resolve(GOOD | {"model": preset}, []).model
    model = load_config(file, [f"model={preset}", "model.vision.image_size=560", "model.backend=local"]).model
    assert (model.preset, model.vision.image_size, model.backend) == (preset, 560, "local")


def test_one_override_switches_evaluation_off(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    evaluate = "evaluate: {every_steps: 5, shards: held.tar, classes: names.txt, max_samples: 3}\n"
    file.write_text(f"model: tiny-18b\ndata: {{shards: a.tar}}\n{evaluate}")
    assert load_config(file).evaluate.every_steps == 5
    assert load_config(file, ["evaluate=off"]).evaluate == EvaluateConfig()
    with pytest.raises(ConfigError, match=r"evaluate.every_steps is given beside evaluate=off"):
        load_config(file, ["evaluate=off", "evaluate.every_steps=3"])


def test_a_run_that_was_written_down_takes_another_model(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(resolve(GOOD | {"model": "b16"}, []))))
    assert load_config(file).model.vision.width == 768
    assert load_config(file, ["model=tiny-e14"]).model == resolve(GOOD | {"model": "tiny-e14"}, []).model


def test_the_teacher_too(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "objective: mim\nmodel: tiny-18b\ndata: {shards: a}\n"
        "mim: {teacher: t.pt, teacher_model: {embed_dim: 7, vision: {image_size: 56, depth: 3}}, min_block: 2}\n"
    )
    mim = read_given(file, ["mim.teacher_model=tiny-8b"]).tree()["mim"]
    assert mim["teacher_model"] == {"preset": "tiny-8b"} | load_preset("tiny-8b") and mim["teacher"] == "t.pt"


def test_a_preset_is_its_askers_own() -> None:
    mine = load_preset("b16")
    mine["vision"]["width"] = -1
    assert load_preset("b16")["vision"]["width"] == preset_model("b16").vision.width > 0


def test_a_phase_takes_a_whole_preset() -> None:
    phases = [{"name": "a", "steps": 2}, {"name": "b", "steps": 2, "model": "tiny-18b"}]
    tree = GOOD | {"model": {"preset": "tiny-18b", "vision": {"image_size": 28}}, "phases": phases}
    config = resolve(tree | {"checkpoint": {"every_steps": 1}}, [])
    assert [phase.config.model.vision.image_size for phase in plan_job(config).phases] == [28, 56]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [f"data.shards=/d/{n:05d}.tar" for n in range(8)],
            "data.shards is given 8 times, /d/00000.tar to /d/00007.tar: the shell has expanded an unquoted pattern, "
            "and only the last value would count; quote it: '/d/{00000..00007}.tar'",
        ),
        ([f"data.shards=/d/{n}.tar" for n in range(8, 12)], "'/d/{8..11}.tar'"),
        ([f"data.shards=/d/{n:05d}.tar" for n in range(10, 13)], "'/d/{00010..00012}.tar'"),
        ([f"data.shards=/d/{n}.tar" for n in ("cat", "dog")], "'/d/{cat,dog}.tar'"),
        (["train.steps=3", "train.seed=1", "train.steps=4"], "train.steps is given twice"),
        (["train.steps=3", "train.steps=3"], "train.steps is given twice (3, 3)"),
        (["model=b16", "model=l14"], "model is given twice"),
        (["model=b16", "model.preset=l14"], "model is given twice"),
        (["mim.teacher_model=b16", "mim.teacher_model.preset=l14"], "mim.teacher_model is given twice"),
        (["train={steps: 3}", "train.steps=4"], "train.steps is given beside train={steps: 3}"),
        (["data.shards=a.tar", "b.tar"], "to name several shards, give a list"),
    ],
)
def test_a_key_given_twice_is_an_error_that_says_why(overrides: list[str], said: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: tiny-18b\n")
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_says_on_which_side_it_is(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train: {steps: soon}\n")
    with pytest.raises(ConfigError, match=rf"^{file}: train.steps is 'soon'"):
        load_config(file)
    file.write_text("train: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"^command line: train\.steps is 'soon'"):
        load_config(file, ["train.steps=soon"])


def test_what_is_inherited_is_said(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(FILE + "optim: {lr_vision: 5e-3, warmup_steps: 20, eps: 1e-6}\ncheckpoint: {keep_last: 1}\n")
    lines = origin(read_given(file, ["model=b16", "model.vision.image_size=112", "train.steps=9", "data.shards=b.tar"]))
    assert lines == [
        f"the model of {file} (embed_dim, backend, vision) is replaced by the preset b16",
        "command line: model.preset=b16, model.vision.image_size=112, train.steps=9, data.shards=[b.tar]",
        f"inherited from {file}: optim.lr_vision=0.005, optim.warmup_steps=20, checkpoint.keep_last=1",
    ]
    assert origin(read_given(file, []))[0].startswith(f"inherited from {file}: data.shards=[a.tar], train.steps=450")


def test_explicit_keys_beside_a_preset_are_named() -> None:
    own = {"preset": "b16", "embed_dim": 96, "backend": "auto", "vision": {"width": 96, "image_size": 224}}
    assert model_in_words(resolve(GOOD | {"model": "b16"}, []).model) == "b16"
    assert model_in_words(resolve(GOOD | {"model": own | {"vision": {"width": 768}}}, []).model) == (
        "b16 with embed_dim 96 instead of 512"
    )
    mixed = resolve(GOOD, ["model={preset: l14, vision: {rope: false}, text: {depth: 3}}"]).model
    assert model_in_words(mixed) == "l14 with vision.rope False instead of True, text.depth 3 instead of 12"
    plain = {"vision": {"depth": 3, "width": 64}, "text": {"depth": 2}}
    assert model_in_words(resolve(GOOD | {"model": plain}, []).model) == (
        "own model (3 x 64 image tower, 2 x 512 text tower)"
    )


def _heads(*arguments: str) -> tuple[int, list[str]]:
    file = {"model": {"vision": {"width": 96, "head_width": 24}}, "data": {"shards": ["a.tar"]}}
    vision = resolve(file, list(arguments)).model.vision
    return vision.head_width, [
        line for line in origin(given_settings(file, arguments, "run.yaml")) if "head_width is" in line
    ]


def test_a_width_alone_keeps_as_many_heads_and_says_so() -> None:
    head_width, lines = _heads("model.vision.width=256")
    assert head_width == 64
    assert lines == [
        "model.vision.head_width is 64: 24 does not divide model.vision.width=256 of the command line, and the 4 heads "
        "stay as many"
    ]
    assert _heads("model=18b", "model.vision.width=5000")[0] == 125  # 40 heads, the preset's
    assert _heads("model.vision.width=192") == (24, []), "what divides stays as it is"
    assert _heads("model.vision.width=256", "model.vision.head_width=32") == (32, [])


@pytest.mark.parametrize("more", ["model.vision.width=250", "model.vision.width=2"])
def test_a_width_that_no_heads_divide_is_refused(more: str) -> None:
    with pytest.raises(ConfigError, match=r"width \d+ is not a multiple of model\.vision\.head_width 24"):
        _heads(more)


def test_a_file_that_does_not_fit_is_refused_as_it_is() -> None:
    with pytest.raises(ConfigError, match="is not a multiple"):
        resolve({"model": {"vision": {"width": 256, "head_width": 24}}, "data": {"shards": ["a.tar"]}}, [])
