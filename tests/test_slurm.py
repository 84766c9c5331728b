"""The launcher: what it refuses and sends, and the same images and numbers through a real Slurm as without one.

The tests that need Slurm run where one is up (`eval "$(tests/slurm-local start)"`), and say so where none is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL

import describe_domains
import train_lt
from runtime import cli, runs
from runtime.cli import UserError

spec = importlib.util.spec_from_file_location("submit", ROOT / "slurm/submit.py")
submit = importlib.util.module_from_spec(spec)
sys.modules["submit"] = submit
spec.loader.exec_module(submit)

TRAIN = ["train_lt.py", "--curriculum", "none", "--epochs", "2", "--curriculum-epochs", "0"]


def slurm_is_up() -> bool:
    try:
        return subprocess.run(["sinfo", "-h"], capture_output=True, timeout=10, check=False).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


needs_slurm = pytest.mark.skipif(not slurm_is_up(), reason='no Slurm is up: eval "$(tests/slurm-local start)"')


def launch(folder: Path, *words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "slurm/submit.py"), *map(str, words)],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def wait_for_jobs(folder: Path, seconds: float = 240) -> list[str]:
    """The job ids of a submission, once none of them is queued or running."""
    ids = [task["job_id"] for task in json.loads((folder / "submission.json").read_text())["tasks"]]
    end = time.monotonic() + seconds
    main = ",".join(sorted({job_id.split("_")[0] for job_id in ids}))
    while subprocess.run(["squeue", "-h", "-j", main], capture_output=True, text=True, check=False).stdout.strip():
        assert time.monotonic() < end, "the jobs did not end in time"
        time.sleep(0.5)
    return ids


def test_a_sweep_is_the_product_of_its_values_each_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = submit.expand_sweep(TRAIN, ["seed=0,1", "loss=ce,bs"])
    assert [line[len(TRAIN) :] for line in lines] == [
        ["--seed", seed, "--loss", loss] for seed in "01" for loss in ("ce", "bs")
    ]
    folders = [train_lt.run_folder(submit.check(line, True)[1]) for line in lines]
    assert len(set(folders)) == 4 and str(folders[0]) == "runs/digits_ce_none_seed0"
    # The learning rate stands in no run folder's name: then each value has an --out of its own.
    lines = submit.expand_sweep(TRAIN, ["lr=0.1,0.2"])
    assert [line[-2:] for line in lines] == [["--out", f"runs/train_lt/lr-{rate}"] for rate in ("0.1", "0.2")]


def test_the_command_line_is_split_at_scripts():
    own, scripts, extra = submit.split_command_line(
        ["--time", "5", "--slurm-nodelist", "a", "--slurm-mail-type=END", *TRAIN, "--then", "report.py"][:-2]
    )
    assert own == ["--time", "5"] and scripts == [TRAIN] and extra == {"nodelist": "a", "mail-type": "END"}
    with pytest.raises(UserError, match="report.py: unknown script"):
        submit.split_command_line([*TRAIN, "--then", "report.py"])
    with pytest.raises(UserError, match="--slurm-nodelist: expected a value"):
        submit.split_command_line(["--slurm-nodelist", *TRAIN])


def documented_commands() -> list[str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages) + submit.__doc__.replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("python slurm/submit.py")]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_launcher_commands_parse(command):
    own, scripts, _ = submit.split_command_line(shlex.split(command, comments=True)[2:])
    with cli.paths_unchecked(True):
        args = submit.build_parser().parse_args(own)
        assert args.status or [submit.check(words, False) for words in scripts]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train_lt.py", "--epochs", "0"], "--epochs"),
        (["train_lt.py", "--no-such-flag"], "--no-such-flag"),
        (["--sweep", "loss=ce,mse", "train_lt.py"], "--loss"),
        (["--sweep", "loss", "train_lt.py"], "--sweep loss: expected FLAG=A,B"),
        (
            ["--shards", "2", "train_lt.py"],
            "only generate_spectrum.py, tune_generator.py, describe_domains.py have shards",
        ),
        (["/elsewhere/evil.py"], "unknown script"),
        ([], "no script"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_submitted(tmp_path, words, message):
    done = launch(tmp_path, *words)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_without_slurm_the_launcher_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "slurm/submit.py"), *TRAIN], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "PATH": "/nowhere"},
    )  # fmt: skip
    assert done.returncode == 2 and "no sbatch on this machine" in done.stderr


@pytest.mark.slow
def test_a_local_sweep_runs_from_the_snapshot_and_finished_runs_are_skipped(tmp_path):
    words = ["--cluster", "local", "--sweep", "seed=0,1", *TRAIN]
    done = launch(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    [code] = (tmp_path / "runs/jobs/train_lt").glob("code-*")
    assert (code / "train_lt.py").read_text() == (ROOT / "train_lt.py").read_text()
    results = [json.loads((tmp_path / f"runs/digits_ce_none_seed{s}/results.json").read_text()) for s in (0, 1)]
    assert results[0]["last"] != results[1]["last"]
    again = launch(tmp_path, *words)
    assert again.returncode == 0 and "nothing to submit" in again.stdout
    status = launch(tmp_path, "--status", "runs/jobs/train_lt")
    assert status.returncode == 0 and "2 completed" in status.stdout, status.stdout + status.stderr


@pytest.mark.slow
def test_a_snapshot_holds_every_module(tmp_path):
    """Nothing that a script imports may be missing there: a job would end at its first line."""
    submit.take_snapshot(tmp_path)
    modules = [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py"))]
    modules += [path.relative_to(ROOT) for folder in ROOT.glob("*/__init__.py") for path in folder.parent.glob("*.py")]
    assert {path for path in modules if not (tmp_path / path).is_file()} == set()
    lines = ["from pathlib import Path", *(f"import {path.stem}" for path in tmp_path.glob("*.py"))]
    lines += ["import sys", "assert Path(sys.modules['runtime.runs'].__file__).is_relative_to(Path.cwd())"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_snapshot_knows_its_commit(tmp_path):
    commit = submit.take_snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "from runtime import runs; print(runs.environment()['commit'])"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == commit == runs.environment()["commit"]
    (tmp_path / runs.COMMIT).write_text("0123456")
    done = subprocess.run(
        [sys.executable, "-c", "from runtime import runs; print(runs.commit())"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0123456"  # and not the checkout's that it may lie in


def test_a_job_waits_for_its_script_to_stop_and_no_longer(tmp_path):
    """submitit calls `checkpoint` in a signal handler, while `__call__` waits for the script."""
    script = "import signal, sys, time; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75)); time.sleep(60)"
    command = submit.Command([sys.executable, "-c", script], str(tmp_path), grace=30)
    asked = []

    def preempt(*_):
        began = time.monotonic()
        asked.append(command.checkpoint())
        asked.append(time.monotonic() - began)

    before = signal.signal(signal.SIGALRM, preempt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2)
        with pytest.raises(RuntimeError, match="exit code 75"):
            command()
    finally:
        signal.signal(signal.SIGALRM, before)
    again, seconds = asked
    assert seconds < 10 and again.function.command == command.command


def test_a_shard_that_left_out_unreadable_sources_has_not_failed(tmp_path):
    """What `--then` sends waits for success: exit code 1 with a fresh failures.jsonl is one, without it is none."""
    write = "import pathlib, sys; pathlib.Path('failures.jsonl').write_text('{}'); sys.exit(1)"
    assert submit.Command([sys.executable, "-c", write], str(tmp_path), 1, "failures.jsonl")() == 1
    old = tmp_path / "failures.jsonl"
    os.utime(old, (1, 1))  # of an earlier run
    crash = [sys.executable, "-c", "raise SystemExit(1)"]
    with pytest.raises(RuntimeError, match="exit code 1"):
        submit.Command(crash, str(tmp_path), 1, "failures.jsonl")()
    with pytest.raises(RuntimeError, match="exit code 1"):
        submit.Command(crash, str(tmp_path), 1)()
    line = ["generate_spectrum.py", "--hard", "h", "--prompts", "p", "--out", "s", "--shard", "3/4"]
    assert submit.failures_of(line) == "s/shard-00003/failures.jsonl" and submit.failures_of(TRAIN) is None


def test_a_task_gets_its_cores(tmp_path, monkeypatch):
    (tmp_path / "srun").touch(mode=0o755)  # submitit looks for it
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    args = submit.build_parser().parse_args(["--cpus-per-task", "7", "--setup", "module load cuda"])
    executor = submit.make_executor(args, tmp_path, "x", {}, None)
    assert executor._executor.parameters["setup"] == ["export SRUN_CPUS_PER_TASK=7", "module load cuda"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "seconds", "requeued", "code"),
    [
        ("trap 'exit 75' USR2; while :; do sleep 0.1; done", 10, True, 0),  # ends its batch
        ("trap '' USR2; exec sleep 60", 15, True, 0),  # a batch longer than the warning
        ("trap 'exit 0' USR2; while :; do sleep 0.1; done", 10, False, 0),  # done just then
    ],
)
def test_the_sbatch_variant_requeues_whatever_its_batch_takes(tmp_path, script, seconds, requeued, code):
    for name, text in (("srun", f"while [ $# -gt 0 ]; do shift; done; {script}"), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GRACE": "2", "SLURM_JOB_ID": "5",
                   "SLURM_CPUS_PER_TASK": "8"}  # fmt: skip
    line = f"source {ROOT}/slurm/requeue.sh; run_and_requeue x.py"
    job = subprocess.Popen(["bash", "-c", line], env=environment, stdout=subprocess.PIPE, text=True,
                           start_new_session=True)  # fmt: skip
    try:
        time.sleep(1)
        job.send_signal(signal.SIGUSR2)
        assert job.wait(seconds) == code
    finally:
        os.killpg(job.pid, signal.SIGKILL) if job.poll() is None or script.endswith("60") else None
    assert ("scontrol requeue 5" in job.stdout.read()) == requeued


def test_more_shards_than_work_is_an_error(road, tmp_path):
    # 55 sources x 3 levels x 1 seed in batches of 32: two batches a level.
    done = launch(tmp_path, "--shards", "7", "generate_spectrum.py", *road.inputs, *SMALL)
    assert done.returncode == 2 and "--shards 7: more than there is work for; expected at most 6" in done.stderr


def test_captions_are_sent_as_shards_and_the_filter_after_the_edits(blank_figures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "biased_digits"]
    captions = ["describe_domains.py", *data, "--out", "domains", "--batch-size", "100"]
    assert submit.main(["--dry-run", "--cluster", "local", "--shards", "3", *captions, "--then", *captions]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--batch-size 100")[1] for line in lines[1:]] == [f" --shard {i}/3" for i in range(3)] + [""]
    with pytest.raises(UserError, match="--shards 4: more than there is work for; expected at most 3"):
        submit.main(["--dry-run", "--shards", "4", *captions])  # 300 images, 100 at once
    # All captions there: only the summary is missing; with it nothing is.
    assert describe_domains.main([*captions[1:], "--shard", "0/1"]) == 0
    assert submit.main(["--dry-run", "--cluster", "local", *captions]) == 0
    assert "nothing to submit" in capsys.readouterr().out
    (tmp_path / "domains/domains.json").unlink()
    assert submit.main(["--dry-run", "--cluster", "local", *captions]) == 0
    assert "1 task;" in capsys.readouterr().out
    edits = ["generate_spectrum.py", *data, "--hard", "hard.csv", "--prompts", "prompts.json", "--out", "edits"]
    rules = ["filter_edits.py", *data, "--rules", "class", "--spectrum", "edits", "--prompts", "prompts.json"]
    for name in ("hard.csv", "prompts.json"):
        (tmp_path / name).touch()
    assert submit.main(["--dry-run", "--cluster", "local", *edits, "--then", *rules]) == 0
    assert "filter_edits.py --dataset biased_digits --rules class" in capsys.readouterr().out.splitlines()[-1]


@needs_slurm
def test_slurms_own_message_is_shown_for_an_unknown_partition(tmp_path):
    done = launch(tmp_path, "--partition", "nowhere", *TRAIN)
    assert done.returncode == 2 and "invalid partition" in done.stderr.lower(), done.stderr


@needs_slurm
@pytest.mark.slow
def test_a_sweep_through_slurm_gives_the_numbers_of_runs_without_it(tmp_path):
    words = ["--partition", "cpu", "--cpus-per-task", "1", "--sweep", "seed=0,1", "--sweep", "loss=ce,bs", *TRAIN]
    done = launch(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    wait_for_jobs(tmp_path / "runs/jobs/train_lt")
    for seed in (0, 1):
        for loss in ("ce", "bs"):
            out = tmp_path / f"direct_{seed}_{loss}"
            train_lt.main([*TRAIN[1:], "--seed", str(seed), "--loss", loss, "--out", str(out)])
            through = np.load(tmp_path / f"runs/digits_{loss}_none_seed{seed}/predictions.npz")
            direct = np.load(out / "predictions.npz")
            assert np.abs(through["logits"] - direct["logits"]).max() < 1e-3  # other thread counts sum in another order
    status = launch(tmp_path, "--status", "runs/jobs/train_lt")
    assert "4 completed" in status.stdout, status.stdout
    again = launch(tmp_path, *words)
    assert "nothing to submit" in again.stdout


@needs_slurm
@pytest.mark.slow
def test_two_tasks_of_a_node_train_one_run_together(tmp_path):
    words = ["--partition", "cpu", "--cpus-per-task", "1", "--tasks-per-node", "2", *TRAIN, "--out", "together"]
    done = launch(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    [job] = wait_for_jobs(tmp_path / "runs/jobs/train_lt")
    logs = {path.name: path.read_text() for path in (tmp_path / "runs/jobs/train_lt/logs").glob(f"{job}_*_log.*")}
    assert (tmp_path / "together/results.json").is_file(), logs
    # Each batch was divided: both processes ran, and only the first wrote.
    assert {f"{job}_{task}_log.out" for task in (0, 1)} <= set(logs)
    assert sum("test accuracy" in log for log in logs.values()) == 1


@needs_slurm
@pytest.mark.slow
def test_a_failed_task_shows_its_error_in_the_status(tmp_path):
    done = launch(tmp_path, "--partition", "cpu", "--cpus-per-task", "1", *TRAIN, "--lr", "1e30")
    assert done.returncode == 0, done.stderr
    wait_for_jobs(tmp_path / "runs/jobs/train_lt")
    status = launch(tmp_path, "--status", "runs/jobs/train_lt")
    assert "FAILED" in status.stdout and "the loss is not finite" in status.stdout, status.stdout


@needs_slurm
@pytest.mark.slow
def test_a_generation_array_killed_and_requeued_draws_the_images_of_a_run_without_slurm(road, tmp_path):
    for path in (road.hard, road.prompts):
        shutil.copy(path, tmp_path)
    generate = ["generate_spectrum.py", "--hard", "hard.csv", "--prompts", "prompts.json", "--out", "s", *SMALL]
    words = ["--partition", "gpu", "--cpus-per-task", "1", "--shards", "4", "--max-parallel", "2", "--time", "30"]
    filter_words = ["filter_clipscore.py", "--spectrum", "s", "--prompts", "prompts.json", "--threshold", "0.1"]
    done = launch(tmp_path, *words, *generate, "--batch-size", "4", "--then", *filter_words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/jobs/generate_spectrum"
    first = json.loads((folder / "submission.json").read_text())["tasks"][0]["job_id"]
    end = time.monotonic() + 120
    while not list((tmp_path / "s").glob("shard-*")):  # it has begun, and loads its models
        assert time.monotonic() < end
        time.sleep(0.2)
    subprocess.run(["scancel", "--signal=USR2", first], check=False)  # what a preemption sends
    wait_for_jobs(folder)
    assert any("Caught signal SIGUSR2" in log.read_text() for log in (folder / "logs").glob(f"{first}_*log.*"))
    from spectrum import folder as spectrum_folder
    from spectrum import tables

    expected = {row["file_name"].split("/")[1]: row for row in spectrum_folder.read_rows(road.spectrum, decode=True)}
    found = {row["file_name"].split("/")[1]: row for row in spectrum_folder.read_rows(tmp_path / "s", decode=True)}
    assert found.keys() == expected.keys()
    for name, row in found.items():
        assert {**row, "file_name": ""} == {**expected[name], "file_name": ""}
    scores = tables.read_scores(tmp_path / "s/scores.csv")  # the dependent job ran after the array
    assert len(scores) == len(expected)
    again = launch(tmp_path, *words, *generate, "--batch-size", "4")
    assert "nothing to submit" in again.stdout, again.stdout + again.stderr


@needs_slurm
@pytest.mark.slow
def test_plain_sbatch_files_requeue_and_draw_the_same_images(road, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    common = [
        "--parsable",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        "--mem=2000",
        "--output",
        str(tmp_path / "%j.log"),
    ]
    generate = [*road.inputs, "--out", str(tmp_path / "s"), *SMALL, "--batch-size", "4"]
    jobs = [
        ["--array=0-1%2", "slurm/generate.sbatch", *generate],
        ["slurm/train.sbatch", *TRAIN, "--out", str(tmp_path / "run")],
    ]
    ids = [
        subprocess.run(
            ["sbatch", *common, *job], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        for job in jobs
    ]
    end = time.monotonic() + 120
    while not list((tmp_path / "s").glob("shard-*")):  # it has begun, and loads its models
        assert time.monotonic() < end
        time.sleep(0.2)
    subprocess.run(["scancel", "--signal=USR2", "--batch", f"{ids[0]}_0"], check=False)
    end = time.monotonic() + 240
    while subprocess.run(
        ["squeue", "-h", "-j", ",".join(ids)], capture_output=True, text=True, check=False
    ).stdout.strip():
        assert time.monotonic() < end
        time.sleep(0.5)
    from spectrum import folder as spectrum_folder

    def names(folder: Path) -> set[str]:
        return {row["file_name"].split("/")[1] for row in spectrum_folder.read_rows(folder, decode=True)}

    logs = [log.read_text() for log in tmp_path.glob("*.log")]
    assert any("interrupted; back to the queue" in log for log in logs), logs
    assert names(tmp_path / "s") == names(road.spectrum), logs
    assert (tmp_path / "run/results.json").is_file()
