"""SFT and GRPO with slime's flags: on slime where it is installed, else on this machine.

    python3 train.py --hf-checkpoint DIR --prompt-data FILE --rollout-batch-size 8 ...
    python3 train.py --check-only ...        checks the command and stops
    python3 train.py --host local ...        this machine even where slime is installed (also: slime, auto)

The command is checked before anything loads; a problem is one line and exit code 2. What the system refuses later (a
full disk) is one line and exit code 1.
"""

import argparse
import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

from slime_local.checks import check
from slime_local.errors import UsageError, os_error_line
from slime_local.flags import doubtful_config_keys, parse_args
from slime_local.lasting import lasting


def main(argv: list[str] | None = None) -> int:
    args = argparse.Namespace(load=None, save=None)
    try:
        own, rest = own_flags(sys.argv[1:] if argv is None else argv)
        host = choose_host(own.host)
        args = parse_args(rest, host)
        check(args, host)
        report(args, host)
        if own.check_only:
            return 0
        if host == "slime":
            hand_over(rest)
        train_here(args)
    except UsageError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {os_error_line(error)} (at {place(error)}){continues(args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def place(error: BaseException) -> str:
    """The function in which it arose: a plug-in's own file that is missing looks like a full disk otherwise."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, {frame.name}"


def continues(args: argparse.Namespace) -> str:
    resumes = args.load and args.save and Path(args.load).resolve() == Path(args.save).resolve()
    return "; the same command continues from the last checkpoint" if resumes else ""


def own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The two flags that are not slime's, and the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="auto")
    parser.add_argument("--check-only", action="store_true")
    own, rest = parser.parse_known_args(argv)
    if own.host not in ("auto", "local", "slime"):
        raise UsageError(f"--host {own.host}: choose auto, local or slime")
    return own, rest


def choose_host(wanted: str) -> str:
    """ "local" or "slime"; auto takes slime where it can be imported."""
    if wanted == "auto":
        return "slime" if slime_folder() else "local"
    return wanted


def slime_folder() -> Path | None:
    """The folder that holds the package `slime`."""
    spec = find_spec("slime")
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((Path(place).parent for place in places if (Path(place) / "rollout").is_dir()), None)


def report(args: argparse.Namespace, host: str) -> None:
    """What will run, and which flags have no meaning here: one line each."""
    if args.ignored_flags:
        print(f"ignored on one machine: {' '.join(args.ignored_flags)}", flush=True)
    for key, flag in doubtful_config_keys(args):
        where = f"warning: --custom-config-path {args.custom_config_path}"
        print(f"{where}: {key} is no argument of slime: did you mean {flag}? Plug-ins alone see it", file=sys.stderr)
    samples = args.rollout_batch_size * args.n_samples_per_prompt
    length = f"{args.num_rollout} rollouts" if args.num_rollout is not None else f"{args.num_epoch} epochs, rollouts"
    print(
        f"checked for {host}: {length} of {args.rollout_batch_size} x {args.n_samples_per_prompt} samples, "
        f"{samples // args.global_batch_size} optimizer steps each",
        flush=True,
    )


def hand_over(argv: list[str]) -> None:
    """Become slime's own train.py with the same flags."""
    folder = slime_folder()
    if folder is None:
        raise UsageError("--host slime: slime is not installed (cannot import slime); use --host local")
    script = folder / "train.py"
    if not script.is_file():
        raise UsageError(f"slime at {folder} comes without its train.py: install it with pip install -e CHECKOUT")
    os.execv(sys.executable, [sys.executable, str(script), *argv])


def train_here(args: argparse.Namespace) -> None:
    with lasting():
        from slime_local.loop import train

    train(args)


if __name__ == "__main__":
    sys.exit(main())
