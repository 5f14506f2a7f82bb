import pytest
from tokar.conf.compose import compose, differences, flatten, unchecked
from tokar.conf.schema import SCHEMAS
from tokar.errors import ConfigError, UserError

RECIPE = "experiment=digits_classifier"


def problems(stage, *overrides):
    with pytest.raises(ConfigError) as caught:
        compose(stage, overrides)
    for line in caught.value.lines:
        assert "\n" not in line
        assert "Traceback" not in line
    return caught.value.lines


def test_a_recipe_composes():
    composed = compose("classifier", [RECIPE, "optim.lr=3e-4"])
    assert composed.typed.optim.lr == 3e-4
    assert composed.typed.experiment == "digits_classifier"
    assert "lr: 0.0003" in composed.yaml()


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_misspelt_keys_are_refused_with_the_nearest_name_also_behind_plus(prefix):
    assert problems("classifier", RECIPE, f"{prefix}optim.lrr=1") == ["optim.lrr: no such key; did you mean 'lr'?"]


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_misspelt_groups(prefix):
    assert problems("classifier", RECIPE, f"{prefix}optm=adam") == ["optm: no such key; did you mean 'optim'?"]


def test_a_misspelt_option_hides_no_other_problem_and_invents_none():
    assert problems("classifier", "experiment=digits_clasifier", "seed=-1") == [
        "experiment=digits_clasifier: no such option; did you mean 'digits_classifier'?",
        "seed: must be greater than or equal to 0, not -1",
    ]


@pytest.mark.parametrize("value", ["3", "[adam]"])
def test_a_group_takes_only_its_options(value):
    (line,) = problems("classifier", RECIPE, f"optim={value}")
    assert "no such option" in line
    assert "adam" in line


def test_all_problems_at_once():
    lines = problems(
        "classifier", RECIPE, "sed=1", "loop.batch_size=x", "optim.lr=-1", "strategy=dp", "foo", "classifier.wdth=3"
    )
    starts = ["strategy=dp:", "foo:", "sed:", "loop.batch_size:", "optim.lr:", "classifier.wdth:"]
    assert sorted(line.split(" ")[0] for line in lines) == sorted(starts)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("loop.batch_size=x", "loop.batch_size: must be a whole number, not 'x'"),
        ("loop.batch_size=0", "loop.batch_size: must be greater than 0, not 0"),
        ("optim.lr=ten", "optim.lr: must be a number, not 'ten'"),
        ("optim.betas=[0.9,1.5]", "optim.betas.1: must be less than or equal to 1, not 1.5"),
        ("data.flip=perhaps", "data.flip: must be true or false, not 'perhaps'"),
        ("schedule.kind=cos", "schedule.kind: must be 'constant', 'cosine', 'linear', 'wsd' or 'drops', not 'cos'"),
        ("loop=3", "loop: must be a group of keys, not 3"),
        ("loop.duration=3 weeks",
         """loop.duration: '3 weeks' is not a duration; write 2000, "2k steps", "500k samples" or "3 epochs\""""),
        ("classifier.width=-1", "classifier.width: must be greater than 0, not -1"),
        ("classifier.wdth=1", "classifier.wdth: no such key; did you mean 'width'?"),
        ("classifier._target_=tokar.models.classifier.Clasifier",
         "classifier._target_: no 'Clasifier' in tokar.models.classifier; did you mean 'Classifier'?"),
        ("classifier._target_=tokar.models.classfier.Classifier",
         "classifier._target_: no module 'tokar.models.classfier'; did you mean 'tokar.models.classifier'?"),
        ("classifier=null", "classifier: must be a group of keys, not None"),
        ("optim.lr=1,2", "optim.lr=1,2: several values; add --multirun or quote the value"),
        ("optim.lr=${optim.rate}", "optim.lr: Interpolation key 'optim.rate' not found; correct the ${…} or give a value"),
        ("optim.lr=${oc.env:TOKAR_NOPE}",
         "optim.lr: \"Environment variable 'TOKAR_NOPE' not found\"; correct the ${…} or give a value"),
        ("foo", "foo: not an override; write key=value"),
        ("=3", "=3: cannot be read; write key=value"),
        ("data.path=(x)", "data.path=(x): cannot be read; quote it: \"data.path='…'\""),
        ("~sed", "~sed: no such key; nothing to delete, leave it out"),
        ("~optim.lr", "optim.lr: missing; give it a value with optim.lr=…"),
        ("~optim.clip=3", "~optim.clip: its value is 1.0; delete it with ~optim.clip"),
        ("tokenizer=vqgan", "tokenizer: no such group in this command; choose one of: classifier, data, experiment, "
                            "logger, optim, schedule, strategy"),
        ("stage=tokenizer", "stage: is 'tokenizer' here, not 'classifier'; leave it to the command"),
        ("hydra.run.dir=x", "hydra.run.dir=x: only sweeps take keys of Hydra; add --multirun or leave it out"),
        ("strategy.devices=2", "strategy.name: single uses one device, not 2; set strategy=ddp"),
    ],
)  # fmt: skip
def test_each_mistake_has_one_line(override, line):
    assert problems("classifier", RECIPE, override) == [line]


