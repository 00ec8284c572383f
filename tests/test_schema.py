"""Results name their kind and version: writers check them, readers refuse or migrate the others."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from svf_lightning import schema
from svf_lightning.analysis import tables
from svf_lightning.cli import app
from svf_lightning.data.protocol import Protocol
from svf_lightning.runs.results import environment

EARLIER = Path(__file__).parent / "runs" / "earlier_run" / "metrics.json"
SCHEMA = json.loads(schema.FILE.read_text())


@pytest.fixture
def content():
    """A whole result, without the name of its schema."""
    return json.loads(EARLIER.read_text())


def evaluation(content):
    row = {key: content[key] for key in ("miou", "fb_iou", "class_iou", "seed")}
    shared = {key: content[key] for key in SCHEMA["$defs"]["environment"]["required"]}
    seeds = [{**row, "seconds": 0.5}]
    return {"miou_mean": 0.5, "miou_std": 0.0, "protocol": content["protocol"], "seeds": seeds, **shared}


def test_results_of_a_machine_without_git_fit(content, monkeypatch):
    monkeypatch.setenv("PATH", "")
    here = environment()
    assert here["commit"] is here["uncommitted_changes"] is None
    schema.checked({**content, **here}, "metrics", "metrics.json")


def test_the_schema_is_sound_and_knows_the_protocol():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    fields = [field.name for field in dataclasses.fields(Protocol)]
    assert (
        SCHEMA["$defs"]["protocol"]["required"] == fields == list(SCHEMA["$defs"]["protocol"]["properties"])
    )


def test_what_is_written_names_its_schema_first_and_validates_with_the_shipped_file(content):
    for kind, result in (("metrics", content), ("evaluation", evaluation(content))):
        written = schema.checked(result, kind, f"{kind}.json")
        assert next(iter(written.items())) == ("schema", f"svf_lightning {kind} 1")
        jsonschema.validate(written, SCHEMA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("protocol"), r"'protocol' is a required property"),
        (lambda r: r.pop("commit"), r"'commit' is a required property"),
        (lambda r: r.update(miou=41.2), r"miou: 41.2 is more than 1"),
        (lambda r: r.update(miou=float("nan")), r"miou: nan is more than 1"),
        (lambda r: r.update(miou="0.4"), r"miou: '0.4' is not of type 'number'"),
        (lambda r: r["class_iou"].update(bird=-0.1), r"class_iou.bird: -0.1 is less than the minimum of 0"),
        (lambda r: r["protocol"].update(episodes="many"), r"protocol.episodes: 'many' is not of type"),
        (lambda r: r["identity"].pop("fold"), r"identity: 'fold' is a required property"),
        (lambda r: r["config"].pop("finetune"), r"config: 'finetune' is a required property"),
    ],
)
def test_a_result_that_does_not_fit_is_not_written(content, change, message):
    change(content)
    with pytest.raises(
        ValueError, match=rf"run/metrics.json does not fit 'svf_lightning metrics 1': {message}"
    ):
        schema.checked(content, "metrics", "run/metrics.json")


def test_what_was_written_is_read_back(content, tmp_path):
    written = schema.checked(content, "metrics", "x")
    (tmp_path / "metrics.json").write_text(json.dumps(written))
    assert schema.read(tmp_path / "metrics.json", "metrics") == written
    assert tables.read_results(tmp_path) == [{**written, "run": tmp_path.name}]


def test_a_file_of_before_versions_is_migrated_and_reported(tmp_path):
    shutil.copytree(EARLIER.parent, tmp_path / "run")
    (result,) = tables.read_results(tmp_path)
    assert (result["schema"], result["migrated"]) == ("svf_lightning metrics 1", True)
    assert result["miou"] == json.loads(EARLIER.read_text())["miou"]
    printed = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert printed.exit_code == 0, printed.output
    assert "9.94" in printed.output


def test_migrating_leaves_what_names_its_version(content):
    written = schema.checked(content, "metrics", "x")
    assert schema.migrate(copy.deepcopy(written), "metrics") == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"schema": "svf_lightning metrics 2", "miou": 1}',
            "a result of 'svf_lightning metrics 2', but .* update",
        ),
        ('{"schema": "svf_lightning evaluation 1"}', "a result of 'svf_lightning evaluation 1', but"),
        ('{"schema": 7}', "a result of 7, but 'svf_lightning metrics 1'"),
        ('{"miou": 0.5', r"metrics.json is not a whole metrics.json \("),
        ('{"miou": 0.5}', "does not fit .* is a required property"),
        ('{"schema": "svf_lightning metrics 1", "miou": 0.5}', "does not fit .* is a required property"),
        ("[1]", r"does not fit .*: \[1\] is not of type 'object'"),
    ],
)
def test_other_versions_kinds_and_broken_files_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        tables.read_results(tmp_path)
    assert str(tmp_path / "run" / "metrics.json") in str(raised.value)
