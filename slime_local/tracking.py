"""Where metrics go: metrics.jsonl beside the checkpoints, TensorBoard and Weights & Biases when asked for."""

import json
import math
import os
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slime_local.errors import UsageError

METRICS_FILE = "metrics.jsonl"


def check(args: Namespace) -> None:
    """Raise UsageError when a place is asked for that cannot work: not installed, no folder named."""
    if args.use_tensorboard:
        if _tensorboard_folder(args) is None:
            raise UsageError("--use-tensorboard needs --tensorboard-dir, TENSORBOARD_DIR or --tb-project-name")
        if find_spec("tensorboard") is None:
            raise UsageError("--use-tensorboard: TensorBoard is not installed (pip install tensorboard)")
    if args.use_wandb:
        if args.wandb_key is not None:
            raise UsageError("--wandb-key can be read by anyone on this machine: set WANDB_API_KEY instead")
        if find_spec("wandb") is None:
            raise UsageError("--use-wandb: Weights & Biases is not installed (pip install wandb)")


class Tracker:
    """Writes numbers to every place that the flags name; slime's flags, slime's places.

    Raises UsageError as `check`.
    """

    def __init__(self, args: Namespace) -> None:
        check(args)
        self.file = Path(args.save) / METRICS_FILE if args.save else None
        self.tensorboard = _tensorboard(args) if args.use_tensorboard else None
        self.wandb = _wandb(args) if args.use_wandb else None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record `metrics` at `step`. Values that are not numbers are left out."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        self.note(numbers, step)
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({**numbers, "step": step})

    def note(self, numbers: dict[str, float], step: int) -> None:
        """Record numbers in metrics.jsonl alone."""
        if self.file is not None:
            self._append({"step": step, **{name: _json_number(value) for name, value in numbers.items()}})

    def continue_at(self, first: dict[str, int]) -> None:
        """Take the rows out of metrics.jsonl that a resumed run is going to write again: those at or behind the step
        that `first` names for their kind, and a line that a kill tore."""
        rows = self._rows()
        kept = [row for row in rows if all(row.get(kind, -1) < step for kind, step in first.items())]
        if self.file is not None and self.file.exists():
            partial = self.file.with_name(f"{self.file.name}.tmp")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(self.file)

    def count(self, kind: str, step: int) -> int:
        """Rows in metrics.jsonl whose `kind` is `step`; 1 where there is no such file to ask."""
        return sum(row.get(kind) == step for row in self._rows()) if self.file is not None else 1

    def _rows(self) -> list[dict[str, float | None]]:
        """The whole lines of metrics.jsonl."""
        if self.file is None or not self.file.exists():
            return []
        rows = []
        for line in self.file.read_text(errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows += [row] if isinstance(row, dict) else []
        return rows

    def _append(self, row: dict[str, float | None]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensorboard_folder(args: Namespace) -> str | None:
    folder = os.environ.get("TENSORBOARD_DIR") or args.tensorboard_dir
    if not folder and args.tb_project_name:
        name = args.tb_experiment_name or time.strftime("%Y%m%d_%H%M%S")
        folder = f"tensorboard_log/{args.tb_project_name}/{name}"
    return folder or None


def _tensorboard(args: Namespace) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(_tensorboard_folder(args))


def _wandb(args: Namespace) -> Any:
    import wandb

    group = args.wandb_group
    if group and args.wandb_random_suffix:
        group = f"{group}_{wandb.util.generate_id()}"
    wandb.init(
        entity=args.wandb_team,
        project=args.wandb_project,
        group=group,
        name=group,
        id=args.wandb_run_id,
        resume="allow" if args.wandb_run_id else None,
        mode=args.wandb_mode,
        dir=args.wandb_dir,
        settings=wandb.Settings(base_url=args.wandb_host) if args.wandb_host else None,
        config=_plain_settings(args),
    )
    wandb.define_metric("step")
    wandb.define_metric("*", step_metric="step")
    return wandb


def _plain_settings(args: Namespace) -> dict[str, Any]:
    """The settings without nested values: a YAML's tables may hold keys of services."""
    secret = ("key", "token", "secret", "password")
    return {
        name: value
        for name, value in vars(args).items()
        if isinstance(value, str | int | float | bool) and not name.lower().endswith(secret)
    }
