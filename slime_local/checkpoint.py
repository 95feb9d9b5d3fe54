"""Training checkpoints in Megatron's folder layout, and the rule that says where a run starts.

    DIR/latest_checkpointed_iteration.txt      the newest complete iteration
    DIR/iter_0000007/model.safetensors         every parameter, under its Megatron name, fp32
                     optimizer.safetensors     AdamW's moments of the trainable parameters
                     state.pt                  schedule, random generators, the caller's own state

An iteration appears under its name only when it is complete, and the text file names it only after that. Reading never
unpickles anything but plain values and tensors.
"""

import fcntl
import io
import os
import random
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime_local.errors import UsageError, one_line
from slime_local.hf_folder import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class Location:
    """Weights on disk: an iteration of a checkpoint folder, or (`iteration` None) a Hugging Face folder."""

    path: Path
    iteration: int | None

    @property
    def folder(self) -> Path:
        return self.path if self.iteration is None else iteration_folder(self.path, self.iteration)

    def __str__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class Start:
    """Where a run starts: from `location`, continuing that run (`resume`) or with its weights only."""

    location: Location
    resume: bool
    reason: str


def iteration_folder(path: Path | str, iteration: int) -> Path:
    return Path(path) / f"iter_{iteration:07d}"


# ---- Finding -----------------------------------------------------------------------------------------------------


def find_start(args: Namespace) -> Start:
    """The run's starting point by slime's rule: --load if there is a checkpoint in it, else --ref-load, else
    --hf-checkpoint. Raises UsageError when a folder given is not what the flag wants; loads nothing."""
    if args.load is not None:
        found = locate(args.load, args.ckpt_step, "--load", "--ckpt-step")
        if found is not None:
            resume = found.iteration is not None and not args.finetune
            return Start(found, resume, "resuming from" if resume else "starting with the weights of --load")
    elif args.ref_load is None and args.ckpt_step is not None:
        raise UsageError(f"--ckpt-step {args.ckpt_step} without --load: say which run's step that is")
    missing = "" if args.load is None else f"no checkpoint in --load {args.load} yet: "
    if args.ref_load is not None:
        found = reference_location(args)
        return Start(found, False, f"{missing}starting with the weights of --ref-load")
    return Start(Location(Path(args.hf_checkpoint), None), False, f"{missing}starting with --hf-checkpoint")


def reference_location(args: Namespace) -> Location:
    """The weights that --ref-load (with --ref-ckpt-step) names. Raises UsageError when there are none."""
    if args.ref_load is None:
        raise UsageError("--use-kl-loss and --kl-coef need --ref-load: the folder with the reference model's weights")
    found = locate(args.ref_load, _reference_step(args), "--ref-load", "--ref-ckpt-step")
    if found is None:
        raise UsageError(
            f"--ref-load {args.ref_load}: no checkpoint there (neither {TRACKER} nor a Hugging Face config.json)"
        )
    return found


def _reference_step(args: Namespace) -> int | None:
    """--ref-ckpt-step, else --ckpt-step, as slime takes it, which a Hugging Face folder has no use for."""
    has_steps = (Path(args.ref_load) / TRACKER).is_file()
    return args.ckpt_step if args.ref_ckpt_step is None and has_steps else args.ref_ckpt_step


def locate(path: str | Path, step: int | None, flag: str, step_flag: str) -> Location | None:
    """What `flag` names: an iteration (`step`, else the newest), an HF folder, or None where there is nothing yet.

    Raises UsageError for an iteration folder, a step that is not there, and formats that this host does not read.
    """
    path = Path(path)
    named = ITERATION.fullmatch(path.name)
    if named:
        raise UsageError(
            f"{flag} {path} is one iteration's folder: give {flag} {path.parent} {step_flag} {int(named[1])}"
        )
    if path.exists() and not path.is_dir():
        raise UsageError(f"{flag} {path} is a file: give a checkpoint folder or a Hugging Face model folder")
    if (path / TRACKER).is_file():
        return _located_iteration(path, step, flag, step_flag)
    if not (path / "config.json").is_file():
        return None
    if step is not None:
        raise UsageError(f"{flag} {path} is a Hugging Face folder and has no steps: leave out {step_flag} {step}")
    return Location(path, None)


def _located_iteration(path: Path, step: int | None, flag: str, step_flag: str) -> Location:
    newest = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if step is None and not re.fullmatch("[0-9]{1,18}", newest):
        newest = newest[:40]
        raise UsageError(
            f"{flag} {path}: {TRACKER} says {newest!r}, which is no iteration: convert it to Hugging Face form"
        )
    found = Location(path, int(newest) if step is None else step)
    restore_interrupted(found.folder)
    if not found.folder.is_dir():
        there = ", ".join(str(number) for number in saved_iterations(path)) or "none"
        raise UsageError(f"{flag} {path} has no iteration {found.iteration} (there: {there}); choose with {step_flag}")
    if not (found.folder / "model.safetensors").is_file():
        raise UsageError(
            f"{flag}: {found.folder} has no model.safetensors. A Megatron checkpoint is converted with slime's "
            f"tools/convert_torch_dist_to_hf.py --input-dir {found.folder} --output-dir OUT --origin-hf-dir HF; "
            f"then give {flag} OUT"
        )
    try:
        read_safetensors_header(found.folder / "model.safetensors")
    except UsageError as error:
        raise UsageError(f"{flag}: {error}, or choose an older iteration with {step_flag}") from error
    return found


