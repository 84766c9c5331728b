"""Send a script of this project to Slurm: a generation array, a training run, or a sweep.

Everything after the script's name is that script's own command line; its parser checks it before anything is submitted.
A job runs the script from a snapshot of the code taken now, so that later edits change nothing. After a preemption or a
time limit it is requeued and runs the same command again, which resumes.

Reads:  the script's arguments (files given by @file too)
Writes: FOLDER/submission.json, FOLDER/code-DATE (the snapshot), FOLDER/logs (submitit's files, the tasks' output)

    python slurm/submit.py --dry-run --cluster local train_lt.py --loss bs
    python slurm/submit.py --shards 64 --max-parallel 16 --partition gpu --gpus-per-node 1 --time 240 \\
        generate_spectrum.py --out runs/spectrum --then filter_clipscore.py --spectrum runs/spectrum
    python slurm/submit.py --shards 8 --partition gpu --gpus-per-node 1 describe_domains.py --out runs/domains \\
        --then describe_domains.py --out runs/domains
    python slurm/submit.py --sweep seed=0,1,2 --sweep loss=ce,bs --partition gpu train_lt.py --curriculum d2s
    python slurm/submit.py --status runs/jobs/train_lt
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime import cli, files, runs, text

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "find_hard", "describe_domains", "write_prompts", "tune_generator", "generate_spectrum", "filter_clipscore",
    "filter_edits", "train_lt", "train_iwildcam", "train_fewshot",
)  # fmt: skip
SHARDED = ("generate_spectrum.py", "tune_generator.py", "describe_domains.py")
FOLDERS = ("loaders", "spectrum", "generation", "training", "reporting", "runtime")
SNAPSHOT = ("*.py", *(f"{name}/*.py" for name in FOLDERS), "reporting/gallery.*", "assets/*", "slurm/*")
MAX_TIMEOUTS = 100  # a job that only ran out of time is requeued this often


class Command:
    """A command line that a job runs, and runs again after a preemption or a time limit (submitit's protocol).

    Args:
        failures: the file in which the script lists the images that it skipped. If the script has just written it, exit
            code 1 means only that images were skipped, and the job counts as done.
    """

    def __init__(self, command: list[str], folder: str, grace: float, failures: str | None = None):
        self.command, self.folder, self.grace, self.failures = command, folder, grace, failures

    def __call__(self) -> int:
        import os
        import subprocess
        import time

        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            import submitit

            # All GPUs of the node stay visible: the script picks the one of its rank.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        began = time.time()
        # Unbuffered, so that --status sees the last line of a running task.
        self.child = subprocess.Popen(self.command, cwd=self.folder, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        # Not wait(): checkpoint() runs in a signal handler within this loop, and waits for the same child.
        while (code := self.child.poll()) is None:
            time.sleep(0.2)
        listed = os.path.join(self.folder, self.failures) if self.failures else ""
        if code == 1 and os.path.isfile(listed) and os.path.getmtime(listed) >= began - 1:
            print(f"finished but for what {listed} lists (exit code 1)")
        elif code:
            raise RuntimeError(f"exit code {code}: {' '.join(self.command)}")
        return code

    def checkpoint(self):
        """When Slurm takes the node away: stop the script, and give submitit the same command to queue again."""
        import signal
        import subprocess

        import submitit

        self.child.send_signal(signal.SIGUSR2)  # the script finishes its batch or epoch and leaves
        try:
            self.child.wait(self.grace)
        except subprocess.TimeoutExpired:
            self.child.kill()
        return submitit.helpers.DelayedSubmission(Command(self.command, self.folder, self.grace, self.failures))


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "submit")
    parser.usage = "submit.py [options] SCRIPT [its arguments] [--then SCRIPT [its arguments]]"
    group = parser.add_argument_group("what to send")
    group.add_argument(
        "--shards", type=cli.whole(1), metavar="N", help=f"send {' or '.join(SHARDED)} as an array of N tasks"
    )
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FLAG=A,B,...",
        help="send one task for each value; several sweeps make their product, each run in a folder of its own",
    )
    group.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    group.add_argument("--status", type=cli.existing_folder, metavar="FOLDER", help="show the tasks of a submission")
    group.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="where logs and snapshot go (default: runs/jobs/SCRIPT)"
    )
    group = parser.add_argument_group("resources")
    group.add_argument(
        "--cluster",
        choices=["slurm", "local", "debug"],
        default="slurm",
        help="slurm; local: processes on this machine; debug: one after another in this process",
    )
    group.add_argument("--partition", metavar="NAME", help="Slurm partition (default: the cluster's)")
    group.add_argument("--time", type=cli.whole(1), default=240, metavar="MINUTES", help="time limit of a task")
    group.add_argument(
        "--max-parallel", type=cli.whole(1), default=256, metavar="N", help="tasks of an array at a time"
    )
    group.add_argument("--nodes", type=cli.whole(1), default=1, metavar="N", help="nodes of a task")
    group.add_argument("--gpus-per-node", type=cli.whole(0), default=0, metavar="N", help="GPUs on each node")
    group.add_argument(
        "--tasks-per-node", type=cli.whole(1), default=1, metavar="N", help="processes on each node (torch.distributed)"
    )
    group.add_argument("--cpus-per-task", type=cli.whole(1), default=4, metavar="N", help="CPU cores of each process")
    group.add_argument("--mem", metavar="SIZE", help="memory of a node, such as 32GB (default: the cluster's)")
    group.add_argument("--account", metavar="NAME", help="account to charge")
    group.add_argument("--qos", metavar="NAME", help="quality of service")
    group.add_argument("--constraint", metavar="NAME", help="node features to ask for")
    group.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell line to run before the task")
    group.add_argument(
        "--signal-delay", type=cli.whole(1), default=120, metavar="SECONDS", help="warning before the time limit"
    )
    parser.epilog = "Any further sbatch option: --slurm-KEY VALUE, such as --slurm-nodelist node7."
    return parser


def split_command_line(argv: list[str]) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """The launcher's own words, the scripts' command lines, and the further sbatch options.

    Raises:
        UserError: no script, an unknown one, or a --slurm-KEY without a value.
    """
    start = next((i for i, word in enumerate(argv) if word.endswith(".py")), len(argv))
    own, rest = argv[:start], argv[start:]
    scripts = [list(words) for is_then, words in itertools.groupby(rest, "--then".__eq__) if not is_then]
    if rest.count("--then") != len(scripts) - 1 and rest:
        raise cli.UserError("--then: expected between two scripts, each with its arguments")
    for words in scripts:
        if Path(words[0]).stem not in SCRIPTS or Path(words[0]).name != words[0]:
            raise cli.UserError(f"{words[0]}: unknown script; expected one of {', '.join(f'{s}.py' for s in SCRIPTS)}")
    extra = {}
    for word in [word for word in own if word.startswith("--slurm-")]:
        place = own.index(word)
        name, equals, value = word.removeprefix("--slurm-").partition("=")
        if not equals and place + 1 == len(own):
            raise cli.UserError(f"{word}: expected a value")
        extra[name] = value if equals else own[place + 1]
        del own[place : place + (1 if equals else 2)]
    return own, scripts, extra


def expand_files(words: list[str]) -> list[str]:
    """A script's command line with the arguments of its @files in their place: a later edit of them changes nothing."""
    return [words[0], *importlib.import_module(Path(words[0]).stem).build_parser().expand_files(words[1:])]


def check(words: list[str], paths_exist: bool):
    """Let a script's own parser read its command line.

    Returns:
        The script's module and the parsed arguments. A bad argument ends the launcher as it would end the script.
    """
    module = importlib.import_module(Path(words[0]).stem)
    with cli.paths_unchecked(not paths_exist):
        return module, module.build_parser().parse_args(words[1:])


def expand_sweep(words: list[str], sweeps: list[str]) -> list[list[str]]:
    """The command lines of a sweep: the product of its values, each with a run folder of its own.

    The script's own default folders are kept where they differ; otherwise each command line gets an --out.

    Raises:
        UserError: a sweep that is no FLAG=A,B or names a flag that the script does not have.
    """
    values = {}
    for sweep in sweeps:
        flag, equals, listed = sweep.partition("=")
        if not equals or not flag or not all(listed.split(",")):
            raise cli.UserError(f"--sweep {sweep}: expected FLAG=A,B,...")
        values[flag.removeprefix("--")] = listed.split(",")
    module, parsed = check(words, True)
    base = parsed.out or Path("runs") / Path(words[0]).stem
    lines, outs = [], []
    for chosen in itertools.product(*values.values()):
        pairs = dict(zip(values, chosen, strict=True))
        name = "_".join(f"{flag}-{re.sub(r'[^A-Za-z0-9.]', '-', value)}" for flag, value in pairs.items())
        flags = [word for flag, value in pairs.items() for word in (f"--{flag}", value)]
        lines.append([*words, *flags])
        outs.append(["--out", str(base / name)])
    if parsed.out is None and hasattr(module, "run_folder"):
        if len({module.run_folder(check(line, True)[1]) for line in lines}) == len(lines):
            return lines
    return [line + out for line, out in zip(lines, outs, strict=True)]


def plan(args, words: list[str]) -> list[list[str]]:
    """The command lines of one script that are not finished yet, checked by its parser.

    Raises:
        UserError: --shards or --sweep with a script that does not take them.
    """
    if args.sweep:
        lines = expand_sweep(words, args.sweep)
    elif args.shards:
        lines = [[*words, "--shard", f"{i}/{args.shards}"] for i in range(args.shards)]
    else:
        lines = [words]
    checked = [(line, *check(line, True)) for line in (lines if args.sweep else lines[:1])]
    if args.shards:
        # Shards differ in their number only: one check serves all, and the whole array is sent or nothing.
        whole = checked[0][1].build_parser().parse_args(words[1:])
        most = checked[0][1].most_shards(whole)
        if args.shards > most:
            raise cli.UserError(f"--shards {args.shards}: more than there is work for; expected at most {most}")
        return [] if is_finished(checked[0][1], whole) else lines
    return [line for line, module, parsed in checked if not is_finished(module, parsed)]


def is_finished(module, args) -> bool:
    """Whether nothing is left to do, by the script's own `finished`; a script without one is always sent."""
    return hasattr(module, "finished") and module.finished(args)


def take_snapshot(folder: Path) -> str:
    """Copy the project's code below `folder`; returns the commit, marked where the checkout differs from it."""
    commit = runs.commit()
    if commit.endswith("-dirty"):
        print("the checkout has changes that are not committed: the snapshot holds them as they are")
    for pattern in SNAPSHOT:
        for path in ROOT.glob(pattern):
            ignore = shutil.ignore_patterns("__pycache__")
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, copy, ignore=ignore) if path.is_dir() else shutil.copy2(path, copy)
    files.write_text(folder / runs.COMMIT, commit)
    return commit


