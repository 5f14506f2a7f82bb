import pytest
from tokar.conf.compose import compose, groups
from tokar.errors import ConfigError, UserError
from tokar.slurm.pipeline import chain


def links(*overrides, name="digits", asked=("cluster=cpu",)):
    config = compose("slurm", [f"pipeline={name}", *asked]).typed
    return {link.job.name: link for link in chain(name, config, overrides, ["slurm", "pipeline"])}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def words(link):
    return [" ".join(task.words) for task in link.tasks]


def test_each_task_is_given_the_folders_of_those_before_it():
    found = links()
    assert list(found) == ["digits-tokenizer", "digits-encode", "digits-generator", "digits-evaluate"]
    assert words(found["digits-encode"])[0].startswith("encode model=runs/digits-tokenizer out=runs/digits-tokenizer/codes")
    generator = words(found["digits-generator"])[0]
    assert "codes.path=runs/digits-tokenizer/codes codes.tokenizer=runs/digits-tokenizer" in generator
    assert generator.endswith("strategy=ddp strategy.nodes=1 strategy.devices=2 name=digits-generator")
    judge, reconstruction, samples, report = words(found["digits-evaluate"])
    assert judge.endswith("name=digits-judge")
    assert reconstruction == "evaluate target=runs/digits-tokenizer features.path=runs/digits-judge"
    assert samples == "evaluate target=runs/digits-generator features.path=runs/digits-judge"
    assert report == "report runs/digits-tokenizer runs/digits-generator runs/digits-judge runs/digits-evaluate/report.html"


def test_an_override_of_one_task_names_it_and_those_after_it():
    found = links("generator:optim.lr=1e-3", "paths.datasets=elsewhere")
    assert [str(link.folder) for link in found.values()] == [
        "runs/digits-tokenizer", "runs/digits-tokenizer/codes", "runs/digits-generator-optim.lr=1e-3",
        "runs/digits-evaluate-optim.lr=1e-3",
    ]  # fmt: skip
    assert "optim.lr" not in words(found["digits-tokenizer"])[0]
    assert all("paths.datasets=elsewhere" in line for link in found.values() for line in words(link)[:1])


def test_a_mistake_in_a_later_job_is_told_before_the_first_is_submitted():
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        links("generator:optim.lr=fast")
    with pytest.raises(UserError, match=r"no task 'generater'.*did you mean 'generator'"):
        links("generater:optim.lr=1")


@pytest.mark.parametrize("name", groups()["pipeline"])
def test_every_pipeline_is_sound(name):
    assert links(name=name, asked=())


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ({"name": "a", "tasks": {"t": "evaluate target={tok}"}}, "pipeline: a: no earlier task 'tok'"),
        ({"name": "a", "tasks": {"t": "trian x=1"}}, "pipeline: trian: no such stage"),
        ({"name": "a", "tasks": {"t": "classifier experiment=digits_classifier"}, "cluster": {"gpus": 1}},
         r"pipeline: a: cluster\.gpus: no such key"),
    ],
)  # fmt: skip
def test_a_broken_pipeline_is_told(step, line):
    typed = compose("slurm", ["pipeline=digits", "cluster=cpu"]).typed
    broken = typed.model_validate({**typed.model_dump(), "pipeline": {"steps": [step]}})
    with pytest.raises(UserError, match=line):
        list(chain("broken", broken, [], []))