def test_windows_of_the_profiler_do_not_overlap():
    line = "profile.every: a window of 5 steps is not over by then; raise it to 5 or more"
    assert problems("classifier", RECIPE, "profile.steps=5", "profile.every=4") == [line]


def test_a_component_cannot_be_left_out_or_be_a_number():
    lines = problems("tokenizer", "loop.duration=1", "tokenizer/quantizer=null", "tokenizer.decoder=3")
    fix = "choose an option of its group, or give a _target_"
    assert lines == [
        f"tokenizer.decoder: must be a component, not 3; {fix}",
        f"tokenizer.quantizer: must be a component, not None; {fix}",
    ]


def test_missing_values_are_named_once():
    assert problems("classifier") == ["loop.duration: missing; give it a value with loop.duration=…"]
    assert problems("sample") == ["model: missing; give it a value with model=…"]


def test_an_experiment_of_another_stage_is_told_with_the_right_command():
    assert problems("tokenizer", RECIPE) == [
        f"{RECIPE}: is for the stage 'classifier', not 'tokenizer'; run `tokar train classifier {RECIPE}`"
    ]


def test_optional_groups_can_be_left_out():
    typed = compose("tokenizer", ["discriminator=null", "ema=null", "loop.duration=1"]).typed
    assert typed.discriminator is None
    assert typed.ema is None
    assert problems("tokenizer", "loop.duration=1", "optim@discriminator_optim=null") == [
        "discriminator_optim: must be a group of keys, not None"
    ]


def test_plus_does_no_harm_to_what_exists():
    typed = compose("classifier", [RECIPE, "+optim=adam", "++loop.batch_size=8", "+seed=3"]).typed
    assert (typed.optim.name, typed.loop.batch_size, typed.seed) == ("adam", 8, 3)


def test_one_value_has_one_spelling():
    composed = [compose("classifier", [RECIPE, text]) for text in ("optim.lr=1e-3", "+optim.lr=0.001", "++optim.lr=0.0010")]
    assert {each.overrides for each in composed} == {(RECIPE, "optim.lr=0.001")}


@pytest.mark.parametrize("value", ["runs/a-optim.lr=1e-3", "~/x", "é ü", "s3://bucket/x?y=1"])
def test_paths_that_hydras_grammar_cannot_read_are_taken_as_they_are(value):
    assert compose("classifier", [RECIPE, f"data.path={value}"]).typed.data.path == value


def test_no_such_stage():
    with pytest.raises(UserError, match="did you mean 'tokenizer'"):
        compose("tokeniser", [])


@pytest.mark.parametrize("stage", SCHEMAS)
def test_every_root_config_fits_its_schema_but_for_what_is_missing(stage):
    plain, _ = unchecked(stage, [])
    missing = {path for path, value in flatten(plain).items() if value == "???"}
    if missing:
        told = {line.split(":")[0] for line in problems(stage)}
        assert told - {"codes.tokenizer"} == missing
    else:
        assert compose(stage, []).typed.stage == stage


def test_a_key_that_came_with_a_newer_version_does_not_make_another_config():
    old, new = {"optim": {"lr": 1.0}, "discriminator": None}, {"optim": {"lr": 1.0, "rotate": False}, "discriminator": None}
    assert differences(new, old) == []
    assert differences(new, old, ["optim.rotate"]) == ["optim.rotate: None → False"]
    assert differences(new, old, ["optim"]) == ["optim.rotate: None → False"]


def test_a_part_put_in_or_taken_out_makes_another_config():
    without, with_one = {"discriminator": None}, {"discriminator": {"width": 8}}
    assert differences(with_one, without) == ["discriminator.width: None → 8"]
    assert differences(without, with_one) == ["discriminator.width: 8 → None"]
    assert differences({"seed": 1}, {"seed": 0}) == ["seed: 0 → 1"]