def saved_iterations(path: Path | str) -> list[int]:
    """Numbers of the iterations in a checkpoint folder, ascending."""
    if not Path(path).is_dir():
        return []
    names = (ITERATION.fullmatch(entry.name) for entry in Path(path).iterdir())
    return sorted(int(name[1]) for name in names if name)


# ---- Reading -----------------------------------------------------------------------------------------------------


def read_weights(location: Location, names: list[str], config: object) -> Iterator[tuple[str, "Tensor"]]:
    """Each named parameter (Megatron name) of `location`, on the CPU. `config` is the HF config of the model.

    Raises UsageError when one is missing.
    """
    from safetensors import safe_open

    from slime_local.hf_folder import check_hf_folder
    from slime_local.model import HfWeights, read_parameter

    if location.iteration is None:
        weights = HfWeights(check_hf_folder(location.path))
        yield from ((name, read_parameter(weights, name, config)) for name in names)
        return
    path = location.folder / "model.safetensors"
    with _readable(path, lambda path: safe_open(path, framework="pt")) as file:
        there = set(file.keys())
        for name in names:
            if name not in there:
                raise UsageError(f"{location} has no parameter {name}: it belongs to another model")
            yield name, file.get_tensor(name)


def read_optimizer(location: Location) -> dict[str, dict[str, "Tensor"]] | None:
    """Optimizer state by parameter name; None when the checkpoint was made with --no-save-optim."""
    from safetensors.torch import load_file

    path = location.folder / "optimizer.safetensors"
    if not path.is_file():
        return None
    read_safetensors_header(path)
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in _readable(path, load_file).items():
        name, _, slot = key.rpartition("/")
        state.setdefault(name, {})[slot] = value
    return state


def _readable(path: Path, read: Callable[[Path], Any]) -> Any:
    """read(path). Raises UsageError where safetensors finds more wrong than the header's form."""
    from safetensors import SafetensorError

    try:
        return read(path)
    except SafetensorError as error:
        raise UsageError(
            f"{path} is damaged ({one_line(error)}): choose an older iteration with --ckpt-step"
        ) from error


def read_state(location: Location) -> dict[str, Any]:
    """The `state` given to `write`. Raises UsageError when its file is missing or broken."""
    import torch

    path = location.folder / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the file's bytes decide what torch raises
        raise UsageError(
            f"{path} cannot be read ({one_line(error)}): choose an older iteration with --ckpt-step"
        ) from error
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds no state of a run: choose an older iteration with --ckpt-step")
    return state


# ---- Writing -----------------------------------------------------------------------------------------------------


def write(
    path: Path | str,
    iteration: int,
    weights: dict[str, "Tensor"],
    optimizer: dict[str, dict[str, "Tensor"]] | None,
    state: dict[str, Any],
) -> Path:
    """Write one iteration and point the tracker file at it; returns its folder.

    `state` holds plain values and tensors only. Raises UsageError when it does not, OSError when the disk refuses;
    what was there before is untouched in both cases.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    folder = iteration_folder(path, iteration)
    work = folder.with_name(f"{folder.name}.tmp")
    packed = _pack(state)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        save_file(_contiguous(weights), work / "model.safetensors", metadata={"format": "pt"})
        if optimizer is not None:
            flat = {f"{name}/{slot}": value for name, slots in optimizer.items() for slot, value in slots.items()}
            save_file(_contiguous(flat), work / "optimizer.safetensors")
        (work / "state.pt").write_bytes(packed)
        for file in (*work.iterdir(), work):
            _sync(file)
        _put_in_place(work, folder)
    except SafetensorError as error:  # its words for a full disk
        raise OSError(f"{work}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _point_tracker(path, iteration)
    return folder


def _pack(state: dict[str, Any]) -> bytes:
    """`state` as bytes, read back once: what cannot be read again must not be found out at resume."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise UsageError(f"the state to save holds more than plain values and tensors: {error}") from error
    return buffer.getvalue()


def _contiguous(tensors: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _put_in_place(work: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(work, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_interrupted(folder: Path) -> None:
    """Put an iteration back that a kill caught between its removal and its replacement."""
    old = folder.with_name(f"{folder.name}.old")
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)


def _point_tracker(path: Path, iteration: int) -> None:
    work = path / f"{TRACKER}.tmp"
    work.write_text(str(iteration))
    _sync(work)
    os.replace(work, path / TRACKER)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def sole_writer(path: str | None) -> Iterator[None]:
    """Hold --save for this process while the block runs. Raises UsageError when another run holds it."""
    if path is None:
        yield
        return
    Path(path).mkdir(parents=True, exist_ok=True)
    with (Path(path) / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip()
            which = f" (PID {holder})" if holder else ""
            raise UsageError(
                f"--save {path}: another run is writing it{which}; end that one or save elsewhere"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
        file.truncate(0)


# ---- Random generators -------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """State of python's, numpy's and torch's generators, as plain values and tensors."""
    import numpy
    import torch

    kind, keys, position, has_gauss, gauss = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo of `random_state`."""
    import numpy
    import torch

    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
