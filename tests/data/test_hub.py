"""Data sets of the Hub, read from a cache that `datasets` itself writes."""

import io
import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cogumi.cli.main import app
from cogumi.core.errors import DataError, RecipeError
from cogumi.data.sources.question_files import iterate, load
from cogumi.data.sources.survey import survey
from cogumi.grading.tool_calls import calls_of
from cogumi.pipeline.adopted_recipe import Adoption, head
from cogumi.pipeline.fingerprint import plan
from cogumi.pipeline.plan.recipe_plan import plan as plan_costs
from cogumi.pipeline.recipe import parse_recipe

datasets = pytest.importorskip("datasets")
TOTAL = Path("hub:Owner/TwoSums/main/train")


class Sums(datasets.GeneratorBasedBuilder):
    """A data set of sums with the splits train and test; `BUILDER_CONFIGS` are given by the test."""

    def _info(self):
        return datasets.DatasetInfo()

    def _split_generators(self, manager):
        return [datasets.SplitGenerator(name=name, gen_kwargs={"name": name}) for name in ("train", "test")]

    def _generate_examples(self, name):
        for i in range(30):
            yield i, {"question": f"{i} + 1? ({name} of {self.config.name}, {self.hash[:1]})", "answer": str(i + 1)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Downloads a configuration in a revision, as `load_dataset` would."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def download(configuration, revision, age=0):
        builder = Sums(dataset_name="TwoSums", repo_id="Owner/TwoSums", config_name=configuration, hash=revision)
        builder.download_and_prepare()
        info = Path(builder.cache_dir) / "dataset_info.json"
        os.utime(info, (2e9 - age, 2e9 - age))

    return download


def questions(path):
    examples, rejected = load(path)
    assert not rejected
    return [example.messages[0].content for example in examples]


def test_rows_of_a_split(cache):
    cache("main", "a" * 40)
    examples, rejected = load(TOTAL)
    assert (len(examples), len(rejected)) == (30, 0)
    assert examples[3].messages[0].content == "3 + 1? (train of main, a)"
    assert (examples[3].answer, examples[3].source) == ("4", "two_sums-train.arrow:4")
    assert "test of main" in questions(Path("hub:Owner/TwoSums/main/test"))[0]
    (found,) = survey([TOTAL]).domains
    assert (found.name, found.rows, found.grader) == ("TwoSums", 30, "numeric")


def test_look_calls_a_data_set_by_its_id(cache):
    cache("main", "a" * 40)
    done = CliRunner().invoke(app, ["data", "look", str(TOTAL), "--json"])
    (found,) = json.loads(done.stdout)
    assert (found["path"], found["rows"], found["domains"]) == (str(TOTAL), 30, {"TwoSums": 30})
    assert str(TOTAL) in CliRunner().invoke(app, ["data", "look", str(TOTAL)]).stdout


def recipe(folder, path=TOTAL):
    steps = [
        f"{{name: pool, stage: load, config: {{files: {{sums: ['{path}']}}}}}}",
        f"{{name: clean, stage: decontaminate, inputs: {{pool: pool}}, config: {{files: ['{path}']}}}}",
    ]
    return parse_recipe("name: r\nseed: 1\nsteps:\n" + "".join(f"  - {s}\n" for s in steps), "r.yaml", folder)


def test_the_newest_revision_is_read_and_identifies_the_step(cache, tmp_path):
    cache("main", "a" * 40, age=10)
    before = [step.fingerprint for step in plan(recipe(tmp_path))]
    assert [step.fingerprint for step in plan(recipe(tmp_path))] == before
    cache("main", "b" * 40)
    assert questions(TOTAL)[0].endswith("(train of main, b)")
    after = [step.fingerprint for step in plan(recipe(tmp_path))]
    assert not set(before) & set(after)
    cache("main", "c" * 40, age=20)
    assert [step.fingerprint for step in plan(recipe(tmp_path))] == after


def test_what_is_left_out_must_be_clear(cache):
    cache("main", "a" * 40)
    for name in ("hub:Owner/TwoSums", "hub:Owner/TwoSums/main"):
        with pytest.raises(DataError) as error:
            load(Path(name))
        assert str(error.value) == (
            f"{name} has several splits: name one of hub:Owner/TwoSums/main/test, hub:Owner/TwoSums/main/train"
        )
    with pytest.raises(DataError, match="has no such split; it has hub:Owner/TwoSums/main/test, "):
        load(Path("hub:Owner/TwoSums/main/dev"))
    cache("more", "a" * 40)
    with pytest.raises(DataError, match="has several configurations: name one of hub:Owner/TwoSums/main, hub:Owner/Tw"):
        load(Path("hub:Owner/TwoSums"))


def test_a_data_set_that_is_not_in_the_cache_names_the_command(cache, tmp_path):
    with pytest.raises(DataError) as error:
        load(TOTAL)
    assert str(error.value) == (
        f"{TOTAL} is not in the cache of `datasets`; where the Hub can be reached, run python -c "
        "\"import datasets; datasets.load_dataset('Owner/TwoSums', 'main')\", and copy "
        f"{tmp_path / 'cache' / 'Owner___two_sums'} from there"
    )
    cache("more", "a" * 40)
    with pytest.raises(DataError, match="not in the cache of `datasets`, which has hub:Owner/TwoSums/more; where"):
        load(TOTAL)
    problems = plan_costs(recipe(tmp_path)).problems
    assert [problem.split("'")[1] for problem in problems] == ["pool", "clean"]
    assert all("datasets.load_dataset('Owner/TwoSums', 'main')" in problem for problem in problems)
    with pytest.raises(RecipeError, match="step 'pool': hub:Owner/TwoSums/main/train is not in the cache"):
        plan(recipe(tmp_path))


def test_an_adopted_recipe_names_the_data_set(cache, tmp_path):
    cache("main", "a" * 40)
    written = yaml.safe_load(head(Adoption("mine", "smollm2", survey([TOTAL]), tmp_path, 0.05, 2, 32, 256)))
    assert written["steps"][0]["config"]["files"] == {"TwoSums": [str(TOTAL)]}


@pytest.mark.parametrize("name", ["hub:", "hub:gsm8k", "hub:openai/", "hub:a/b/c/d/e"])
def test_other_forms_of_an_id(cache, name):
    with pytest.raises(DataError, match="is not of the form hub:owner/name/configuration/split"):
        load(Path(name))


def test_a_folder_of_save_to_disk(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)]
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "sums")
    assert questions(tmp_path / "sums") == [row["question"] for row in rows]


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_columns_of_mixed_types_are_values_and_not_texts(tmp_path, form):
    """`datasets` keeps them as JSON texts of an Arrow type of their own, here within lists and structs."""

    def call(**arguments):
        said = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        return {"messages": [{"role": "user", "content": f"{arguments}?"}, said]}

    wanted = [{"n": 1}, {"n": "one"}, {"n": [1]}]
    kept = datasets.Dataset.from_list([call(**arguments) for arguments in wanted], on_mixed_types="use_json")
    assert "Json" in str(kept.features)
    if form == "parquet":
        kept.to_parquet(tmp_path / "a.parquet")
    else:
        kept.save_to_disk(tmp_path)
    examples, _ = load(tmp_path)
    assert [calls_of(json.loads(example.answer))[0].arguments for example in examples] == wanted


def test_a_truncated_arrow_file_gives_its_rows_and_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    out = io.BytesIO()
    table = pyarrow.Table.from_pylist([{"question": f"{i}?", "answer": f"{i}"} for i in range(40)])
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    (tmp_path / "a.arrow").write_bytes(out.getvalue()[: out.tell() * 3 // 4])
    *rows, bad = iterate(tmp_path / "a.arrow")
    assert [row.answer for row in rows] == [str(i) for i in range(len(rows))]
    assert len(rows) >= 10
    assert (bad.line, "is it complete?" in bad.reason) == (len(rows) + 1, True)
