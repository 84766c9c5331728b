"""TensorBoard events of a filter's verdict."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from loaders.pictures import read_image


def log_edits(folder: Path, domains: list[str], reasons: np.ndarray, thresholds: list[float] | None) -> None:
    """Write what filter_edits.py found to FOLDER/edits/events, anew at each call.

    Shares of the edits that are kept, over all and by domain, and dropped by reason, in percent; the thresholds of the
    confidence rule; and the two sheets of edits.

    Args:
        domains: the domain of each edit, N names.
        reasons: why each edit is dropped, object (N,), empty where it is kept.
        thresholds: of each class, 2.0 for one without an image; None without the confidence rule.
    """
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "edits/events", ignore_errors=True)
    kept, of = reasons == "", np.array(domains)
    with SummaryWriter(str(folder / "edits/events")) as writer:
        writer.add_scalar("kept/all", 100 * kept.mean(), 0)
        for domain in sorted(set(domains)):
            writer.add_scalar(f"kept/{domain or 'no domain'}", 100 * kept[of == domain].mean(), 0)
        for reason in sorted(set(reasons[~kept].tolist())):
            writer.add_scalar(f"dropped/{reason}", 100 * (reasons == reason).mean(), 0)
        known = [value for value in thresholds or [] if value <= 1]
        if known:
            writer.add_histogram("thresholds", np.array(known), 0)
        for name in ("edits_kept", "edits_dropped"):
            if (folder / f"{name}.png").is_file():
                sheet = np.asarray(read_image(folder / f"{name}.png"))
                writer.add_image(f"edits/{name.removeprefix('edits_')}", sheet, 0, dataformats="HWC")