def make_executor(args, logs: Path, name: str, extra: dict[str, str], after: str | None):
    """A submitit executor with the resources asked for."""
    import submitit

    executor = submitit.AutoExecutor(str(logs), cluster=args.cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(
        name=name, timeout_min=args.time, nodes=args.nodes, tasks_per_node=args.tasks_per_node,
        cpus_per_task=args.cpus_per_task, gpus_per_node=args.gpus_per_node,
    )  # fmt: skip
    if args.cluster == "slurm":
        options = {"partition": args.partition, "account": args.account, "qos": args.qos, "mem": args.mem,
                   "constraint": args.constraint,
                   # srun has not inherited --cpus-per-task since Slurm 22.05: a task would get one core.
                   "setup": [f"export SRUN_CPUS_PER_TASK={args.cpus_per_task}", *args.setup],
                   "dependency": after and f"afterok:{after}", "additional_parameters": extra or None}  # fmt: skip
        executor.update_parameters(
            slurm_array_parallelism=args.max_parallel, slurm_signal_delay_s=args.signal_delay,
            **{f"slurm_{key}": value for key, value in options.items() if value is not None},
        )  # fmt: skip
    return executor


def failures_of(words: list[str]) -> str | None:
    """The file in which a shard of generate_spectrum.py lists images that it skipped; None for other scripts."""
    if words[0] != "generate_spectrum.py":
        return None
    parsed = check(words, False)[1]
    return str(parsed.out / f"shard-{parsed.shard[0]:05d}" / "failures.jsonl")


def submit(args, lines: list[list[str]], folder: Path, code: Path, extra: dict[str, str], after: str | None) -> list:
    """Send command lines as one array (or one job); returns submitit's jobs."""
    import submitit

    executor = make_executor(args, folder / "logs", Path(lines[0][0]).stem, extra, after)
    commands = [
        Command(
            [sys.executable, str(code.resolve() / line[0]), *line[1:]], os.getcwd(), args.signal_delay / 2,
            failures_of(line),
        )
        for line in lines
    ]  # fmt: skip
    try:
        if len(commands) == 1:
            return [executor.submit(commands[0])]
        with executor.batch():
            return [executor.submit(command) for command in commands]
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error.__cause__ or error)
        said = said.decode() if isinstance(said, bytes) else said
        reason = [line for line in said.splitlines() if "error" in line.lower()] or [said.strip().splitlines()[-1]]
        raise cli.UserError(f"Slurm refused the job: {reason[-1].strip()}") from error


