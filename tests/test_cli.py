"""The command line: what it passes on, how it fails, and that --help stays quick. The jobs themselves are stubs."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from hf_hpmkd.cli import main
from hf_hpmkd.recipe import Recipe, load_recipe

LINE = ["--teacher", "cifar-resnet-14", "--teacher", "sklearn:SVC", "--student", "cifar-resnet-8"]
DIGITS = ["--dataset", "sklearn:digits"]
SMALLER = ["--teacher", "./none", "--compression", "2", *DIGITS]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch):
    """Puts a module with these functions in the place of one of ours."""

    def put(name: str, **functions: object) -> None:
        module = ModuleType(f"hf_hpmkd.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"hf_hpmkd.{name}", module)

    return put


@pytest.fixture
def runs(stub) -> list[tuple[Recipe, str]]:
    """Collects what `distill` is called with."""
    calls: list[tuple[Recipe, str]] = []

    def distill(recipe: Recipe, recipe_source: str) -> Path:
        calls.append((recipe, recipe_source))
        return Path(recipe.output.dir)

    stub("distill", distill=distill)
    return calls


# ---- distill ---------------------------------------------------------------------------------------------------------


def test_distill_passes_recipe_and_words(runs: list) -> None:
    assert main(["distill", "quickstart", "training.epochs=2", "output.dir=there"]) == 0
    recipe, source = runs[0]
    assert recipe == load_recipe("quickstart", ["training.epochs=2", "output.dir=there"])
    assert source == "quickstart training.epochs=2 output.dir=there"


def test_distill_of_a_line(runs: list) -> None:
    assert main(["distill", *LINE, *DIGITS, "--output", "a b", "training.epochs=2"]) == 0
    recipe, source = runs[0]
    assert [teacher.model for teacher in recipe.teachers] == ["cifar-resnet-14", "sklearn:SVC"]
    assert (recipe.student.model, recipe.data.path, recipe.output.dir) == ("cifar-resnet-8", "sklearn:digits", "a b")
    assert recipe.training.epochs == 2
    assert "--teacher=sklearn:SVC" in source


def test_compression_in_the_place_of_a_student(
    runs: list, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["--teacher", "sklearn:SVC", "--teacher", "mlp-64x64", "--compression", "10", "--dataset", "sklearn:iris"]
    assert main(["distill", *line, "training.epochs=2"]) == 0
    recipe, source = runs[0]
    told = capsys.readouterr().out
    assert re.search(
        rf"student is {recipe.student.model}: \d+ parameters, (9|10)\.\d times fewer than mlp-64x64\.", told
    )
    assert recipe.student.model.startswith("mlp-") and recipe.training.learning_rate == 0.01  # that of an MLP
    assert "--compression=10 --dataset=sklearn:iris training.epochs=2" in source
    assert main(["init", *line]) == 0
    assert load_recipe("recipe.yaml").student == recipe.student


def test_the_smaller_likeness_comes_from_where_the_teacher_does(runs: list, tmp_path: Path) -> None:
    from transformers import ResNetConfig

    from hf_hpmkd.tasks.images import ImageFeed

    ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2]).save_pretrained(tmp_path)
    ImageFeed((8, 8), (0.5,) * 3, (0.5,) * 3).processor.save_pretrained(tmp_path)
    line = ["--teacher", str(tmp_path), "--compression", "4", "--dataset", "sklearn:digits"]
    assert main(["distill", *line]) == 0
    assert main(["distill", *line, "teachers.0.trust_remote_code=true", "teachers.0.revision=abc"]) == 0
    students = [recipe.student for recipe, _ in runs]
    assert all(student.model.startswith(f"{tmp_path}[") for student in students)
    assert [(student.trust_remote_code, student.revision) for student in students] == [(False, None), (True, "abc")]
    line[1] = "timm/lcnet_150"  # in other sizes there is none, but a named relative, which has commits of its own
    assert main(["distill", *line, "teachers.0.revision=abc"]) == 0
    assert (runs[-1][0].student.model, runs[-1][0].student.revision) == ("timm/lcnet_050", None)


@pytest.mark.parametrize("start", [["quickstart"], [*LINE, *DIGITS]])
def test_output_and_overwrite_go_into_the_recipe(runs: list, start: list[str]) -> None:
    assert main(["distill", *start]) == 0
    assert main(["distill", *start, "--output", "x: y", "--overwrite"]) == 0
    assert not runs[0][0].output.overwrite
    assert runs[1][0].output.overwrite
    assert runs[1][0].output.dir == "x: y"


def test_quickstart_is_the_bundled_recipe(runs: list) -> None:
    assert main(["quickstart", "training.epochs=1"]) == 0
    assert runs[0][0] == load_recipe("quickstart", ["training.epochs=1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill"], "needs a recipe"),
        (["distill", "training.epochs=2"], "needs a recipe"),
        (["distill", "--teacher", "mlp-4"], "also needs --student (or --compression) and --dataset"),
        (["distill", "--compression", "2"], "also needs --teacher and --dataset"),
        (["distill", *LINE[2:4], "--compression", "2", *DIGITS], "among the teachers, got --teacher sklearn:SVC"),
        (["distill", *SMALLER, "student.model=mlp-7"], "got student.model=mlp-7 too. Leave one"),
        (["distill", *SMALLER, "student.pretrained=true"], "got student.pretrained=true too. Leave one"),
        (["distill", *SMALLER, "--teacher", "./none.skops"], "2 faults:\n  - teachers.0.model: there is no"),
        (["distill", *SMALLER, "training.epoch=1"], "Did you mean"),
        (["distill", "quickstart", *LINE, *DIGITS], "give a recipe (quickstart) or --teacher"),
        (["distill", "quickstrt"], "Did you mean `quickstart`?"),
        (["distill", *LINE, "--dataset", "./none"], "there is no './none'"),
        (["quickstart", "training.epoch=1", "student.modl=x"], "has 2 faults"),
        (["distill", "cifar10_resnet8"], "teachers.3.model: there is no"),
    ],
)
def test_faults_are_one_clean_message(
    runs: list,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("hpmkd: error: ")
    assert message in err
    assert "Traceback" not in err
    assert not out
    assert not runs
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("a rule"), FileNotFoundError("a rule"), PermissionError("a rule")])
def test_errors_of_the_job_exit_with_2_and_debug_shows_where(
    stub, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    def distill(recipe: Recipe, recipe_source: str) -> Path:
        raise error

    stub("distill", distill=distill)
    assert main(["quickstart"]) == 2
    assert capsys.readouterr().err == "hpmkd: error: a rule\n"
    assert main(["quickstart", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("hpmkd: error: a rule\n")


def test_errors_of_ours_are_not_hidden(stub) -> None:
    def distill(recipe: Recipe, recipe_source: str) -> Path:
        raise TypeError("a bug")

    stub("distill", distill=distill)
    with pytest.raises(TypeError, match="a bug"):
        main(["quickstart"])


def test_ctrl_c_exits_130_and_says_how_to_go_on(stub, capsys: pytest.CaptureFixture) -> None:
    def distill(recipe: Recipe, recipe_source: str) -> Path:
        raise KeyboardInterrupt

    stub("distill", distill=distill)
    assert main(["quickstart"]) == 130
    assert "The same command resumes the run" in capsys.readouterr().err


def test_sigterm_ends_a_run_as_ctrl_c_does(stub, capsys: pytest.CaptureFixture) -> None:
    ended = []

    def distill(recipe: Recipe, recipe_source: str) -> Path:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            ended.append("as interrupted")
            raise

    stub("distill", distill=distill)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["quickstart"]) == 143 and ended == ["as interrupted"]
    assert "The same command resumes the run" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "module", "code", "told"),
    [
        (["quickstart"], "distill", 1, "the reader of its output has left. The same command resumes the run"),
        (["plan", "quickstart"], "plan", 0, ""),
    ],
)
def test_a_reader_that_leaves_stops_a_long_command_which_says_so(
    stub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    words: list,
    module: str,
    code: int,
    told: str,
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise BrokenPipeError

    stub(module, **{module: broken})
    with open(tmp_path / "stdout", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(words) == code
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == (1 if told else 0)


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_rank_0_prints_and_all_tell_faults(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, rank: str, prints: bool
) -> None:
    """A file may be missing on the second machine alone."""
    monkeypatch.setenv("RANK", rank)
    assert main(["recipe", "check", "quickstart"]) == 0
    assert main(["recipe", "check", "nothing"]) == 2
    out, err = capsys.readouterr()
    assert bool(out) is prints
    assert err.startswith(f"hpmkd: {'' if prints else '[rank 1] '}error: ")


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_init_writes_a_commented_recipe_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, runs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", *LINE, *DIGITS, "--output", "there"]) == 0
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    assert "hpmkd distill recipe.yaml" in text
    assert main(["distill", *LINE, *DIGITS, "--output", "there"]) == 0
    assert load_recipe("recipe.yaml") == runs[0][0]
    capsys.readouterr()
    assert main(["init", *LINE, *DIGITS]) == 2
    assert "recipe.yaml exists and is not overwritten" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text(encoding="utf-8") == text
    assert main(["init", "other.yaml", *LINE, *DIGITS]) == 0
    assert Path("other.yaml").exists()


def test_init_writes_what_overrides_say(
    tmp_path: Path, capsys: pytest.CaptureFixture, runs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["training.epochs=3", "distillation.alpha=0.5"]
    assert main(["init", "mine.yaml", words[0], *LINE, *DIGITS, words[1]]) == 0
    assert main(["distill", *LINE, *DIGITS, *words]) == 0
    assert load_recipe("mine.yaml") == runs[0][0] and runs[0][0].training.epochs == 3
    capsys.readouterr()
    for wrong, told in (
        (["b.yaml", "c.yaml"], "one file, got b.yaml and c.yaml"),
        (["training.epochs=no"], "epochs"),
        (["training.epochs"], "ends in .yaml or .yml, got training.epochs. An override is section.key=value"),
    ):
        assert main(["init", *wrong, *LINE, *DIGITS]) == 2
        assert told in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]
    assert main(["init", "./a=b.yaml", *LINE, *DIGITS]) == 0 and Path("a=b.yaml").exists()


def test_init_of_a_faulty_line_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "r.yaml"
    assert main(["init", str(file), "--teacher", "mlp-4", "--student", "cifar-resnet-8", "--dataset", "a/b"]) == 2
    assert "for one task" in capsys.readouterr().err
    assert not file.exists()


def test_recipe_check_list_schema(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipe", "check", "quickstart"]) == 0
    assert "quickstart is sound (3 teachers" in capsys.readouterr().out
    assert main(["recipe", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 6
    assert all(len(line.split()) > 5 for line in listed)
    assert main(["recipe", "schema"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["title"] == "hf_hpmkd recipe"


# ---- the other jobs --------------------------------------------------------------------------------------------------


def test_plan_prints_what_plan_says(stub, capsys: pytest.CaptureFixture) -> None:
    stub("plan", plan=lambda recipe: f"plan of {recipe.student.model} {recipe.training.epochs}")
    assert main(["plan", "quickstart", "training.epochs=7"]) == 0
    assert capsys.readouterr().out == "plan of cifar-resnet-8x4 7\n"


def test_push_is_private_unless_told(stub) -> None:
    calls: list[SimpleNamespace] = []
    stub(
        "hub_store",
        push_run=lambda run_dir, repo_id, private: calls.append(
            SimpleNamespace(dir=run_dir, id=repo_id, private=private)
        ),
    )
    assert main(["push", "run", "me/student"]) == 0
    assert main(["push", "run", "me/student", "--public"]) == 0
    assert [call.private for call in calls] == [True, False]
    assert (calls[0].dir, calls[0].id) == (Path("run"), "me/student")


@pytest.mark.parametrize(
    ("words", "expected"), [(["output.dir=~/runs/one"], "runs/one-compare"), (["--output", "~/two"], "two")]
)
def test_a_comparison_finds_the_home_too(stub, monkeypatch: pytest.MonkeyPatch, words: list, expected: str) -> None:
    folders: list[Path] = []
    stub(
        "compare",
        Settings=lambda methods, seeds, folder, *more: folder,
        compare=lambda recipe, settings, source, say: folders.append(settings),
    )
    monkeypatch.setenv("HOME", "/home/jane")
    assert main(["compare", "quickstart", *words]) == 0
    assert folders == [Path("/home/jane") / expected]


def test_an_ablation_is_a_comparison_of_its_methods(stub) -> None:
    asked: list[SimpleNamespace] = []
    names = ["methods", "seeds", "folder", "baseline", "teacher_seed", "final", "jobs", "tune"]
    stub(
        "compare",
        Settings=lambda *values: SimpleNamespace(**dict(zip(names, values, strict=True))),
        compare=lambda recipe, settings, source, say: asked.append(settings),
    )
    assert main(["ablate", "quickstart", "--seeds", "2", "--output", "there", "--jobs", "2"]) == 0
    assert main(["compare", "quickstart", "--seeds", "4,", "--tune", "8", "--teacher-seed", "5", "--final"]) == 0
    ablation, comparison = asked
    assert ablation.methods[0].name == ablation.baseline == "full" and len(ablation.methods) > 5
    assert (list(ablation.seeds), ablation.folder, ablation.jobs, ablation.final) == ([0, 1], Path("there"), 2, False)
    assert list(comparison.seeds) == [4] and comparison.final and comparison.baseline is None
    assert (comparison.tune, comparison.teacher_seed, comparison.jobs) == (8, 5, 1)


def test_bench_and_prior_pass_their_options(stub, capsys: pytest.CaptureFixture) -> None:
    calls: list[tuple] = []

    def collect(*args: object, say: object) -> int:
        calls.append(args)
        return 7

    stub("bench_pipeline", bench_pipeline=lambda *args: calls.append(args))
    stub("prior_build", build_prior=collect)
    assert main(["bench", "pipeline", "quickstart", "training.epochs=1", "--output", "p.json", "--turns", "2"]) == 0
    assert main(["prior", "build", "--data", "d", "--output", "p.parquet", "--runs", "9", "--tables", "a,b"]) == 0
    assert calls == [
        ("quickstart", ["training.epochs=1"], Path("p.json"), 2),
        (Path("d"), 9, Path("p.parquet"), ["a", "b"]),
    ]
    assert "p.parquet has 7 runs." in capsys.readouterr().out
    stub("auto_bench", Settings=lambda *args, records: (args[5], records), bench_auto=collect)
    for mode in ("thorough", "2.5"):
        assert main(["bench", "auto", "--data", "d", "--output", "o", "--mode", mode, "--records", "all,50"]) == 0
    assert [one[0] for one in calls[2:]] == [("thorough", [None, 50]), (2.5, [None, 50])]
    capsys.readouterr()
    assert main(["prior", "show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["runs"] > 1000


def test_the_cache_is_told_checked_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = ["--cache-dir", str(tmp_path)]
    name = f"{'a' * 64}.safetensors"
    (tmp_path / name).write_bytes(b"no safetensors")
    assert main(["cache", "verify", *place]) == 0
    assert name[:12] in capsys.readouterr().out
    assert main(["cache", "clear", "--older-than", "3", *place]) == 0
    assert (tmp_path / name).exists(), "it is of today"
    assert main(["cache", "clear", *place]) == 0
    assert not (tmp_path / name).exists()
    capsys.readouterr()
    assert main(["cache", "ls", *place]) == 0
    assert "No teacher outputs" in capsys.readouterr().out


def test_bench_passes_its_options(stub) -> None:
    calls: list[tuple] = []
    stub("bench", bench_trainer=lambda output, steps: calls.append((output, steps)))
    assert main(["bench", "trainer", "--steps", "8", "--output", "b.json"]) == 0
    assert calls == [(Path("b.json"), 8)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["distill", "--compression", "tenfold"],
            "must be a number above 1, as 10 for a tenth of the parameters, got 'te",
        ),
        (["distill", "--compression", "1"], "must be a number above 1, as 10 for a tenth of the parameters, got '1'"),
        (["distill", "--compression", "inf"], "got 'inf'"),
        (["distill", "--compression", "2", "--student", "mlp-4"], "not allowed with argument --compression"),
        (["bench", "auto", "--mode", "slow"], "must be fast, thorough, or minutes above 0, got 'slow'"),
        (["bench", "auto", "--mode", "0"], "must be fast, thorough, or minutes above 0, got '0'"),
    ],
)
def test_options_say_what_they_take(words: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("words", [["recipe"], ["cache"], [], ["nonsense"], ["push", "run"], ["init"]])
def test_incomplete_commands_exit_with_2_and_usage(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: hpmkd" in capsys.readouterr().err


# ---- as a process ----------------------------------------------------------------------------------------------------


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_a_misspelled_option_is_told_with_the_right_one_and_never_guessed(capsys: pytest.CaptureFixture) -> None:
    for words, told in (
        (["distill", "--teacher", "a", "--student", "b", "--datset", "c"], "--datset; did you mean --dataset?"),
        (["compare", "quickstart", "--seed", "5"], "--seed 5; did you mean --seeds?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        text = capsys.readouterr().err
        assert stopped.value.code == 2 and told in text and f"usage: hpmkd {words[0]}" in text


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (["--help"], "distill", 0),
        (["--version"], f"hpmkd {version('hf_hpmkd')}", 0),
        (["recipe", "check", "quickstart"], "quickstart is sound", 0),
        (["distill", "quickstart", "data.seed=-1"], "1 fault", 2),
        (["plan", "quickstart", "data.seed=-1"], "1 fault", 2),
    ],
)
def test_help_and_faults_of_a_recipe_come_before_anything_heavy(words: list[str], told: str, code: int) -> None:
    """They are to be there in a second, and torch alone takes longer."""
    script = (
        f"import sys; sys.argv = {['hpmkd', *words]}\n"
        "from hf_hpmkd.cli import main\n"
        "try:\n    sys.exit(main())\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'timm', 'sklearn', 'pandas', 'numpy'} & set(sys.modules)\n"
        "    print('loaded', sorted(heavy))\n"
    )
    done = run(sys.executable, "-c", script)
    assert done.returncode == code
    assert told in done.stdout + done.stderr
    assert "loaded []" in done.stdout


def test_module_runs_like_the_command_and_reports_codes() -> None:
    done = run(sys.executable, "-m", "hf_hpmkd", "recipe", "check", "quickstart", "data.path=sklearn:digit")
    assert done.returncode == 2
    assert done.stderr.startswith("hpmkd: error: quickstart has 1 fault:")


def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["recipe", "schema"]) == 0
        pipe.flush()  # as Python does when it ends
    assert not capfd.readouterr().err
