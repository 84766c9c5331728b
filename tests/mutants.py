"""Faults put into the code one after another, in a copy of the tree: does a fast test notice each?

Not part of the suite. Prints a line a fault, and leaves with 1 where one is not noticed.

    python tests/mutants.py            all
    python tests/mutants.py ema prior  those whose names hold one of these words
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mutants_draw

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        file: below the project's folder.
        old: a text that stands in the file once.
        new: what replaces it.
        tests: arguments of pytest that choose the tests which should notice it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


VALUES = "tests/test_values.py"
FAULTS = [
    # The fifteen that no test noticed at first.
    Fault("the moving average is never evaluated", "training/loop.py",
          "return self.average.module if self.average else self.model", "return self.model",
          f"{VALUES} -k averaged"),
    Fault("the best epoch is chosen on the test set", "train_lt.py",
          "        predicted = self.predict_classes(self.val, len(val))\n        found",
          "        val = self.data.test\n        test = build_store(self.args, [val], self.device)\n"
          "        predicted = self.predict_classes(test, len(val))\n        found",
          f"{VALUES} -k averaged"),
    Fault("CIFAR-100 is normalised with CIFAR-10's statistics", "loaders/cifar.py",
          '"cifar100_lt": ((0.5071, 0.4865, 0.4409)', '"cifar100_lt": ((0.4914, 0.4822, 0.4465)',
          f"{VALUES} -k published"),
    Fault("ImageNet's deviations are reversed", "loaders/base.py",
          "(0.229, 0.224, 0.225)", "(0.225, 0.224, 0.229)", f"{VALUES} -k published"),
    Fault("CLIP's images keep the data set's statistics", "train_iwildcam.py",
          "data = dataclasses.replace(data, mean=mean, std=std)", "data = dataclasses.replace(data)",
          "tests/test_iwildcam_runs.py -k statistics"),
    Fault("--prior real and stage are swapped", "train_lt.py",
          'if self.args.prior == "stage" else', 'if self.args.prior == "real" else', f"{VALUES} -k prior"),
    Fault("weight decay 0", "training/optimization.py",
          "return kind(trained, args.lr, weight_decay=args.weight_decay, fused=True)",
          "return kind(trained, args.lr, weight_decay=0.0, fused=True)", f"{VALUES} -k optimiser"),
    Fault("--clip-grad is ignored", "training/loop.py",
          "if self.args.clip_grad is not None:", "if False:", f"{VALUES} -k clipped"),
    Fault("deferred re-weighting before its epoch", "train_lt.py",
          "if args.drw and epoch >= start else None", "if args.drw and epoch < start else None", f"{VALUES} -k prior"),
    Fault("FLYP: always the first caption", "train_iwildcam.py",
          "captions = batch.labels.cpu() * templates + drawn", "captions = batch.labels.cpu() * templates + 0 * drawn",
          f"{VALUES} -k captions"),
    Fault("progress since the first look", "training/epochs.py",
          'done["before"] = trainer.look()', 'done["before"] = vars(trainer).setdefault("first", trainer.look())',
          "tests/test_lt_runs.py -k real_pass_alone"),
    Fault("many-shot from 100 images on", "loaders/base.py",
          "counts > self.many_above", "counts >= self.many_above", f"{VALUES} -k bounds"),
    Fault("no antialiasing", "training/stores.py",
          "mode=crop.filter, antialias=True", "mode=crop.filter, antialias=False", f"{VALUES} -k antialiasing"),
    Fault("no colour jitter", "training/augmentations.py", "if args.color_jitter:", "if False:", f"{VALUES} -k jitter"),
    Fault("SyncBatchNorm left out", "training/distributed.py",
          "else torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)", "else model", f"{VALUES} -k batch_norm"),
    # Nine that were noticed from the start.
    Fault("the cosine ends at half", "training/optimization.py",
          "math.cos(math.pi * progress)", "math.cos(math.pi * progress / 2)", "tests/test_train.py -k learning_rates"),
    Fault("Balanced Softmax subtracts", "training/losses.py",
          "logits + counts.clamp(min=1).to(logits.dtype).log()", "logits - counts.clamp(min=1).to(logits.dtype).log()",
          "tests/test_losses.py -k balanced_softmax"),
    Fault("LDAM's margins grow with the count", "training/losses.py",
          "counts.clamp(min=1).to(logits.dtype) ** -0.25", "counts.clamp(min=1).to(logits.dtype) ** 0.25",
          "tests/test_losses.py -k ldam"),
    Fault("WiSE-FT from the other end", "training/clip.py",
          "torch.lerp(zero_shot[name], value, alpha)", "torch.lerp(value, zero_shot[name], alpha)",
          "tests/test_iwildcam.py -k two_models"),
    Fault("macro-F1 over all classes", "training/evaluation.py",
          "labels=np.unique(labels), zero_division", "zero_division", "tests/test_iwildcam.py -k macro_f1"),
    Fault("outliers of progress stay", "curricula.py",
          "margin = 1.5 * (high - low)", "margin = 15 * (high - low)", "tests/test_curricula.py -k progress_by_hand"),
    Fault("left-over epochs go to the last stages", "curricula.py",
          "[stage for stage, share in enumerate(shares) if share][: epochs",
          "[stage for stage, share in enumerate(shares) if share][::-1][: epochs",
          "tests/test_curricula.py -k by_hand"),
    Fault("the others are not undersampled", "curricula.py",
          "wanted = max(0, round(len(others)", "others = np.flatnonzero(~is_hard[labels])\n"
          "    wanted = max(0, round(len(others)", "tests/test_curricula.py -k stage_mix"),
    Fault("evaluation leaves the model in training mode", "training/evaluation.py",
          "    model.eval()\n", "    model.train()\n", "tests/test_train.py -k evaluation_changes"),
    # The readings of the paper.
    Fault("the real level is no candidate of a mix", "curricula.py",
          "candidates = np.flatnonzero(np.isin(levels, stage) & is_hard[labels] & ~held)",
          "candidates = np.flatnonzero(np.isin(levels, stage) & (levels < REAL) & is_hard[labels] & ~held)",
          "tests/test_curricula.py -k every_stage"),
    Fault("held-out images are trained on", "curricula.py",
          "candidates = np.flatnonzero(np.isin(levels, stage) & is_hard[labels] & ~held)",
          "candidates = np.flatnonzero(np.isin(levels, stage) & is_hard[labels])",
          "tests/test_curricula.py -k held_out"),
    Fault("hard camera-trap images stay", "curricula.py",
          "others = np.flatnonzero(real & ~is_hard & ~held)", "others = np.flatnonzero(real & ~held)",
          "tests/test_curricula.py -k stand_in"),
    Fault("the real pass walks the epoch's rates", "training/loop.py",
          'if purpose == "real pass":\n            return optimization.learning_rate(self.args, epoch + 0.5)',
          'if False:\n            return optimization.learning_rate(self.args, epoch + 0.5)',
          "tests/test_lt_runs.py -k holds_the_rate"),
    Fault("the real pass is not counted", "training/epochs.py",
          'images = passed + sum(record["images"]', 'images = sum(record["images"]',
          "tests/test_lt_runs.py -k never_on_what"),
    Fault("fan_out", "training/networks.py", 'mode="fan_in"', 'mode="fan_out"', f"{VALUES} -k start_by"),
    # Resuming.
    Fault("other test images refuse a run", "runtime/runs.py", "different.keys() <= TESTED", "not different",
          "tests/test_repairs.py -k ended_it"),
    Fault("other validation images resume a run", "runtime/runs.py",
          'TESTED = {"inputs.data"', 'TESTED = {"splits.val", "inputs.data"',
          "tests/test_repairs.py -k other_training"),
    Fault("labels are no part of a split", "training/pool.py",
          "*part.labels.tolist(), ", "", "tests/test_repairs.py -k domains"),
    Fault("a mended camera-trap image joins a run", "train_iwildcam.py",
          "pool.images.unreadable |= before", "pass", "tests/test_repairs.py -k stay_left_out"),
    Fault("selection by overall accuracy", "training/loop.py",
          'chosen_by = "macro"', 'chosen_by = "overall"', f"{VALUES} -k averaged"),
]  # fmt: skip
FAULTS += [Fault(*row) for row in mutants_draw.FAULTS]

# What a run takes up again, left out; the run of each trainer in which it decides anything is to notice it.
LT, TRAPS, FEWSHOT = ALL = ("train_lt", "train_iwildcam", "train_fewshot")
LEFT_OUT = [
    ("optimiser", ALL, "training/epochs.py", 'optimizer.load_state_dict(state["optimizer"])', "pass"),
    ("weights", ALL, "training/epochs.py", 'model.load_state_dict(state["model"])', "pass"),
    ("average", (LT,), "training/epochs.py", 'average.load_state_dict(state["average"])', "pass"),
    ("best weights", ALL, "training/epochs.py", "state = {name: saved.pop(name) for name in state} | saved",
     'state = {name: saved.pop(name) for name in state} | saved | {"best": state["best"]}'),
    ("place in the schedule", ALL, "training/loop.py", "enumerate(batches, done)", "enumerate(batches)"),
    ("loss so far", ALL, "training/loop.py", 'done, total = start["batches"], start["total"].to(self.device)',
     'done = start["batches"]'),
    ("torch's random state", (LT, FEWSHOT), "training/loop.py", 'torch.set_rng_state(state["rng"].cpu())', "pass"),
    ("pass's random state", (TRAPS, FEWSHOT), "training/loop.py", 'generator.set_state(state["generator"].cpu())',
     "pass"),
]  # fmt: skip
FAULTS += [
    Fault(f"{script} resumes without its {what}", *change, f"tests/test_resume.py -k {script}")
    for what, scripts, *change in LEFT_OUT
    for script in scripts
]


def notices(folder: Path, fault: Fault) -> bool:
    """Whether the tests that a fault names fail with it, in a copy of the tree.

    Raises:
        SystemExit: the old text does not stand in its file once.
    """
    path = folder / fault.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: its text stands {whole.count(fault.old)} times in {fault.file}; expected once")
    path.write_text(whole.replace(fault.old, fault.new), encoding="utf-8")
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", *fault.tests.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    path.write_text(whole, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise SystemExit(f"{fault.name}: pytest {fault.tests} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.returncode == 1


def main() -> int:
    words = sys.argv[1:]
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutants_") as temporary:
        # A copy of what git knows, and of what is new.
        listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
            if (ROOT / name).is_file():
                (Path(temporary) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(temporary) / name)
        for fault in chosen:
            found = notices(Path(temporary), fault)
            missed += not found
            print(f"{'noticed' if found else 'NOT NOTICED':12} {fault.name}  ({fault.file}; {fault.tests})", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
