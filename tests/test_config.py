"""`UnlearnConfig`: the contract's defaults, checks that name the field, YAML, the recipe."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterase.config import (
    BOOKKEEPING,
    COMMAND_KEYS,
    FREE,
    UnlearnConfig,
    describe_recipe,
    field_names,
    format_yaml,
    read_yaml,
)
from fasterase.errors import InputError
from fasterase.option_values import describe_type, parse_value

DEFAULTS = (
    "forget_weight=3.0 retain_weight=1.0 consistency_weight=3.0 anchor_weight=30.0 "
    "forget_loss='similarity' floor='auto' cross_weight='auto' forget_augment=True "
    "forget_words=True negatives='own' epochs='auto' max_steps=None max_damage=0.03 "
    "batch_size=256 forget_batch_size=64 micro_batch_size=None thorough=False "
    "stop_when_forgotten=False lr='auto' optimizer='adamw' betas=(0.9, 0.98) "
    "weight_decay=0.0 warmup_steps=0 schedule='constant' max_grad_norm=1.0 tune='all' "
    "train_logit_scale=False train_mode=False precision='auto' "
    "activation_checkpointing=False prefix_cache=None backend='auto' device=None "
    "deepspeed=None seed=0 num_workers=0 progress=True reference_cache=None output_dir=None "
    "save_every=None resume='auto' evaluation='quick' max_skipped=0.01 remember_erased=True "
    "report_to=None rank_timeout=60.0 erase='concept'"
)


def test_defaults_are_the_contract():
    shown = " ".join(f"{name}={value!r}" for name, value in vars(UnlearnConfig()).items())
    assert shown == DEFAULTS


def test_towers_are_crossed_unless_the_text_tower_is_the_original_s():
    numbers = {"lr": 1e-5, "epochs": 1}
    for weight, options in (
        (1.0, {}),
        (1.0, {"tune": "text"}),
        (1.0, {"tune": "lora:8"}),
        (0.0, {"tune": "image"}),
        (0.5, {"tune": "last:1", "cross_weight": 0.5}),
        (0.0, {"forget_weight": 0.0, **numbers}),
        (0.0, {"forget_loss": "contrastive", **numbers}),
    ):
        assert UnlearnConfig(**options).used_cross_weight == weight, options


def test_cliperase_is_the_paper_and_takes_overrides():
    paper, default = UnlearnConfig.cliperase(), UnlearnConfig().to_dict()
    differs = {name: v for name, v in paper.to_dict().items() if v != default[name]}
    assert ", ".join(f"{name}={value}" for name, value in differs.items()) == (
        "anchor_weight=0.0, floor=None, cross_weight=0.0, forget_augment=False, "
        "forget_words=False, epochs=20, batch_size=16, forget_batch_size=16, lr=1e-06, "
        "optimizer=adam, max_grad_norm=None"
    )
    assert UnlearnConfig.cliperase(lr=1e-8) == paper.replace(lr=1e-8)


BAD = {
    "forget_weight": [-1.0, "heavy", float("nan"), True],
    "forget_loss": ["cosine"],
    "floor": [1.5, "high", float("inf")],
    "forget_augment": [1],
    "forget_words": [[], ["7"], [7], "octopus", 1],
    "negatives": ["both"],
    "epochs": [0, 1.5, "never", True],
    "max_steps": [0],
    "batch_size": [0],
    "forget_batch_size": [0],
    "micro_batch_size": [0],
    "lr": [0.0, "automatic"],
    "max_damage": [-0.1, 1.1],
    "optimizer": ["sgd"],
    "betas": [(0.9,), (0.9, 1.0), 0.9],
    "max_grad_norm": [0.0],
    "tune": ["auto", "middle", "last", "last:0"],
    "precision": ["fp8"],
    "backend": ["cuda"],
    "device": [0],
    "deepspeed": [3],
    "seed": [-1],
    "save_every": [0],
    "resume": [True],
    "evaluation": ["thorough"],
    "max_skipped": [1.5],
    "report_to": ["mlflow"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(InputError, match=re.escape(f"{field}={value!r} ")):
        UnlearnConfig(**{field: value})


def test_contradictions_are_refused():
    with pytest.raises(InputError, match="forget_weight, retain_weight and consistency_weight"):
        UnlearnConfig(forget_weight=0, retain_weight=0, consistency_weight=0)
    with pytest.raises(InputError, match="floor"):
        UnlearnConfig(forget_loss="contrastive", floor=0.1)


def test_a_thorough_run_needs_cross_terms_and_an_end_of_its_own():
    assert UnlearnConfig(thorough=True).thorough
    for field, value in (
        *(("max_steps", 3), ("epochs", 3), ("tune", "text"), ("tune", "image")),
        ("cross_weight", 0.0),
    ):
        with pytest.raises(InputError, match=r"^thorough=True must be False"):
            UnlearnConfig(thorough=True, **{field: value})


@pytest.mark.parametrize(
    ("automatic", "named"),
    [
        ({}, "lr='auto' and epochs='auto'"),
        ({"epochs": 3}, "lr='auto'"),
        ({"max_steps": 3}, "lr='auto'"),
        ({"lr": 1e-5}, "epochs='auto'"),
    ],
)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"schedule": "cosine"}, "^schedule='cosine' must be 'constant' with {}; or give numbers"),
        ({"warmup_steps": 5}, "^warmup_steps=5 must be 0 with {}; or give numbers"),
        ({"forget_loss": "contrastive"}, "^forget_loss='contrastive' has no end that {} could"),
        ({"floor": None}, "^floor=None has no end that {} could aim at. Give numbers for lr and"),
        ({"forget_weight": 0.0}, "^forget_weight=0 with {}: nothing is forgotten. Give numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_automatic_recipe_goes_with_its_own_loss_and_schedule_only(
    automatic, named, option, message
):
    with pytest.raises(InputError, match=message.format(named)):
        UnlearnConfig(**automatic, **option)
    UnlearnConfig(**{"lr": 1e-5, "epochs": 3, **option})


def test_values_are_converted():
    config = UnlearnConfig(lr="1e-6", floor=0, betas=[0, "0.5"], output_dir=Path("out"))
    assert config.lr == 1e-6
    assert isinstance(config.floor, float)
    assert config.betas == (0.0, 0.5)
    assert config.output_dir == "out"


def test_unknown_option_gets_a_suggestion():
    for make in (UnlearnConfig.cliperase, UnlearnConfig().replace):
        with pytest.raises(InputError, match="`learning_rate`"):
            make(learning_rate=1)
        with pytest.raises(InputError, match="Did you mean epochs"):
            make(epoch=1)


def test_replace_changes_a_copy():
    config = UnlearnConfig()
    assert (config.replace(lr=1.0).lr, config.lr) == (1.0, "auto")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]


@pytest.fixture
def from_text(tmp_path):
    """Reads a configuration from a file with some text; None: there is no file."""

    def read(text, **options):
        file = tmp_path / "erase.yaml"
        if text is not None:
            file.write_text(text, encoding="utf-8")
        return UnlearnConfig.from_yaml(file, **options)

    return read


def test_yaml(from_text):
    expected = UnlearnConfig(lr=1e-6, epochs=3, floor=None, betas=(0.9, 0.95), seed=3)
    text = "lr: 1e-6\nepochs: 3\nfloor: null\nbetas: [0.9, 0.95]\n"
    assert from_text(text, seed=3) == expected
    assert from_text("") == UnlearnConfig()
    for word in ("none", "None", "null", "~"):
        assert from_text(f"evaluation: {word}\n").evaluation is None
    for_commands = "".join(f"{name}: x\n" for name in COMMAND_KEYS if name != "recipe")
    config = from_text(f"{for_commands}recipe: cliperase\nlr: 1e-7\n", seed=3)
    assert config == UnlearnConfig.cliperase(lr=1e-7, seed=3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lr: [", "YAML"),
        ("- lr", "mapping"),
        ("rate: 1", "`rate`"),
        ("1: 2", "`1`"),
        ("recipe: paper", r"recipe='paper'.*'cliperase'"),
        (None, r"erase\.yaml"),
    ],
)
def test_wrong_yaml(text, named, from_text):
    with pytest.raises(InputError, match=named):
        from_text(text)


def test_recipes_are_named_by_what_they_differ_in():
    for config, expected in (
        (UnlearnConfig(), "fasterase defaults"),
        (UnlearnConfig(lr=1e-4, output_dir="x"), "fasterase defaults; lr=0.0001"),
        (UnlearnConfig.cliperase(), "cliperase (the paper's)"),
        (UnlearnConfig.cliperase(epochs=5), "cliperase (the paper's); epochs=5"),
    ):
        assert describe_recipe(config) == expected


def test_what_is_no_part_of_the_recipe_may_change_on_resume():
    assert {"output_dir", "progress"} <= set(field_names(BOOKKEEPING)) <= set(field_names(FREE))
    assert not {"lr", "seed", "batch_size"} & set(field_names(FREE))


def test_yaml_is_read_back_as_it_was_written(tmp_path):
    values = {**UnlearnConfig(floor=None, lr=1e-7, epochs=3).to_dict(), "forget": "größe.csv"}
    file = tmp_path / "erase.yaml"
    file.write_text(format_yaml(values), encoding="utf-8")
    assert read_yaml(file) == values
    assert list(read_yaml(file)) == list(values)


def test_a_home_folder_is_found():
    config = UnlearnConfig(output_dir="~/runs", reference_cache="~nobody knows/x")
    assert config.output_dir == os.path.expanduser("~/runs") != "~/runs"
    assert config.reference_cache == "~nobody knows/x"


def test_containers_and_paths_are_converted():
    several = list[str] | dict[str, str]
    for value in (["a", "b"], {"a": "b"}):
        assert parse_value("name", value, several) == value
    assert parse_value("name", (1, "2"), tuple[float, float]) == (1.0, 2.0)
    assert parse_value("name", Path("x"), str | None) == "x"
    for value, hint, expected in (
        ([1], several, "a list or a dict"),
        (10**400, float, "a finite number"),
        (True, int | None, "a whole number or None"),
    ):
        assert describe_type(hint) == expected
        with pytest.raises(InputError, match=rf"^name=.*expected {expected}"):
            parse_value("name", value, hint)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.floats())


@settings(deadline=None)
@given(name=st.sampled_from(field_names()), value=VALUES)
def test_any_value_is_taken_or_refused_by_name(name, value):
    try:
        config = UnlearnConfig(**{name: value})
    except InputError as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert UnlearnConfig(**config.to_dict()) == config