def last_line(path: Path) -> str:
    """The last line of a log that is not blank or submitit's own, from its last 20 kB."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("submitit ")), "")


def show_status(folder: Path) -> int:
    """Print a line for each task: job, state, command, and the last line of its log (progress, or its error)."""
    import submitit

    content = files.read_object(folder / "submission.json", "cluster", "tasks")
    kinds = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob, "debug": submitit.LocalJob}
    counts: dict[str, int] = {}
    for task in content["tasks"]:
        if content["cluster"] == "debug":
            state, said = "COMPLETED", ""
        else:
            job = kinds[content["cluster"]](folder=folder / "logs", job_id=task["job_id"])
            result = job.paths.result_pickle.is_file()
            state = job.state.split()[0] if job.state else "UNKNOWN"
            said = last_line(job.paths.stderr)
            if state in ("UNKNOWN", "FINISHED", "INTERRUPTED") and result:
                state = "COMPLETED" if not said.startswith(("RuntimeError", "submitit.core")) else "FAILED"
            if state == "FAILED":
                said = next_error(job.paths.stderr) or said
        counts[state] = counts.get(state, 0) + 1
        print(f"{task['job_id']:>12}  {state:<10}  {shlex.join(task['command'])}  {said}".rstrip())
    print(", ".join(f"{count} {state.lower()}" for state, count in sorted(counts.items())))
    return 0


def next_error(path: Path) -> str:
    """The last error message of a script in a log."""
    if not path.is_file():
        return ""
    lines = path.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if ".py: error: " in line), "")


def main(argv: list[str] | None = None) -> int:
    own, scripts, extra = split_command_line(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(own)
    if args.status:
        return show_status(args.status)
    if not scripts:
        raise cli.UserError("no script: expected one of " + ", ".join(f"{name}.py" for name in SCRIPTS))
    if args.shards and scripts[0][0] not in SHARDED:
        raise cli.UserError(f"--shards: only {', '.join(SHARDED)} have shards, {scripts[0][0]} does not")
    if args.shards and args.sweep:
        raise cli.UserError("--shards and --sweep: expected one of them")

    scripts = [expand_files(words) for words in scripts]
    first = plan(args, scripts[0])
    # A dependent job reads files that the first one writes: its paths need not exist yet.
    then = [(words, check(words, False)) and words for words in scripts[1:]]
    if not first and not then:
        print("everything is finished: nothing to submit")
        return 0
    folder = args.folder or Path("runs/jobs") / Path(scripts[0][0]).stem
    print(f"{text.counted(len(first), 'task')}{f', then {len(then)} more' if then else ''}; logs in {folder}")
    if args.dry_run:
        for line in [*first, *then]:
            print("  " + shlex.join(line))
        return 0

    if args.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise cli.UserError(
            "--cluster slurm: no sbatch on this machine; expected a Slurm login node or --cluster local"
        )
    # Each submission has its own snapshot: jobs of an earlier one may still run from theirs.
    code = folder / f"code-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    commit = take_snapshot(code)
    began, tasks, after = time.monotonic(), [], None
    for lines in filter(None, [first, *([line] for line in then)]):
        jobs = submit(args, lines, folder, code, extra, after)
        after = jobs[0].job_id.split("_")[0]
        tasks += [{"job_id": job.job_id, "command": line} for job, line in zip(jobs, lines, strict=True)]
        if args.cluster != "slurm":  # without a scheduler, wait for the first job here
            for job in jobs:
                job.wait()
                if job.exception() is not None:
                    raise cli.UserError(f"{shlex.join(lines[jobs.index(job)])} failed; its log is {job.paths.stderr}")
    files.write_json(folder / "submission.json", {"cluster": args.cluster, "commit": commit, "tasks": tasks})
    print(f"submitted in {time.monotonic() - began:.1f} s; look with: python slurm/submit.py --status {folder}")
    return 0


if __name__ == "__main__":
    cli.run(main)
